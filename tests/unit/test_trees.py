"""Every family of datasets from a tree in its documented layout, made here pixel by pixel, and wrong layouts.

No file of a real dataset is needed and nothing is downloaded. torchvision compares CIFAR and SVHN with the md5 of the
real files; the sums of the files made here stand in for them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from test_data import load, own_folders, picture, tree  # noqa: F401  own_folders acts on each test here too

from ddlib.core import DDError
from ddlib.data import dataset as data
from ddlib.data import folders

Split = tuple[np.ndarray, np.ndarray]  # uint8 [N,C,H,W], labels [N]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The data root that DDLIB_DATA names, without internet."""

    def offline(*_, **__):
        raise URLError("no internet in this test")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def made(channels: int, side: int, classes: int) -> dict[str, Split]:
    """Random images, two a class in train and one in test, in random order."""
    draw = np.random.default_rng(side + classes)
    return {
        split: (
            draw.integers(0, 256, (n * classes, channels, side, side), dtype=np.uint8),
            draw.permutation(n * classes) % classes,
        )
        for split, n in (("train", 2), ("test", 1))
    }


def write_mnist(folder: Path, splits: dict[str, Split]) -> None:
    """IDX: two zero bytes, the type (8: uint8), the number of axes, each length as a big-endian int32, the bytes."""
    (folder / "raw").mkdir(parents=True)
    for split, (x, y) in zip(("train", "t10k"), splits.values(), strict=True):
        for what, array in (
            (f"{split}-images-idx3", x[:, 0]),
            (f"{split}-labels-idx1", y.astype(np.uint8)),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / "raw" / f"{what}-ubyte").write_bytes(head + array.tobytes())


def write_svhn(folder: Path, splits: dict[str, Split], sums) -> None:
    """MATLAB files: X uint8 [32,32,3,N], y [N,1] in 1..10, where 10 is the digit 0."""
    for split, (x, y) in splits.items():
        savemat(
            folder / f"{split}_32x32.mat",
            {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]},
        )
    sums(
        torchvision.datasets.SVHN,
        "split_list",
        {
            split: ["http://nowhere", f"{split}_32x32.mat", md5(folder / f"{split}_32x32.mat")]
            for split in splits
        },
    )


def write_cifar(folder: Path, splits: dict[str, Split], sums, archive: bool) -> None:
    """Pickles: data uint8 [N,3072] channel by channel, and a list of labels; `archive` leaves the .tar.gz alone."""
    kind = (
        torchvision.datasets.CIFAR100
        if len(splits["test"][1]) == 100
        else torchvision.datasets.CIFAR10
    )
    tens = kind is torchvision.datasets.CIFAR10
    (x, y), (test_x, test_y) = splits.values()
    batches = {"test_batch" if tens else "test": (test_x, test_y)} | (
        {f"data_batch_{i + 1}": (x[i::5], y[i::5]) for i in range(5)} if tens else {"train": (x, y)}
    )
    label = "labels" if tens else "fine_labels"
    contents = {
        name: {"data": x.reshape(len(x), -1), label: y.tolist()} for name, (x, y) in batches.items()
    }
    meta = "batches.meta" if tens else "meta"
    contents[meta] = {
        "label_names" if tens else "fine_label_names": [f"class {i}" for i in range(max(y) + 1)]
    }
    below = folder / kind.base_folder
    below.mkdir()
    for name, content in contents.items():
        (below / name).write_bytes(pickle.dumps(content))
    train = [name for name in batches if "test" not in name]
    sums(kind, "train_list", [[name, md5(below / name)] for name in train])
    sums(kind, "test_list", [[name, md5(below / name)] for name in batches if name not in train])
    sums(kind, "meta", {**kind.meta, "md5": md5(below / meta)})
    if archive:
        with tarfile.open(folder / kind.filename, "w:gz") as tar:
            tar.add(below, kind.base_folder)
        for file in below.iterdir():
            file.unlink()
        below.rmdir()
        sums(kind, "tgz_md5", md5(folder / kind.filename))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def check(name: str, splits: dict[str, Split]) -> data.Dataset:
    found = load(name)
    for split, (x, y) in splits.items():
        order = np.lexsort(
            (*x.reshape(len(x), -1).T[:4],)
        )  # CIFAR-10's five batches come in an order of their own
        again = np.lexsort((*found.images[split].flatten(1).numpy().T[:4],))
        assert np.array_equal(found.images[split].numpy()[again], x[order])
        assert np.array_equal(found.labels[split].numpy()[again], y[order])
    assert torch.allclose(found.std.flatten(), torch.tensor(data.STATISTICS[name][1]))
    return found


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_idx_files(root, name, folder):
    splits = made(1, 28, 10)
    write_mnist(root / folder, splits)
    assert check(name, splits).classes[3] == ("3 - three" if name == "mnist" else "Dress")


def test_svhn(root, monkeypatch):
    splits = made(3, 32, 10)
    write_svhn(root, splits, monkeypatch.setattr)
    assert check("svhn", splits).classes == tuple("0123456789")


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(root, monkeypatch, classes, archive):
    splits = made(3, 32, classes)
    write_cifar(root, splits, monkeypatch.setattr, archive)
    assert check(f"cifar{classes}", splits).classes == tuple(f"class {i}" for i in range(classes))


