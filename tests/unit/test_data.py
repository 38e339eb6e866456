"""Datasets: every source, the decode cache, normalisation and ZCA, class-wise sampling, and the error messages."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils._python_dispatch import TorchDispatchMode

from ddlib.core import DDError, checksum
from ddlib.data import cache as decoding
from ddlib.data import dataset as data
from ddlib.data import folders
from ddlib.data.zca import KINDS, ZCA
from ddlib.files import save_tensors


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """The real images' folder, if any, is handed on; everything else stays below tmp_path."""
    real = os.environ.get("DDLIB_DATA")
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DDLIB_DATA", str(tmp_path / "data"))
    return real


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


def tree(
    root: Path, splits=("train", "test"), classes=("cat", "dog"), n: int = 3, **options
) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for i in range(n):
                picture(root / split / name / f"{i}.png", 100 * s + 10 * c + i, **options)
    return root


def load(name: str, **options) -> data.Dataset:
    return data.load(name, device="cpu", **options)


def small(n: int = 40, shape=(3, 4, 4), classes: int = 4, seed: int = 0) -> data.Dataset:
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (n, *shape), dtype=np.uint8)
    return data.from_arrays(
        images, np.arange(n) % classes, images[:6], np.arange(6) % classes, device="cpu"
    )


# --- digits and the tensors of a dataset


def test_the_digits_are_scikit_learns():
    one, wanted = load("digits"), load_digits()
    pixels, labels = torch.cat([*one.images.values()]), torch.cat([*one.labels.values()])
    found = torch.cat([pixels.flatten(1).double() * 16 / 255, labels[:, None]], 1).round()
    rows = torch.as_tensor(np.c_[wanted.data, wanted.target])
    assert sorted(found.tolist()) == sorted(rows.tolist())


def test_digits_without_scikit_learn_are_one_sentence(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(DDError, match="the digits come with scikit-learn, which is not installed"):
        load("digits")


def test_digits_split_is_fixed_and_stratified():
    one, two = load("digits"), load("digits")
    assert one.shape == (1, 8, 8) and one.num_classes == 10 and one.device.type == "cpu"
    assert {s: len(x) for s, x in one.images.items()} == {"train": 1297, "test": 500}
    assert one.images["train"].dtype == torch.uint8 and int(one.images["train"].max()) == 255
    assert one.labels["train"].dtype == torch.int64
    assert (one.class_sizes("test") - 50).abs().max() <= 2
    assert one.checksum == two.checksum and len(one.checksum) == 64
    x = one.images["train"].double() / 255
    assert torch.allclose(one.mean.double(), x.mean(), atol=1e-6)
    assert torch.allclose(one.std.double(), x.std(correction=0), atol=1e-6)


def test_normalise_is_inverted_and_takes_both_pixel_types():
    d = small()
    pixels = d.images["train"][:5]
    x = d.normalise(pixels)
    assert x.dtype == torch.float32
    assert torch.allclose(x, (pixels.float() / 255 - d.mean) / d.std)
    assert torch.allclose(d.normalise(pixels.double() / 255), x, atol=1e-6)
    assert torch.allclose(d.denormalise(x), pixels.float() / 255, atol=1e-6)
    assert d.denormalise(x + 100).max() == 1
    with pytest.raises(DDError, match="uint8"):
        d.normalise(pixels.long())


def test_batch_takes_an_index_of_any_shape():
    d = small()
    index = torch.tensor([[3, 1, 2], [0, 0, 7]])
    got = d.batch("train", index)
    assert got.shape == (2, 3, 3, 4, 4)
    assert torch.equal(got[1, 2], d.normalise(d.images["train"][7]))
    assert torch.equal(d.batch("test", slice(2, 4)), d.batch("test", [2, 3]))
    with pytest.raises(DDError, match="unknown split 'dev'"):
        d.batch("dev", [0])


def test_sample_draws_each_class_without_replacement():
    d = small(43, classes=4)  # uneven: 11, 11, 11, 10
    draw = torch.Generator().manual_seed(1)
    rows = d.sample(10, draw)
    assert rows.shape == (4, 10) and rows.dtype == torch.int64
    assert torch.equal(d.labels["train"][rows], torch.arange(4)[:, None].expand(4, 10))
    assert all(len(set(row.tolist())) == 10 for row in rows)
    assert set(rows[3].tolist()) == set((d.labels["train"] == 3).nonzero().flatten().tolist())
    some = d.sample(3, draw, classes=[2, 0])
    assert d.labels["train"][some].tolist() == [[2] * 3, [0] * 3]
    again = d.sample(10, torch.Generator().manual_seed(1))
    assert torch.equal(again, rows) and not torch.equal(d.sample(10, draw), rows)
    with pytest.raises(DDError, match="0 to 10 is possible"):
        d.sample(11, draw)
    assert d.sample(11, draw, classes=torch.tensor([0])).shape == (1, 11)
    with pytest.raises(DDError, match=r"0\.\.3"):
        d.sample(1, draw, classes=[4])


def test_sample_is_uniform():
    d = small(40, classes=2)
    draw = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.cat([d.sample(5, draw).flatten() for _ in range(800)]), minlength=40
    )
    assert (counts - 200).abs().max() < 60  # binomial(800, 1/4): std 12


