"""The scorecard of a distilled set: what its images are worth apart from labels, augmentation and step size.

Label- and augmentation-robust scores of DD-Ranking (arXiv 2505.13300), accuracies as fractions of 1:

    HLR = Acc(real, hard) - Acc(syn, hard)                  IOR = Acc(syn, own) - Acc(random, own)
    LRS = s(w IOR - (1 - w) HLR)                            s(x) = (e^x - 1/e) / (e - 1/e)
    ARS = s(g IOR + (1 - g) IOR without augmentation)       w = g = 0.5

"own" is the set's own evaluation: loss, step size, augmentation, epochs, network. Where its labels are soft, the random
real images that it is held against have a teacher's labels (Qin et al., 2024, arXiv 2406.10485).

Differences from the papers:
1. DD-Ranking tunes the step size for the random images; here they are trained on with the set's, learned or not.
2. Hard labels keep the set's own loss, under which a class is its centred one-hot row where the loss is squared.
3. Acc(real, hard) and the teacher are one network per seed, trained on the whole training set under the set's protocol
   for `epochs` passes without drops of the step size. Qin et al. stop their teacher early, by the number of images.
   A teacher trained by squared error gives its outputs as labels, any other its softmax.
4. A set that stores several images in one (IDC) is held against as many real images as it stores. Where IDC's share
   of CutMix is not its protocol's (MNIST, ImageNet), the real images keep the protocol's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..config import dataset_of, resolve
from ..core import DDError, generator, pick_device
from ..distilled import Synthetic
from ..engine import contract
from ..engine.record import Run, record_path, resolve_record
from ..engine.run import run as distil
from ..nets.build import build
from ..train.evaluate import evaluate
from ..train.loop import accuracy, train_on
from .parts import EVALUATION
from .store import cached

VERSION = 1  # raise it when a change here changes the rows
HARD, TAUGHT, PLAIN = "hard labels", "random, teacher's labels", ", no augmentation"  # conditions
KEY = ["method", "dataset", "ipc", "profile"]


def _checked(what: str, *values: Any) -> None:
    if bad := [value for value in values if np.any(np.less(value, 0) | np.greater(value, 1))]:
        raise DDError(f"{what} is a fraction between 0 and 1 (not per cent), not {bad[0]}")


def hlr(real: float, hard: float) -> float:
    """Hard-label recovery: what the set lacks, under hard labels, of the whole training set. Less is better."""
    _checked("an accuracy", real, hard)
    return real - hard


def ior(own: float, random: float) -> float:
    """Improvement over as many random real images under the same evaluation."""
    _checked("an accuracy", own, random)
    return own - random


def scaled(x: float) -> float:
    """s(x), from [-1, 1] to [0, 1]; s(0), as good as random images, is 0.27."""
    return (np.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def lrs(real: float, hard: float, own: float, random: float, w: float = 0.5) -> float:
    """Label-robust score, in [0, 1], from the accuracies of HLR and IOR: fractions, or arrays of them."""
    _checked("the weight w", w)
    return scaled(w * ior(own, random) - (1 - w) * hlr(real, hard))


def ars(
    own: float, random: float, own_plain: float, random_plain: float, gamma: float = 0.5
) -> float:
    """Augmentation-robust score, in [0, 1], from the accuracies with augmentation and without (`plain`)."""
    _checked("the weight gamma", gamma)
    return scaled(gamma * ior(own, random) + (1 - gamma) * ior(own_plain, random_plain))


def nested_bootstrap(
    scores: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Mean and 95 % percentile interval of scores: a list a distillation seed, over its evaluation networks.

    A resample draws seeds, then networks inside each. Keys: mean (of the seeds' means), low, high; `over seeds`, the
    spread of the seeds' means, and `over networks`, the mean spread inside a seed (population, as `tables.summary`),
    NaN where there is one. With one seed the interval knows of networks only.
    """
    if not scores or not all(map(len, scores)) or resamples < 1:
        raise DDError(
            "the bootstrap needs at least one resample, one seed, and one network of every seed"
        )
    rng, drawn = generator(seed, "nested bootstrap"), np.zeros(resamples)

    def draw(*shape: int, of: int) -> np.ndarray:
        return torch.randint(of, shape, generator=rng).numpy()

    for _ in scores:
        inner = [np.asarray(row)[draw(resamples, len(row), of=len(row))].mean(1) for row in scores]
        drawn += np.array(inner)[draw(resamples, of=len(scores)), np.arange(resamples)] / len(
            scores
        )
    means, (low, high) = [np.mean(row) for row in scores], np.quantile(drawn, [0.025, 0.975])
    found = {
        "mean": np.mean(means),
        "low": low,
        "high": high,
        "over seeds": np.std(means) if len(means) > 1 else math.nan,
        "over networks": np.mean([np.std(row) for row in scores])
        if min(map(len, scores)) > 1
        else math.nan,
    }
    return {name: float(value) for name, value in found.items()}


