"""Architecture search: the space, rank correlations by hand, and networks trained on what they should be."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import ddlib as dd
from ddlib.core import DDError
from ddlib.engine.record import Run
from ddlib.nets.build import build
from ddlib.studies import architecture_search as search
from ddlib.studies.architecture_search import choices, correlations, space, spearman, study

FAST = {"ipc": 2, "epochs": 6, "whole_epochs": 2, "progress": False}


def test_the_space_is_the_papers_720_convnets():
    every = space((3, 32, 32))
    assert len(set(every)) == 720 and len(space((1, 28, 28))) == 720
    assert len({build(name, (3, 32, 32), 10).spec for name in every[::24]}) == 30
    assert len(space((1, 8, 8))) == 600  # depth 4 cannot halve 8 pixels four times
    for name in space((1, 8, 8), width=(32,), depth=(3, 4)):
        build(name, (1, 8, 8), 10)
    drawn = space((1, 8, 8), count=12, width=(32,))
    assert len(set(drawn)) == 12 and all("width=32" in name for name in drawn)
    assert drawn == space((1, 8, 8), count=12, width=(32,))
    assert drawn != space((1, 8, 8), count=12, seed=1, width=(32,))
    with pytest.raises(DDError, match="cannot draw 1000 of the 600"):
        space((1, 8, 8), count=1000)
    with pytest.raises(DDError, match="axis of the search space 'widths'"):
        space((1, 8, 8), widths=(32,))


def test_spearman_is_scipys_ties_included():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (20, 15)), rng.normal(size=(20, 15))
    assert spearman(a, b) == pytest.approx(
        [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    )
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def table(**proxies) -> pd.DataFrame:
    """Accuracies on val of 8 networks by proxy; the whole set's test accuracies fall from 90."""
    columns = {"whole": 90 - np.arange(8.0)} | {
        name: np.array(v, float) for name, v in proxies.items()
    }
    return pd.DataFrame(
        [
            {"proxy": name, "network": f"n{k}", "val": v, "test": v, "seconds": 2.0, "images": 20}
            for name, values in columns.items()
            for k, v in enumerate(values)
        ]
    )


def test_correlations_and_choices_by_hand():
    rows = table(good=range(80, 72, -1), bad=range(8), mixed=[8, 7, 6, 5, 4, 1, 2, 3])
    found = correlations(rows, tops=(5, 8, 10)).set_index(["proxy", "top"])
    assert list(found.index) == [(p, top) for p in ("good", "bad", "mixed") for top in ("5", "all")]
    assert found.spearman["good", "all"] == pytest.approx(1) and found.spearman[
        "bad", "all"
    ] == pytest.approx(-1)
    assert found.spearman["mixed", "5"] == pytest.approx(1) and found.networks["mixed", "5"] == 5
    wanted = spearmanr([8, 7, 6, 5, 4, 1, 2, 3], range(8, 0, -1)).statistic
    assert found.spearman["mixed", "all"] == pytest.approx(wanted)
    assert found.low["mixed", "all"] < wanted <= found.high["mixed", "all"] <= 1
    best = choices(rows).set_index("proxy")
    assert best.network["bad"] == "n7" and best.accuracy["bad"] == 83 and best.regret["bad"] == 7
    assert best.regret["good"] == best.regret["whole"] == 0 and best.seconds["good"] == 16


def test_networks_are_trained_on_the_set_and_ranked_on_images_it_never_saw(results, monkeypatch):
    sizes, true_train = {}, search.train

    def spy(net, images, labels, recipe, *args, **options):
        sizes.setdefault(proxy, (len(labels), recipe.epochs, recipe.drops))
        return true_train(net, images, labels, recipe, *args, **options)

    monkeypatch.setattr(search, "train", spy)
    networks, rows = [f"convnet:width=8,depth=1,act={act}" for act in ("relu", "sigmoid")], {}
    for proxy in ("whole", "early stop", "random"):
        rows[proxy] = study(proxy, "digits", networks, **FAST, block=1)
        assert list(rows[proxy].network) == networks
    assert sizes == {"whole": (1167, 2, ()), "early stop": (1167, 1, ()), "random": (20, 6, ())}
    assert rows["whole"].val.max() > rows["early stop"].val.max() > 10
    data = dd.load("digits", device="cpu").minival(0.1)
    (path,) = (results / "smoke" / "parts" / "smoke" / "random").glob("*.json")
    chosen = Run(path).synthetic.images.flatten(1)
    assert torch.cdist(chosen, data.batch("val", slice(None)).flatten(1)).min() > 0.1
    assert (
        torch.cdist(chosen, data.batch("train", slice(None)).flatten(1)).min(1).values.max() < 0.02
    )
    monkeypatch.setattr(search, "dataset_of", None)  # kept block by block
    assert len(list(results.rglob("architecture_search-*.json"))) == 6
    assert study("whole", "digits", networks[:1], **FAST, block=1).equals(rows["whole"][:1])
    with pytest.raises(DDError, match="unknown proxy 'wole'"):
        study("wole", "digits", networks, **FAST)


def test_a_network_that_diverges_ranks_last_and_stops_nothing(results):
    rows = study("whole", "digits", ["convnet:width=8,depth=1", "mlp:depth=1"], **FAST, eval_lr=1e9)
    assert len(rows) == 2 and rows.val.max() < 30