def test_minival_carves_a_stratified_share():
    d = load("digits")
    m = d.minival(0.1, seed=3)
    assert set(m.images) == {"train", "val", "test"} and m.checksum != d.checksum
    assert len(m.images["train"]) + len(m.images["val"]) == 1297 and torch.equal(
        m.images["test"], d.images["test"]
    )
    assert (m.class_sizes("val").double() / d.class_sizes("train") - 0.1).abs().max() < 0.005
    both = torch.cat([m.images["train"], m.images["val"]]).flatten(1)
    assert torch.equal(
        both.double().sort(0).values, d.images["train"].flatten(1).double().sort(0).values
    )
    same, other = d.minival(0.1, seed=3), d.minival(0.1, seed=4)
    assert torch.equal(same.images["val"], m.images["val"]) and not torch.equal(
        other.images["val"], m.images["val"]
    )
    with pytest.raises(DDError, match="between 0 and 1"):
        d.minival(1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: d.normalise("x"),
            r"pixels of digits must be a tensor \[..., 1, 8, 8\], not 'x'",
        ),
        (lambda d: d.denormalise(torch.zeros(3)), r"images of digits must be a tensor \[..., 1, 8"),
        (lambda d: d.batch("test", "x"), "rows must be integers, not 'x'"),
        (lambda d: d.batch("test", [0.5]), r"rows must be integers, not \[0.5\]"),
        (
            lambda d: d.sample(1, torch.Generator(), classes=[0.5]),
            r"classes must be integers, not \[0.5\]",
        ),
        (lambda d: d.batch("test", [10**9]), "rows of test must be integers from 0 to"),
        (lambda d: d.sample("x", torch.Generator()), "n must be an integer of at least 0, not 'x'"),
        (lambda d: d.sample(1, 0), "generator must be of type Generator, not 0"),
        (
            lambda d: d.sample(1, torch.Generator(), classes="x"),
            "classes must be integers, not 'x'",
        ),
        (lambda d: d.minival("x"), "fraction must be of type int or float, not 'x'"),
        (lambda d: d.subset(1, "x"), "seed must be an integer of at least 0, not 'x'"),
    ],
)
def test_odd_arguments_are_named(call, message):
    with pytest.raises(DDError, match=message):
        call(load("digits"))


def test_images_too_large_for_the_device_stay_and_batches_move(monkeypatch):
    d = small()
    free = 2 * sum(x.nbytes for x in d.images.values()) - 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    assert data._place(d.images, torch.device("cuda"))["train"] is d.images["train"]


@pytest.mark.gpu
def test_cuda_gives_the_same_draws_and_pixels(monkeypatch):
    d = load("digits")
    for free in (10**12, 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        g = d.to("cuda")
        assert g.images["train"].is_cuda == (free > 1) and g.device.type == "cuda"
        rows = g.sample(3, torch.Generator().manual_seed(0))
        assert rows.is_cuda and torch.equal(
            rows.cpu(), d.sample(3, torch.Generator().manual_seed(0))
        )
        assert torch.allclose(g.batch("train", rows).cpu(), d.batch("train", rows.cpu()))


# --- your own arrays


def test_from_arrays_takes_every_layout():
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2])
    first = data.from_arrays(images, labels, images, labels, device="cpu", classes=["a", "b", "c"])
    assert first.classes == ("a", "b", "c") and first.shape == (3, 5, 4) and first.name == "arrays"
    last = data.from_arrays(
        images.transpose(0, 2, 3, 1), labels, torch.from_numpy(images), labels, device="cpu"
    )
    floats = data.from_arrays(
        images / 255, torch.from_numpy(labels).int(), images, labels, device="cpu"
    )
    assert first.checksum == last.checksum == floats.checksum
    grey = data.from_arrays(images[:, 0], labels, images[:0, 0], labels[:0], device="cpu")
    assert grey.shape == (1, 5, 4) and len(grey.images["test"]) == 0
    images[:] = 0
    assert first.images["train"].any(), "the arrays must be copied"