def storage(syn: Synthetic) -> dict[str, int]:
    """Bytes that a user of the set must keep: `images` and `labels` as they are kept, the `step size` if it is learned,
    `whitening` (the ZCA of its images), `decoder` (a formula) and `teacher` (labels are stored, so none is asked).

    `total` is their sum; `images as uint8` is what their pixels would take in a picture without compression.
    """
    values = syn.spec.get("values", {})
    d = syn.images[0].numel() // (4 if values.get("zca") == "frepo_checkerboard" else 1)
    found = {
        "images": syn.images.nbytes,
        "labels": syn.labels.nbytes,
        "step size": 4 if values.get("lr_lr") and not values.get("eval_lr") else 0,
        "whitening": 4 * d * (d + 1) if syn.zca else 0,
        "decoder": 0,
        "teacher": 0,
    }
    return found | {"total": sum(found.values()), "images as uint8": syn.images.numel()}


def cost(run: Run) -> dict[str, float]:
    """Seconds of distillation, of all the experts that the run drew from, and of both; NaN where nobody measured."""
    needed = contract.needs(run.record["method"], resolve_record(run.record).config)
    experts = run.record["extra"].get("expert seconds", math.nan) if needed else 0.0
    distillation = run.record["seconds"]["distill"]
    return {"distillation": distillation, "experts": experts, "total": distillation + experts}


def find(
    method: str, dataset: str, *, train: bool, device: str = "auto", **options: Any
) -> Run | None:
    """`ddlib.run` with its experts; without `train` the kept run, None where there is none."""
    spec = resolve(method, dataset, **options)
    if not train and not record_path(spec).is_file():
        return None
    return distil(method, dataset, device=device, teach=True, **options)


def baseline(name: str, run: Run, *, train: bool = True, device: str = "auto") -> Run | None:
    """Real images chosen by `name` (random, herding, ...) under a run's protocol: its network, loss, augmentation,
    epochs, number of networks and step size (a learned one to six digits). None where not kept and not to `train`."""
    spec = resolve_record(run.record)
    keys = [*EVALUATION, "augment", "resolution", "compile", "eval_precision"]
    keys += [] if spec.run.eval_backbone else ["backbone"]
    same = {key: getattr(spec.run, key) for key in keys}
    same["networks"] = len(run.record["accuracy"]["last"]["networks"])
    if "lr_lr" in spec.values:
        same["eval_lr"] = float(f"{run.synthetic.recipe.lr:.6g}")
    return find(**spec.case | {"method": name}, train=train, device=device, **same)


def teacher(random: Run, *, epochs: int, plain: bool = True, device: str = "auto") -> pd.DataFrame:
    """A network trained on the whole training set by the protocol of `random`, and the random images with its labels.

    Columns: condition ("whole", TAUGHT, and with `plain` TAUGHT without augmentation), networks (accuracies, per cent),
    seconds.
    """
    spec = resolve_record(random.record)

    def compute() -> list[dict]:
        data, start = dataset_of(spec, pick_device(device)), time.perf_counter()
        syn = random.synthetic.to(data.device)
        weights = generator(spec.seed, "fairness", "teacher")
        net = build(syn.backbone, data.shape, data.num_classes, weights).to(data.device)
        train_on(data, net, replace(syn.recipe, epochs=epochs, drops=(), tests=()), spec.seed)
        scores = [accuracy(net, data)]
        seconds = time.perf_counter() - start
        rows = [{"condition": "whole", "networks": scores, "seconds": seconds}]
        with torch.no_grad():
            answers = torch.cat([net(x) for x in syn.images.split(500)])
        syn = replace(syn, labels=answers if syn.recipe.loss == "mse" else answers.softmax(1))
        without = {TAUGHT + PLAIN: replace(syn.recipe, augment="none", cutmix=0.0)} if plain else {}
        for name, recipe in ({TAUGHT: syn.recipe} | without).items():
            found = evaluate(
                syn,
                data,
                networks=spec.run.networks,
                seed=spec.seed,
                recipe=recipe,
                compile=spec.run.compile,
                precision=spec.run.eval_precision,
            )
            rows.append(
                {"condition": name, "networks": list(found.accuracies), "seconds": found.seconds}
            )
        return rows

    return cached("teacher", spec, {"epochs": epochs, "plain": plain, "version": VERSION}, compute)


