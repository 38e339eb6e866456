"""In and out: sets written as the released codes write them are scored, exports come back, and no file runs code."""

import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError, generator
from ddlib.data.dataset import from_arrays
from ddlib.data.zca import ZCA
from ddlib.distilled import Synthetic
from ddlib.engine.record import Run
from ddlib.exchange.inward import import_set
from ddlib.exchange.outward import by_class, save_images, save_pt, tensor_dataset
from ddlib.report import look
from ddlib.report.card import card, of_file, of_folder, picture

NET = {"backbone": "convnet:width=4", "eval_epochs": 1, "eval_backbone": ""}
SIDE = 8
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def data():
    """CIFAR-10's name, classes and statistics on 40 random images."""
    draw = generator(0, "exchange")
    pixels = torch.randint(0, 256, (40, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    labels = torch.arange(10).repeat(4)
    return from_arrays(
        pixels[:30], labels[:30], pixels[30:], labels[30:], name="cifar10", device="cpu"
    )


@pytest.fixture
def images():
    return torch.randn(10, 3, SIDE, SIDE, generator=generator(1, "exchange"))


def whitened(data, kind):
    return replace(data, zca=ZCA.fit(data.images["train"], kind))


def scored(syn, data) -> float:
    return dd.evaluate(syn, data, networks=1).mean


# In


@pytest.mark.parametrize("method", ["dc", "dsa", "dm"])
def test_the_layout_of_dc_dsa_and_dm(tmp_path, data, images, method):
    labels = torch.arange(10)
    order = torch.randperm(10, generator=generator(2))
    saved = {
        "data": [[images + 1, labels], [images[order], labels[order]]],
        "accs_all_exps": {"ConvNet": [np.float64(0.26), np.float32(0.27)]},
    }
    path = tmp_path / f"res_{method.upper()}_CIFAR10_ConvNet_1ipc.pt"
    torch.save(saved, path)
    syn = import_set(path, data, **NET)
    assert torch.equal(syn.images, images) and torch.equal(syn.labels, labels)
    assert (syn.recipe.augment == "none") == (method == "dc") and syn.recipe.epochs == 2
    assert syn.spec["method"] == method and syn.spec["imported"]["file"] == path.name
    assert 0 <= scored(syn, data) <= 100
    first = import_set(tmp_path, data, experiment=0, **NET)
    assert torch.equal(first.images, images + 1)
    with pytest.raises(DDError, match="holds 2 experiments; experiment 5 is none of them"):
        import_set(path, data, experiment=5)
    with pytest.raises(DDError, match="experiment must be of type int, not 'last'"):
        import_set(path, data, experiment="last")


def test_the_layout_of_trajectory_matching(tmp_path, data, images):
    torch.save(images.clone().requires_grad_(), tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    with pytest.raises(DDError, match="does not hold the step size that ftd learned"):
        import_set(tmp_path, data, method="ftd", zca="", **NET)
    syn = import_set(tmp_path, data, method="ftd", zca="", lr=0.02, **NET)
    assert torch.equal(syn.images, images) and not syn.images.requires_grad
    assert syn.recipe.lr == 0.02 and 0 <= scored(syn, data) <= 100
    mtt = import_set(tmp_path / "images_best.pt", whitened(data, "mtt"), lr=0.02, **NET)
    assert (
        mtt.zca and mtt.spec["method"] == "mtt" and 0 <= scored(mtt, whitened(data, "mtt")) <= 100
    )
    with pytest.raises(DDError, match="the paper's mtt has zca mtt, cifar10 was loaded with none"):
        import_set(tmp_path, data, lr=0.02)


def test_trajectory_matching_normalises_cifar100_as_cifar10(tmp_path, data, images):
    """So its pixels are found by CIFAR-10's mean and std, which `data` has."""
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    hundred = replace(data, name="cifar100", mean=data.mean + 0.02, std=data.std * 1.3)
    syn = import_set(tmp_path, hundred, lr=0.02, zca="", **NET)
    wanted = (images * data.std + data.mean - hundred.mean) / hundred.std
    torch.testing.assert_close(syn.images, wanted)


def test_a_set_of_a_setting_that_no_paper_gives_is_imported_too(tmp_path, data, images):
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    other = replace(data, name="svhn")
    with pytest.raises(DDError, match="neither paper nor code gives"):
        dd.resolve("mtt", "svhn", 1, "paper")
    syn = import_set(tmp_path, other, lr=0.02, zca="", **NET)
    assert torch.equal(syn.images, images)


def test_datm_saves_logits_and_its_step_size(tmp_path, data, images):
    logits = torch.randn(10, 10, generator=generator(3))
    torch.save(images.clone().requires_grad_(), tmp_path / "images_best.pt")
    torch.save(logits.clone().requires_grad_(), tmp_path / "labels_best.pt")
    torch.save(torch.tensor(0.03), tmp_path / "lr_best.pt")
    syn = import_set(tmp_path, data, zca="", **NET)
    assert syn.spec["method"] == "datm" and syn.recipe.lr == pytest.approx(0.03)
    assert torch.allclose(syn.labels, logits.softmax(1)) and 0 <= scored(syn, data) <= 100
    torch.save(logits.softmax(1), tmp_path / "labels_best.pt")
    assert torch.allclose(import_set(tmp_path, data, zca="", **NET).labels, logits.softmax(1))
    torch.save(logits.half(), tmp_path / "labels_best.pt")
    assert torch.allclose(import_set(tmp_path, data, zca="", **NET).labels, syn.labels, atol=1e-2)
    for rate, message in (
        (0.0, "above 0"),
        (1e9, "'lr' must be 0 to 1000"),
        (10**400, "one number"),
    ):
        torch.save(rate, tmp_path / "lr_best.pt")
        with pytest.raises(DDError, match=message):
            import_set(tmp_path, data, zca="", **NET)


def test_tesla_saves_soft_labels_without_its_step_size(tmp_path, data, images):
    soft = torch.randn(10, 10, generator=generator(3)).softmax(1)
    torch.save(images.clone().requires_grad_(), tmp_path / "images_best.pt")
    torch.save(soft, tmp_path / "labels_best.pt")
    with pytest.raises(DDError, match="does not hold the step size that tesla learned"):
        import_set(tmp_path, data, zca="", **NET)
    syn = import_set(tmp_path, data, zca="", lr=0.02, **NET)
    assert syn.spec["method"] == "tesla" and syn.recipe.lr == 0.02
    assert torch.equal(syn.images, images) and torch.equal(syn.labels, soft)
    assert 0 <= scored(syn, data) <= 100


@pytest.mark.parametrize("method", [None, "dream"])
def test_the_layout_of_idc_and_dream(tmp_path, data, method):
    pixels = torch.rand(10, 3, SIDE, SIDE, generator=generator(4))
    torch.save([pixels, torch.arange(10)], tmp_path / "data_best.pt")
    syn = import_set(tmp_path, data, method=method, **NET)
    assert torch.allclose(syn.pixels(), pixels, atol=1e-6)
    assert syn.factor == 2 and len(syn.training_set()[0]) == 40 and 0 <= scored(syn, data) <= 100
    assert import_set(tmp_path, data, factor=1, **NET).factor == 1
    with pytest.raises(DDError, match="factor 5 does not fit images of 8x8 px"):
        import_set(tmp_path, data, factor=5)


def test_the_layout_of_frepo(tmp_path, data, images):
    labels = np.float32(np.eye(10) - 0.1)
    np.savez(tmp_path / "step000100.npz", image=images.permute(0, 2, 3, 1).numpy(), label=labels)
    white = whitened(data, "frepo")
    syn = import_set(tmp_path, white, **NET)
    assert torch.equal(syn.images, images) and np.array_equal(syn.labels.numpy(), labels)
    assert (syn.recipe.loss, syn.recipe.name, syn.zca) == ("mse", "frepo", white.zca.id)
    assert 0 <= scored(syn, white) <= 100


class Code:
    """What a hostile pickle does: run a command when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, data, images):
    marker = tmp_path / "ran"
    torch.save({"data": [[images, Code(marker)]]}, tmp_path / "res_DM_CIFAR10_ConvNet_1ipc.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Code(marker), protocol=2))
    np.savez(tmp_path / "step1.npz", image=np.array([Code(marker)], dtype=object), label=1)
    for name in ("res_DM_CIFAR10_ConvNet_1ipc.pt", "raw.pt"):
        with pytest.raises(DDError, match="more than tensors and plain values .*could run code"):
            import_set(tmp_path / name, data)
    with pytest.raises(DDError, match="not FRePo's .npz of plain arrays"):
        import_set(tmp_path / "step1.npz", data)
    assert not marker.exists()
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert marker.exists()  # the file was a live one


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(10, 3, 9, 9),
            torch.arange(10),
            r"are \[3, 9, 9\], those of cifar10 \[3, 8, 8\]",
        ),
        (
            torch.zeros(9, 3, 8, 8),
            torch.arange(9),
            "9 images of 9 classes, .* 10 classes of cifar10",
        ),
        (torch.zeros(11, 3, 8, 8), torch.arange(11) % 10, "as many images, and they have 1 to 2"),
        (torch.full((10, 3, 8, 8), torch.nan), torch.arange(10), "images of .* are not all finite"),
        (torch.zeros(10, 3, 8, 8), torch.zeros(10, 4), "10 images of 4 classes"),
        (
            torch.zeros(10, 3, 8, 8),
            torch.arange(9),
            r"labels of .* must be \[10\] or \[10, classes\]",
        ),
        (torch.zeros(10, 3, 8, 8), torch.arange(10) - 1, "must not be negative, as -1 is"),
        (
            torch.zeros(10, 3, 8, 8),
            torch.arange(10) * 2**40,
            "make at most as many classes, and the largest label is 9895604649984",
        ),
        (torch.zeros(10, 8, 8), torch.arange(10), r"must be \[n, 1 or 3, H, W\], not \[10, 8, 8\]"),
        (
            torch.zeros(1).expand(2**16, 3, 2**10, 2**10),
            torch.arange(2**16),
            "would fill more than 4 GiB: refused",
        ),
        (
            torch.zeros(2**20, 3, 8, 8)[:10],
            torch.zeros(1).expand(10, 2**40),
            "would fill more than 4 GiB: refused",
        ),
        (torch.eye(3).to_sparse(), torch.arange(3), "images and labels as two dense tensors"),
    ],
)
def test_sets_that_do_not_fit(tmp_path, data, images, labels, message):
    torch.save({"data": [[images, labels]]}, tmp_path / "res_DM_CIFAR10_ConvNet_1ipc.pt")
    with pytest.raises(DDError, match=message):
        import_set(tmp_path / "res_DM_CIFAR10_ConvNet_1ipc.pt", data)


def test_a_damaged_archive_of_arrays_is_one_sentence_or_harmless(tmp_path, data):
    path, images = tmp_path / "step1.npz", np.zeros((10, 8, 8, 3), np.float32)
    np.savez_compressed(path, image=images, label=np.eye(10, dtype=np.float32))
    whole, refused = path.read_bytes(), 0
    for at, byte in enumerate(whole):
        path.write_bytes(whole[:at] + bytes([byte ^ 0xFF]) + whole[at + 1 :])
        try:
            import_set(path, data)
        except DDError:
            refused += 1
    assert refused > len(whole) / 2


def test_unknown_layouts(tmp_path, data):
    with pytest.raises(DDError, match="there is no file or folder"):
        import_set(tmp_path / "nothing", data)
    with pytest.raises(DDError, match="holds no published set; known are DC's"):
        import_set(tmp_path, data)
    torch.save({"state_dict": {}}, tmp_path / "net.pt")
    (tmp_path / "set.h5").write_bytes(b"x")
    for name in ("net.pt", "set.h5"):
        with pytest.raises(DDError, match="has no known layout; known are"):
            import_set(tmp_path / name, data)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:200])
    with pytest.raises(DDError, match="cut.pt"):
        import_set(tmp_path / "cut.pt", data)
    torch.save(torch.zeros(10, 3, SIDE, SIDE), tmp_path / "images_1.pt")
    with pytest.raises(DDError, match="needs its labels beside it, in labels_1.pt"):
        import_set(tmp_path / "images_1.pt", data)


# Out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """IDC's set on the digits, whose images hold four tiles each."""
    return dd.run(
        "idc",
        "digits",
        ipc=1,
        device="cpu",
        progress=False,
        results=tmp_path_factory.mktemp("exchange"),
        iterations=0,
        networks=1,
        eval_epochs=1,
        factor=2,
    )


def test_a_set_becomes_an_image_folder(tmp_path, run):
    syn = run.synthetic
    folder = save_images(syn, tmp_path / "out")
    tree = ImageFolder(folder)
    assert tree.classes == list(syn.classes) and len(tree) == 10 * syn.factor**2
    images, labels = by_class(syn)
    assert tree.targets == labels.tolist()
    pixels = syn.pixels(images=images)[:, 0]
    read = torch.stack([torch.from_numpy(np.array(image)[..., 0]) for image, _ in tree]) / 255
    assert torch.allclose(read, pixels, atol=0.5 / 255 + 1e-6)
    facts = json.loads((folder / "set.json").read_text())
    assert facts["recipe"]["name"] == "idc" and facts["labels"] == "the folders"
    again = dd.load(f"folder:{folder}", device="cpu", resolution=8)  # ddlib's own reader too
    assert again.classes == syn.classes and again.shape == (1, 8, 8)
    with pytest.raises(DDError, match="'.' names no folder: name a new or an empty one"):
        save_images(syn, ".")
    with pytest.raises(DDError, match="out holds other files: name a new or an empty folder"):
        save_images(syn, tmp_path / "out")


def test_soft_labels_stand_in_a_table_and_class_folders_keep_their_order(tmp_path, data, images):
    syn = Synthetic.of(data, images, torch.eye(10) / 2, dd.protocol("dsa"), "convnet")
    syn = replace(syn, classes=("zebra", "a/b", *"zyxwvuts"))
    folder = save_images(syn, tmp_path / "out")
    assert ImageFolder(folder).classes[:2] == ["0_zebra", "1_a_b"]
    rows = (folder / "labels.csv").read_text().splitlines()
    assert rows[1].startswith("0_zebra/0000.png,0.5,0.0") and len(rows) == 11
    white = replace(syn, zca="0123456789ab")
    with pytest.raises(DDError, match="pass its dataset"):
        save_images(white, tmp_path / "white")
    assert not (tmp_path / "white").exists()


def test_a_whitened_set_becomes_pictures_by_the_look_beside_it(tmp_path, monkeypatch, capsys):
    (path,) = RESULTS.glob("small/frepo/*.look.safetensors")
    kept = Run(path.with_name(path.name.replace(".look.safetensors", ".json")))
    file = kept.path.with_suffix(".safetensors")
    words = ["ddlib", "export", str(file), "--to", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 0
    read = [np.array(image) for image, _ in ImageFolder(tmp_path / "out")]
    seen = look.load(kept)["pixels"].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(read), seen)
    alone = shutil.copy(file, tmp_path)  # neither data nor a look
    monkeypatch.setattr(sys, "argv", ["ddlib", "export", str(alone), "--to", str(tmp_path / "no")])
    assert cli.main() == 2 and "no look is kept beside it" in capsys.readouterr().err


def test_one_pt_file_of_plain_tensors(tmp_path, run):
    syn = run.synthetic
    path = save_pt(syn, tmp_path / "set.pt")
    content = torch.load(path, weights_only=True)
    images, _ = by_class(syn)
    assert torch.equal(content["images"], images) and content["recipe"]["name"] == "idc"
    assert len(tensor_dataset(syn)) == 40 and torch.equal(tensor_dataset(syn)[5][0], images[5])
    digits = dd.load("digits", device="cpu")
    again = import_set(path, digits)
    assert torch.equal(again.training_set()[0], images) and again.recipe == syn.recipe
    assert 0 <= scored(again, digits) <= 100
    with pytest.raises(DDError, match="cannot be used with cifar10"):
        import_set(path, replace(digits, name="cifar10", classes=digits.classes[:5]))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("recipe", {"epochs": -1}, "'epochs' must be 1 to 1000000, not -1"),
        ("recipe", {"epochs": 10**12}, "'epochs' must be 1 to 1000000"),
        ("recipe", {"loss": "x"}, "unknown recipe loss 'x'"),
        ("recipe", {"lr": float("nan")}, "'lr' must be a finite number"),
        ("recipe", {"drops": ["x"]}, "'drops' must be tuple"),
        ("recipe", {"augment": "blur"}, "blur"),
        ("recipe", {"speed": 1}, "unknown recipe key 'speed'"),
        ("mean", torch.zeros(1), r"mean must be finite float32 \[1, 1, 1\]"),
        ("spec", "[]", r"spec must be of type dict, not \[\]"),
        ("spec", '{"values": 1}', "the values of spec must be of type dict, not 1"),
    ],
)
def test_a_pt_file_is_held_to_what_a_set_of_ours_is(tmp_path, run, part, change, message):
    path = save_pt(run.synthetic, tmp_path / "set.pt")
    content = torch.load(path, weights_only=True)
    content[part] = content[part] | change if part == "recipe" else change
    torch.save(content, path)
    with pytest.raises(DDError, match=f"the distilled set .* makes no sense: .*{message}"):
        import_set(path, "digits", device="cpu")


def test_the_command_line_goes_out_and_in(tmp_path, run, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ddlib", *map(str, words)])
        return cli.main(), capsys.readouterr()

    file = run.path.with_suffix(".safetensors")
    assert call("export", file, "--to", tmp_path / "a.pt")[0] == 0
    assert call("export", file, "--to", tmp_path / "pictures")[0] == 0
    assert "ImageFolder" in (tmp_path / "pictures" / "README.md").read_text()
    assert call("export", file, "--to", tmp_path / "pictures")[0] == 2
    words = ("--dataset", "digits", "--out", tmp_path / "b.safetensors")
    code, text = call("import", tmp_path / "a.pt", *words)
    assert code == 0 and "40 images, 4 per class, idc protocol" in text.out
    code, text = call("card", file)
    assert code == 0 and text.out == card(run)
    code, text = call("card", tmp_path / "b.safetensors")
    assert code == 0 and "Read from `a.pt`, SHA-256 `" in text.out
    assert call("card", file, "--out", tmp_path / "c.md")[0] == 0
    assert "![The images, a column a class](c.png)" in (tmp_path / "c.md").read_text()
    assert Image.open(tmp_path / "c.png").size == (640, 64)  # ten classes of 8 px, enlarged
    (tmp_path / "d.safetensors").write_bytes(file.read_bytes())
    code, text = call("card", tmp_path / "d.safetensors")  # a run's, whose record is lost
    assert code == 2 and text.err.startswith(
        "ddlib: a card needs the set's record, and there is no"
    )


def test_an_exported_folder_has_a_card_whose_pictures_are_its_own_files(tmp_path, run):
    folder = save_images(run.synthetic, tmp_path / "pictures")
    text = of_folder(run)
    shown = re.findall(r'src="([^"]+)"', text)
    assert len(shown) == 10 and all((folder / file).is_file() for file in shown)
    assert "ImageFolder" in text and card(run).split("## Use it")[0].split("## What")[1] in text
    alone = of_folder(run.synthetic)  # the set without its record
    assert "Not known: no record lies beside the set" in alone
    strange = replace(run.synthetic, spec={"imported": 1, "profile": "small"})
    assert "no record lies beside it" in card(strange)
    with pytest.raises(DDError, match="pictures must be of type str, not 1"):
        card(run, pictures=1)


def test_the_picture_of_a_whitened_set_needs_its_look(data, images):
    zca = whitened(data, "mtt")
    syn = Synthetic.of(zca, images, torch.arange(10), dd.protocol("mtt"), "convnet")
    assert picture(syn) is None and picture(replace(syn, zca=None)).startswith(b"\x89PNG")


# Cards


def test_a_card_says_what_how_well_at_what_cost_and_whose_data(run):
    text = card(run)
    front, body = text.split("---\n")[1:]
    assert "license: cc-by-4.0" in front and "dataset-distillation" in front
    last = run.record["accuracy"]["last"]
    assert f"| after the last step ({last['step']}) | {last['mean']:.1f} ± " in body
    assert "Each stored image holds 4 tiles" in body and "`idc` protocol" in body
    assert run.record["dataset_checksum"][:12] in body and "UCI" in body


def test_a_card_needs_a_record(tmp_path):
    (tmp_path / "set.safetensors").write_bytes(b"")
    with pytest.raises(DDError, match="a card needs the set's record, and there is no"):
        of_file(tmp_path / "set.safetensors")


def test_a_card_of_a_set_that_lies_anywhere(run, tmp_path, monkeypatch):
    for path in (run.path, run.path.with_suffix(".safetensors")):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert card(of_file(run.path.with_suffix(".safetensors").name)) == card(run)
    assert Run("/set.json").results == Run("/one/set.json").results == Path("/")