GOOD, Y = np.zeros((4, 3, 5, 5), np.uint8), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("train", "labels", "test", "match"),
    [
        (np.zeros((4, 75), np.uint8), Y, GOOD, r"train images must be \[N,H,W\]"),
        (np.zeros((4, 5, 5, 5), np.uint8), Y, GOOD, "C of 1 or 3"),
        (np.zeros((4, 3, 5, 3), np.uint8), Y, GOOD, "could be"),
        (np.full((4, 3, 5, 5), np.nan), Y, GOOD, "NaN"),
        (np.full((4, 3, 5, 5), 7.0), Y, GOOD, r"lie in \[0,1\], not 7\.\.7; divide by 255"),
        (np.full((4, 3, 5, 5), -0.5), Y, GOOD, r"lie in \[0,1\]"),
        (np.zeros((4, 3, 5, 5), np.int32), Y, GOOD, "uint8 or float"),
        (GOOD, Y, np.zeros((4, 3, 6, 5), np.uint8), "share one shape"),
        (GOOD, np.array([0, 1, 0]), GOOD, r"shape \[4\]"),
        (GOOD, np.eye(4), GOOD, "integers"),
        (GOOD, np.array([0, 1, 0, -1]), GOOD, r"train labels must lie in 0\.\.1"),
        (GOOD, np.array([0, 2, 0, 2]), GOOD, "1 have none: 1"),
        (GOOD, np.array([0, 0, 0, 0]), GOOD, r"test labels must lie in 0\.\.0"),
        (GOOD[:0], Y[:0], GOOD, "train split is empty"),
    ],
)
def test_from_arrays_says_what_is_wrong(train, labels, test, match):
    with pytest.raises(DDError, match=match):
        data.from_arrays(train, labels, test, Y, device="cpu")


# --- folders of images


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_with_two_splits(tmp_path, test):
    root = tree(tmp_path / "data" / "pets", ("train", test))
    d = load("folder:pets")
    assert (
        d.name == "folder:pets" and data.canonical(d.name) == "pets" and d.classes == ("cat", "dog")
    )
    assert d.images["train"].shape == (6, 3, 8, 8) and d.labels["test"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    want = np.asarray(Image.open(root / test / "dog" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(d.images["test"][4].numpy(), want)
    assert load(f"folder:{root}").checksum == d.checksum
    assert (
        d.checksum
        == data.from_arrays(
            d.images["train"], d.labels["train"], d.images["test"], d.labels["test"], device="cpu"
        ).checksum
    )


def test_relative_path_is_looked_up_below_the_root_then_here(tmp_path, monkeypatch):
    tree(tmp_path / "here" / "pets", n=2)
    monkeypatch.chdir(tmp_path / "here")
    assert len(load("folder:pets").images["train"]) == 4
    tree(tmp_path / "data" / "pets", n=3)
    assert len(load("folder:pets").images["train"]) == 6
    assert len(load("folder:pets", root=tmp_path / "here").images["train"]) == 4


@pytest.mark.parametrize("splits", [("train",), (".",)])
def test_folder_without_test_split_is_carved_the_same_each_time(tmp_path, splits):
    root = tree(tmp_path / "pets", splits, n=10)
    picture(root / splits[0] / "yak" / "0.png")  # a single image: stays in train
    one, two = load(f"folder:{root}"), load(f"folder:{root}")
    assert one.class_sizes("train").tolist() == [8, 8, 1] and one.class_sizes("test").tolist() == [
        2,
        2,
        0,
    ]
    assert one.checksum == two.checksum
    both = torch.cat([one.images["train"], one.images["test"]]).flatten(1)
    assert len(both.unique(dim=0)) == 21 - 1  # the yak's picture is also the first cat's: seed 0


def test_one_image_a_class_gives_an_empty_test_split(tmp_path):
    d = load(f"folder:{tree(tmp_path / 'one', ('train',), ('a', 'b', 'c'), n=1)}")
    assert d.images["train"].shape == (3, 3, 8, 8) and d.images["test"].shape == (0, 3, 8, 8)
    assert d.class_sizes("test").tolist() == [0, 0, 0] and d.batch("test", []).shape == (0, 3, 8, 8)


def test_grey_images_keep_one_channel_unless_one_is_coloured(tmp_path):
    root = tree(tmp_path / "grey", mode="L")
    assert load(f"folder:{root}").shape == (1, 8, 8)
    picture(root / "test" / "dog" / "2.png")
    assert load(f"folder:{root}").shape == (3, 8, 8)


def test_resolution_resizes_the_shorter_side_and_crops_as_torchvision_does(tmp_path):
    sizes = [(31, 20), (20, 33), (7, 9), (16, 16)]
    paths = [
        picture(tmp_path / "mix" / "train" / "ab"[i % 2] / f"{i}.png", i, size)
        for i, size in enumerate(sizes)
    ]
    paths = paths[::2] + paths[1::2]
    tree(tmp_path / "mix", ("test",), "ab", n=1)
    d = load(f"folder:{tmp_path / 'mix'}", resolution=12)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(12), torchvision.transforms.CenterCrop(12)]
    )
    for got, path in zip(d.images["train"], paths, strict=True):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(transform(Image.open(path))))