def conditions(
    run: Run,
    *,
    train: bool = True,
    epochs: int = 30,
    unseen: Iterable[str] = (),
    device: str = "auto",
) -> pd.DataFrame:
    """A run and its baselines under every condition: one row each, with the accuracies (per cent) of its networks.

    `unseen` are backbones that it was not distilled on, with one network each; `epochs` the passes of the teacher.
    Without `train` only what kept runs hold. Columns: method, dataset, ipc, profile, seed, labels, condition, networks.
    """
    scores, soft = run.record["accuracy"], run.synthetic.labels.is_floating_point()
    own = {"networks": len(scores["last"]["networks"]), "device": device}
    found = {
        "native": scores["last"],
        "best checkpoint": scores["best"].get("best", scores["best"]),
        "validation-selected": scores.get("selected"),
        HARD: None if soft else scores["last"],
    }
    real = {name: baseline(name, run, train=train, device=device) for name in ("random", "herding")}
    found |= {name: each.record["accuracy"]["last"] for name, each in real.items() if each}
    if train:
        pair = {"native": run, "random": real["random"]}
        augmented = run.synthetic.recipe.augment != "none"
        found |= {HARD: run.transfer(hard=True, **own)} if soft else {}
        taught = teacher(real["random"], epochs=epochs, plain=soft and augmented, device=device)
        found |= taught.set_index("condition").to_dict("index")
        if augmented:
            found |= {
                name + PLAIN: each.transfer(augment="none", **own) for name, each in pair.items()
            }
        found |= {
            f"{name} on {net}": each.transfer(net, networks=1, device=device)
            for net in unseen
            for name, each in pair.items()
        }
    facts = {key: run.record[key] for key in [*KEY, "seed"]}
    facts["labels"] = "soft" if soft else "hard"
    lists = {name: row["networks"] for name, row in found.items() if row}
    return pd.DataFrame(
        [facts | {"condition": name, "networks": each} for name, each in lists.items()]
    )


def scorecard(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `conditions`, a method's seeds together: accuracies in per cent; HLR, IOR, LRS and ARS as fractions,
    from the seeds that have every condition they need. One row per method, IPC and quantity, with `nested_bootstrap`'s
    columns and the counts of seeds and networks.

    Network k of a seed starts from the same weights under every condition, so scores are taken network by network.
    """
    lists: dict[tuple, list] = {}
    for key, one in rows.groupby([*KEY, "seed", "labels"], sort=False):
        a = {
            name: np.array(scores) / 100
            for name, scores in zip(one.condition, one.networks, strict=True)
        }
        rival = TAUGHT if key[-1] == "soft" else "random"
        real, hard, own, random, own_plain, random_plain = (
            a.get(name, np.full(1, math.nan))
            for name in ("whole", HARD, "native", rival, "native" + PLAIN, rival + PLAIN)
        )
        scores = {
            "HLR": hlr(real, hard),
            "IOR": ior(own, random),
            "LRS": lrs(real, hard, own, random),
            "ARS": ars(own, random, own_plain, random_plain),
        }
        for name, values in ({name: 100 * x for name, x in a.items()} | scores).items():
            if not np.isnan(values).any():
                lists.setdefault((*key[: len(KEY)], name), []).append(values.tolist())
    return pd.DataFrame(
        [
            dict(zip([*KEY, "quantity"], key, strict=True))
            | nested_bootstrap(found)
            | {"seeds": len(found), "networks": sum(map(len, found))}
            for key, found in lists.items()
        ]
    )