@pytest.mark.parametrize("name", data.TORCHVISION)
def test_without_internet_a_wrong_layout_says_what_to_put_where(root, monkeypatch, name):
    splits, wrong = made(3, 32, 100 if name == "cifar100" else 10), root / "wrong"
    wrong.mkdir()
    if name in ("mnist", "fashionmnist"):
        write_mnist(wrong, splits)
    elif name == "svhn":
        write_svhn(wrong, splits, monkeypatch.setattr)
    else:
        write_cifar(wrong, splits, monkeypatch.setattr, archive=False)
    with pytest.raises(DDError) as caught:
        load(name)
    assert str(caught.value).endswith(
        f"put {data.TORCHVISION[name][1]} into {root}"
    ) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_damaged_file_says_so_too(root, monkeypatch, name):
    splits = made(1 if name == "mnist" else 3, 28 if name == "mnist" else 32, 10)
    if name == "mnist":
        write_mnist(root / "MNIST", splits)
    elif name == "svhn":
        write_svhn(root, splits, monkeypatch.setattr)
    else:
        write_cifar(root, splits, monkeypatch.setattr, archive=False)
    file = next(path for path in sorted(root.rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        DDError, match=f"cannot read {name} from {root} or download it .*; without internet, put "
    ):
        load(name)


# --- ImageNet-1K, its subsets and Tiny ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """The root of a tree of 1,000 WordNet ids in two splits; those of the subsets hold one picture in their colour."""
    top = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for i in range(1000):
            (top / "imagenet1k" / split / f"n{10 * i:08d}").mkdir(parents=True)
        for i in {index for ids in folders.SUBSETS.values() for index in ids}:
            Image.new("RGB", (20, 16), colour(i)).save(
                top / "imagenet1k" / split / f"n{10 * i:08d}" / "x.JPEG"
            )
    return top


def colour(index: int) -> tuple[int, int, int]:
    return (index % 10 * 25, index // 10 % 10 * 25, index // 100 * 25)


@pytest.mark.parametrize("name", folders.SUBSETS)
def test_imagenet_subsets(imagenet, name):
    found = load(name, root=imagenet, resolution=8)
    assert found.classes == tuple(f"n{10 * i:08d}" for i in folders.SUBSETS[name])
    want = torch.tensor([colour(i) for i in folders.SUBSETS[name]])[:, :, None, None]
    for split in ("train", "test"):
        assert found.labels[split].tolist() == list(range(10))
        assert (
            found.images[split].int() - want
        ).abs().max() < 12  # JPEG; neighbouring colours are 25 apart


def test_the_subsets_hold_the_classes_of_their_names(own_folders):  # noqa: F811
    """Lists of WordNet ids: fastai's Imagenette and Imagewoof, and the cats, in label order."""
    ids = Path(own_folders or "") / "imagenet1k-sample64" / "train"
    if not own_folders or not ids.is_dir():
        pytest.skip("needs DDLIB_DATA with the folder imagenet1k-sample64/train")
    ids = sorted(os.listdir(ids))
    assert [ids[i] for i in folders.SUBSETS["imagenette"]] == [
        "n01440764",
        "n02102040",
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    ]
    assert {ids[i] for i in folders.SUBSETS["imagewoof"]} == {
        "n02086240",
        "n02087394",
        "n02088364",
        "n02089973",
        "n02093754",
        "n02096294",
        "n02099601",
        "n02105641",
        "n02111889",
        "n02115641",
    }
    assert [ids[i] for i in folders.SUBSETS["imagemeow"]][:5] == [
        "n02123045",
        "n02123159",
        "n02123394",
        "n02123597",
        "n02124075",
    ]


def test_wrong_layouts_of_the_imagenets_say_what_to_put_where(root):
    for i in range(1000):  # flat val/, as the archive of ILSVRC 2012 unpacks
        (root / "imagenet1k" / "train" / f"n{i:08d}").mkdir(parents=True)
    picture(root / "imagenet1k" / "val" / "ILSVRC2012_val_00000001.JPEG")
    for name in ("imagenet1k", "imagemeow"):
        with pytest.raises(
            DDError, match=rf"same class folders.*{name} needs .*val/WNID/\*\.JPEG$"
        ):
            load(name)
    tiny = tree(root / "tinyimagenet", ("train",), ("n01", "n02"))  # val/images/ without its list
    picture(tiny / "val" / "images" / "val_0.JPEG")
    with pytest.raises(
        DDError, match="same class folders.*tinyimagenet needs .*val/val_annotations.txt"
    ):
        load("tinyimagenet")


@pytest.mark.parametrize("top", ["", "Train", "pets/train"])
def test_wrong_layouts_of_a_folder_say_what_to_put_where(root, top):
    tree(root / "pets" / top, (".",), ("cat", "dog") if top else (), n=2)
    (root / "pets").mkdir(exist_ok=True)
    with pytest.raises(DDError, match="wanted is PATH/train/CLASS"):
        load("folder:pets")