def test_folder_errors_name_the_culprit(tmp_path, monkeypatch):
    with pytest.raises(DDError, match="no folder .*nowhere.*PATH/train/CLASS"):
        load("folder:nowhere")
    with pytest.raises(DDError, match="needs a path"):
        load("folder:")
    (tmp_path / "void").mkdir()
    with pytest.raises(DDError, match="holds no class folders"):
        load(f"folder:{tmp_path / 'void'}")
    flat = tmp_path / "flat"
    picture(flat / "train" / "0.png"), picture(flat / "test" / "0.png")
    with pytest.raises(DDError, match="holds no class folders"):
        load(f"folder:{flat}")
    with pytest.raises(DDError, match="one class folder 'cat'"):
        load(f"folder:{tree(tmp_path / 'single', classes=['cat'])}")

    root = tree(tmp_path / "pets")
    (root / "train" / "eel").mkdir()
    with pytest.raises(DDError, match="train/ and test/ must hold the same class folders.*eel"):
        load(f"folder:{root}")
    (root / "test" / "eel").mkdir()
    with pytest.raises(DDError, match="train/eel holds no image"):
        load(f"folder:{root}")
    (root / "train" / "eel").rmdir(), (root / "test" / "eel").rmdir()

    odd = picture(root / "train" / "dog" / "9.png", size=(8, 9))
    with pytest.raises(
        DDError, match=r"train/cat/0.png is 8x8 and .*train/dog/9.png is 8x9; give a resolution"
    ):
        load(f"folder:{root}")
    odd.write_bytes((root / "train" / "cat" / "0.png").read_bytes()[:100])
    with pytest.raises(DDError, match="cannot decode the image .*train/dog/9.png"):
        load(f"folder:{root}")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(odd)
    with pytest.raises(DDError, match="9.png has more than 8 bits"):
        load(f"folder:{root}")
    odd.unlink()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_file() and p.name[0] == "."], (
        "temporary files must not stay behind"
    )

    listed = os.listdir

    def refuse(path):
        if str(path).endswith("test/dog"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DDError, match="cannot read the folder .*test/dog: Permission denied"):
        load(f"folder:{root}")


def test_truncated_jpeg_is_named(tmp_path):
    root = tree(tmp_path / "pets")
    bad = picture(root / "test" / "cat" / "7.jpg", size=(64, 64))
    bad.write_bytes(bad.read_bytes()[:-900])
    with pytest.raises(DDError, match="cannot decode the image .*7.jpg"):
        load(f"folder:{root}", resolution=8)


# --- the decode cache


def decodes(monkeypatch) -> list:
    calls, pixels = [], decoding._pixels
    monkeypatch.setattr(
        decoding, "_pixels", lambda path, *rest: (calls.append(path), pixels(path, *rest))[1]
    )
    return calls


def test_images_are_decoded_once_and_again_when_the_folder_changes(tmp_path, monkeypatch):
    calls = decodes(monkeypatch)
    name = f"folder:{tree(tmp_path / 'pets')}"
    one = load(name)
    assert len(calls) == 12
    two = load(name)
    assert len(calls) == 12 and two.checksum == one.checksum
    assert torch.equal(two.images["train"], one.images["train"])
    note = json.loads(next((tmp_path / "cache").glob("pets-train-*.json")).read_text())
    assert note["files"][3] == "train/dog/0.png" and note["labels"] == [0] * 3 + [1] * 3
    assert note["classes"] == ["cat", "dog"] and note["sha256"] == checksum(one.images["train"])
    load(name, resolution=4)
    assert len(calls) == 24
    picture(tmp_path / "pets" / "train" / "cat" / "0.png", seed=77)
    os.utime(tmp_path / "pets" / "train" / "cat" / "0.png", ns=(1, 1))
    assert (
        load(name).checksum != one.checksum and len(calls) == 30
    )  # train anew, test from the cache


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("harm", ["flip", "cut", "header", "note"])
def test_a_damaged_cache_is_named_and_rebuilt(tmp_path, monkeypatch, harm, sampled):
    if sampled:
        monkeypatch.setattr(decoding, "LARGE", 0)
    name = f"folder:{tree(tmp_path / 'pets')}"
    good = load(name)
    path = next((tmp_path / "cache").glob("pets-train-*.npy"))
    whole = path.read_bytes()
    if harm == "flip":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(whole[:-50])
    elif harm == "header":
        path.write_bytes(whole.replace(b"}", b" ", 1))
    else:
        path.with_suffix(".json").write_text("{")
    with pytest.warns(UserWarning, match=f"{path.name} are damaged and are built again"):
        again = load(name)
    assert again.checksum == good.checksum and path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(name)


@pytest.mark.parametrize("harm", ["", "flip", "torn", "no checksums"])
def test_a_stopped_decoding_goes_on_behind_the_last_whole_block(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(decoding, "_BATCH", 2)
    name = f"folder:{tree(tmp_path / 'pets')}"
    whole = load(name)
    path = next((tmp_path / "cache").glob("pets-train-*.npy"))
    expected, count = path.read_bytes(), len(whole.images["train"])
    shutil.rmtree(tmp_path / "cache")
    real, calls = decoding._pixels, []

    def stopped(file, *rest):
        calls.append(file)
        if len(calls) > 4:  # in the third block
            raise KeyboardInterrupt
        return real(file, *rest)

    monkeypatch.setattr(decoding, "_pixels", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(name)
    part, sums = (path.with_name(f"{path.name}.{ending}") for ending in ("part", "done"))
    assert not path.exists() and len(sums.read_bytes()) == 2 * 32
    pixels = part.read_bytes()
    if harm == "flip":
        part.write_bytes(pixels[:-1] + bytes([pixels[-1] ^ 1]))
    elif harm == "torn":
        part.write_bytes(pixels[:-1])
    elif harm == "no checksums":
        sums.unlink()

    calls.clear()
    monkeypatch.setattr(
        decoding, "_pixels", lambda file, *rest: (calls.append(file), real(file, *rest))[1]
    )
    assert load(name).checksum == whole.checksum and path.read_bytes() == expected
    kept = {"": 4, "flip": 2, "torn": 2, "no checksums": 0}[harm]
    assert len([file for file in calls if "train" in file.parts]) == count - kept
    assert not part.exists() and not sums.exists()


def test_without_locks_no_two_decodings_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "lock", lambda *work: nullcontext(False))
    places, write = [], decoding._write_images

    def noted(to, path, *rest):
        places.append(path)
        write(to, path, *rest)

    monkeypatch.setattr(decoding, "_write_images", noted)
    name = f"folder:{tree(tmp_path / 'pets')}"
    for _ in range(2):
        load(name)
        for path in (tmp_path / "cache").glob("*.npy"):
            path.unlink()
    assert len(set(places)) == len(places) == 4
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".json"}


def test_rows_of_a_large_split_are_asked_for_before_they_are_read(tmp_path, monkeypatch):
    d = load(f"folder:{tree(tmp_path / 'pets')}")
    images, asked = d.images["train"], []
    wanted = d.batch("train", [5, 0])

    def madvise(start, length, advice):
        asked.append((start.value, length.value, advice))

    library = SimpleNamespace(madvise=madvise)
    monkeypatch.setattr(decoding.ctypes, "CDLL", lambda name: library)
    assert torch.equal(d.batch("train", [5, 0]), wanted) and not asked
    monkeypatch.setattr(decoding, "LARGE", 0)
    assert torch.equal(d.batch("train", [5, 0]), wanted)
    for row, (start, length, advice) in zip([5, 0], asked, strict=True):
        first = images[row].data_ptr()
        assert start <= first < start + mmap.PAGESIZE and not start % mmap.PAGESIZE
        assert start + length == first + images[row].nbytes
        assert advice == mmap.MADV_WILLNEED


def test_splits_are_memory_mapped_and_are_never_rewritten(tmp_path, monkeypatch):
    name = f"folder:{tree(tmp_path / 'pets')}"
    for _ in range(2):  # fresh, then from the cache
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            d = load(name)
        path = next((tmp_path / "cache").glob("pets-train-*.npy"))
        before = path.read_bytes()
        d.images["train"].zero_()
        assert path.read_bytes() == before
    assert load(name).images["train"].any()


def test_unwritable_cache_decodes_in_memory(tmp_path, monkeypatch):
    name = f"folder:{tree(tmp_path / 'pets')}"
    good = load(name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot write the decode cache") as seen:
        d = load(name, zca="mtt")
    assert len(seen) == 2  # one a split, and no word of damage
    assert d.checksum == good.checksum and d.zca is not None
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.warns(UserWarning, match="free space"):
        assert load(name).checksum == good.checksum and not list((tmp_path / "full").iterdir())


# --- ImageNet-1K, its subsets, Tiny ImageNet


@pytest.fixture
def imagenet(tmp_path):
    root, used = tmp_path / "data" / "imagenet1k", folders.SUBSETS["imagewoof"]
    for split in ("train", "val"):
        for i in range(1000):
            (root / split / f"n{i:08d}").mkdir(parents=True)
        for i in used:
            picture(root / split / f"n{i:08d}" / "x.JPEG", i, (20, 16))
    return root


def test_imagenet_subset_keeps_the_order_of_its_list(imagenet):
    d = load("imagewoof", resolution=8)
    assert d.classes[:2] == ("n00000193", "n00000182") and d.labels["train"].tolist() == list(
        range(10)
    )
    assert d.images["train"].shape == d.images["test"].shape == (10, 3, 8, 8)
    assert torch.allclose(d.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    assert load("imagewoof").shape == (3, 128, 128)
    with pytest.raises(DDError, match="train/n00000000 holds no image"):
        load("imagenette")
    (imagenet / "train" / "n00000999").rmdir()
    with pytest.raises(DDError, match="1,000 class folders .* holds 999"):
        load("imagewoof")


def test_imagenet1k_takes_all_classes(tmp_path):
    tree(tmp_path / "data" / "imagenet1k", ("train", "val"), ("n2", "n1"), size=(70, 66))
    d = load("imagenet1k")
    assert d.classes == ("n1", "n2") and d.shape == (3, 64, 64) and len(d.images["test"]) == 6
    with pytest.raises(DDError, match=r"tinyimagenet needs .*val_annotations.txt"):
        load("tinyimagenet")


def test_imagenet_missing_split_says_the_layout(tmp_path):
    with pytest.raises(DDError, match=r"imagenette needs .*imagenet1k/train/WNID/\*\.JPEG"):
        load("imagenette")


def test_tiny_imagenet_in_both_layouts_is_the_same(tmp_path):
    stock, plain = tmp_path / "stock" / "tinyimagenet", tmp_path / "plain" / "tinyimagenet"
    rows = []
    for c, wnid in enumerate(["n01", "n02"]):
        (stock / "train" / wnid).mkdir(parents=True)
        (stock / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
        for i in range(2):
            picture(stock / "train" / wnid / "images" / f"{i}.JPEG", 10 * c + i, (64, 64))
            picture(plain / "train" / wnid / f"{i}.JPEG", 10 * c + i, (64, 64))
            picture(stock / "val" / "images" / f"{c}{i}.JPEG", 100 * c + i, (64, 64))
            picture(plain / "val" / wnid / f"{c}{i}.JPEG", 100 * c + i, (64, 64))
            rows.append(f"{c}{i}.JPEG\t{wnid}\t0\t0\t62\t62")
    notes = stock / "val" / "val_annotations.txt"
    notes.write_text("\n".join(rows) + "\n")
    one, two = (load("tinyimagenet", root=tmp_path / layout) for layout in ("stock", "plain"))
    assert (
        one.checksum == two.checksum and one.classes == ("n01", "n02") and one.shape == (3, 64, 64)
    )
    assert one.labels["test"].tolist() == [0, 0, 1, 1]
    notes.write_text("\n".join([*rows, "gone.JPEG\tn01\t0"]))
    with pytest.raises(DDError, match="gone.JPEG, which cannot be read"):
        load("tinyimagenet", root=tmp_path / "stock")
    notes.write_text("\n".join([*rows, "00.JPEG\tn77\t0"]))
    with pytest.raises(DDError, match="same class folders.*n77"):
        load("tinyimagenet", root=tmp_path / "stock")


# --- torchvision sets and names


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("mnist", "MNIST", (28, 28)),
        ("fashionmnist", "FashionMNIST", (28, 28)),
        ("svhn", "SVHN", (3, 32, 32)),
        ("cifar10", "CIFAR10", (32, 32, 3)),
        ("cifar100", "CIFAR100", (32, 32, 3)),
    ],
)
def test_torchvision_sets(monkeypatch, tmp_path, name, kind, shape):
    class Fake:
        def __init__(self, root, download, train=None, split=None):
            assert download and root == str(tmp_path) and (train is None) == (name == "svhn")
            self.data = np.full((20, *shape), 7 if train or split == "train" else 9, np.uint8)
            self.targets = self.labels = list(range(10)) * 2
            if name != "svhn":
                self.classes = [f"class {i}" for i in range(10)]

    monkeypatch.setattr(torchvision.datasets, kind, Fake)
    d = load(name, root=tmp_path)
    c = 1 if len(shape) == 2 else 3
    assert d.shape == (c, shape[-2 if c == 1 else 1], 28 if c == 1 else 32)
    assert (d.images["train"] == 7).all() and (d.images["test"] == 9).all()
    assert d.classes[3] == ("3" if name == "svhn" else "class 3")
    assert torch.allclose(d.std.flatten(), torch.tensor(data.STATISTICS[name][1]))
    with pytest.raises(DDError, match="comes at resolution"):
        load(name, root=tmp_path, resolution=16)


def test_no_internet_says_what_to_put_where(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(DDError, match=f"cifar-10-batches-py/ into {tmp_path}"):
        load("cifar10", root=tmp_path)


def test_names():
    with pytest.raises(
        DDError, match="unknown dataset 'cifar11'.*did you mean 'cifar10'.*folder:PATH"
    ):
        load("cifar11")
    with pytest.raises(DDError, match="unknown zca kind 'pca'"):
        load("digits", zca="pca")
    with pytest.raises(DDError, match="resolution must be an integer of at least 1"):
        load("digits", resolution=0)
    assert set(data.SUBSETS) < set(data.NAMES) and all(
        len(set(ids)) == 10 for ids in data.SUBSETS.values()
    )
    assert [
        data.canonical(n) for n in ("cifar10", "folder:cifar10", "folder:/x/y/pets/", "folder:a/b")
    ] == ["cifar10", "cifar10", "pets", "b"]


def test_a_folder_of_a_known_name_gets_its_constants(tmp_path):
    d = load(f"folder:{tree(tmp_path / 'cifar10')}")
    assert torch.allclose(d.std.flatten(), torch.tensor([0.2023, 0.1994, 0.2010]))
    grey = load(
        f"folder:{tree(tmp_path / 'grey' / 'cifar10', mode='L')}"
    )  # three constants, one channel
    assert grey.std.shape == (1, 1, 1) and grey.std.item() != pytest.approx(0.2023)


# --- ZCA


def correlated(n: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    base = torch.rand(n, 3, 1, 1, generator=draw) + 0.3 * torch.rand(n, 3, 4, 4, generator=draw)
    return (base * 195).to(torch.uint8)


def test_zca_mtt_follows_kornia():
    pixels = correlated(1500)  # more than one chunk
    x = pixels.double().flatten(1) / 255
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    want = (x - x.mean(0)) @ vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T
    got = ZCA.fit(pixels, "mtt").whiten(pixels.float() / 255)
    assert got.shape == pixels.shape and torch.allclose(got.flatten(1).double(), want, atol=1e-5)


@pytest.mark.parametrize(
    "n", [1500, 20]
)  # 20 < D = 48: the eigenvalues beyond the rank of 19 become 1
def test_zca_frepo_follows_the_formula(n):
    pixels = correlated(n)
    x = pixels.double() / 255
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    x = ((x - mean) / std).flatten(1)
    cov = torch.cov(x.T, correction=0)
    left, values, _ = torch.linalg.svd(
        cov + 0.1 * cov.trace() / 48 * torch.eye(48, dtype=torch.float64)
    )
    values[n - 1 :] = 1
    new = correlated(30, seed=1)  # unlike the fitted ones, these reach into the null space
    y = ((new.double() / 255 - mean) / std).flatten(1)
    want = (y - x.mean(0)) @ left @ torch.diag(values.rsqrt()) @ left.T
    got = ZCA.fit(pixels, "frepo").whiten(new.float() / 255)
    assert torch.allclose(got.flatten(1).double(), want, atol=1e-4)


@pytest.mark.parametrize("n", [1500, 8])  # 8 < D = 12: the D - N smallest eigenvalues become 1
def test_zca_checkerboard_shares_one_matrix_among_four_sub_images(n):
    pixels = correlated(n)
    x = pixels.double() / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    parts = [x[:, :, i::2, j::2].flatten(1) for i in (0, 1) for j in (0, 1)]
    cov = sum(torch.cov(part.T, correction=0) for part in parts) / 4
    values, vectors = torch.linalg.eigh(
        cov + 0.1 * cov.trace() / 12 * torch.eye(12, dtype=torch.float64)
    )
    values[: max(0, 12 - n)] = 1
    zca = ZCA.fit(pixels, "frepo_checkerboard")
    assert zca.matrix.shape == (12, 12) and zca.mean.shape == (4, 12)
    got = zca.whiten(pixels.float() / 255)
    for k, part in enumerate(parts):
        want = (part - part.mean(0)) @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
        assert torch.allclose(
            got[:, :, k // 2 :: 2, k % 2 :: 2].flatten(1).double(), want, atol=1e-4
        )
    assert torch.allclose(zca.colour(got), pixels.float() / 255, atol=1e-4)
    assert torch.allclose(
        zca.whiten(pixels[:6].view(2, 3, 3, 4, 4).float() / 255)[1], got[3:6], atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_zca_of_a_dataset_is_fitted_on_train_and_invertible(tmp_path, kind):
    d, plain = load("digits", zca=kind), load("digits")
    assert (
        torch.equal(d.zca.matrix, ZCA.fit(plain.images["train"], kind).matrix)
        and len(d.zca.id) == 12
    )
    assert d.checksum == plain.checksum
    x = d.images["test"].float() / 255
    z = d.normalise(d.images["test"])
    assert z.shape == x.shape and not torch.allclose(z, plain.normalise(d.images["test"]), atol=0.1)
    assert torch.allclose(d.denormalise(z), x, atol=1e-4)
    assert torch.allclose(
        d.batch("test", torch.zeros(2, 3, dtype=torch.long))[1, 2], z[0], atol=1e-5
    )
    eye = torch.eye(16 if kind == "frepo_checkerboard" else 64, dtype=torch.float64)
    assert torch.allclose(d.zca.matrix.double() @ d.zca.inverse.double(), eye, atol=1e-4)


def test_zca_is_kept_on_disk_and_refitted_when_damaged(tmp_path, monkeypatch):
    calls, fit = [], ZCA.fit
    monkeypatch.setattr(ZCA, "fit", staticmethod(lambda *a: (calls.append(a), fit(*a))[1]))
    one, two = load("digits", zca="mtt"), load("digits", zca="mtt")
    assert (
        len(calls) == 1 and one.zca.id == two.zca.id and torch.equal(one.zca.matrix, two.zca.matrix)
    )
    path = next((tmp_path / "cache").glob(f"zca-mtt-{one.zca.id}*"))
    whole = path.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100]):
        path.write_bytes(broken)
        assert torch.equal(load("digits", zca="mtt").zca.inverse, one.zca.inverse)
    for of_others in (
        {"matrix": torch.eye(64)},
        dict.fromkeys(("mean", "matrix", "inverse"), torch.eye(9)),
    ):
        save_tensors(path, of_others, {})
        assert torch.equal(load("digits", zca="mtt").zca.inverse, one.zca.inverse)
    assert len(calls) == 5 and load("digits", zca="frepo").zca.id != one.zca.id


def test_zca_errors():
    with pytest.raises(DDError, match="at most 12,288"):
        ZCA.fit(torch.zeros(2, 3, 65, 64, dtype=torch.uint8), "mtt")
    with pytest.raises(DDError, match="uint8"):
        ZCA.fit(torch.zeros(2, 3, 4, 4), "mtt")
    for sides in ((5, 4), (4, 5), (128, 130)):
        with pytest.raises(DDError, match="even sides"):
            ZCA.fit(torch.zeros(2, 3, *sides, dtype=torch.uint8), "frepo_checkerboard")


# --- the real images


def test_real_cifar10(own_folders):
    if not own_folders or not (Path(own_folders) / "cifar10" / "train").is_dir():
        pytest.skip("needs DDLIB_DATA with the folder cifar10/{train,test}")
    root, classes, splits = folders.folder_tree(Path(own_folders) / "cifar10")
    ((pixels, _),) = decoding.read((root, classes, {"train": splits["test"][::50]}), None).values()
    assert pixels.shape == (200, 3, 32, 32)
    assert (
        pixels.float().mean((0, 2, 3)) / 255 - torch.tensor([0.4914, 0.4822, 0.4465])
    ).abs().max() < 0.05


def test_statistics_of_a_large_set_take_little_memory_and_are_exact():
    class Largest(TorchDispatchMode):
        """The most values that any result on the way has had."""

        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            several = found if isinstance(found, tuple | list) else [found]
            sizes = (value.numel() for value in several if isinstance(value, torch.Tensor))
            self.seen = max(self.seen, *sizes)
            return found

    pixels = torch.randint(256, (3, 1, 256), generator=torch.Generator().manual_seed(0))
    images = pixels.byte().expand(200, 3, 256, 256)  # 39 million values, of which few are stored
    with Largest() as largest:
        found = data._statistics(images)
    assert largest.seen <= data.VALUES_AT_ONCE
    one = pixels.double().flatten(1) / 255
    wanted = torch.stack([one.mean(1), one.std(1, correction=0)])
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-7)


@pytest.fixture
def _ctrl_c():
    """Ctrl-C as in a terminal: a shell's background job ignores it, and what it starts does too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_decoding_within_two_seconds(tmp_path, monkeypatch, _ctrl_c):
    tree(tmp_path / "pets", n=50)
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "cache"))
    pixels, began = decoding._pixels, threading.Event()

    def slow(*arguments):
        if threading.current_thread() is not threading.main_thread():  # one of the pool's
            began.set()
            time.sleep(0.5)
        return pixels(*arguments)

    monkeypatch.setattr(decoding, "_pixels", slow)
    asked = []

    def interrupt():
        assert began.wait(30)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        load(f"folder:{tmp_path / 'pets'}")
    assert time.monotonic() - asked[0] < 2
    monkeypatch.setattr(decoding, "_pixels", pixels)
    assert len(load(f"folder:{tmp_path / 'pets'}").labels["train"]) == 100
