"""A look into one run: its images at any step, their real neighbours, labels, confusion matrix and embedding.

Every view is a plain function of a run and a step, `draw(view, run, step)`; the widgets of panel.py only call it, so a
notebook shows the same pictures with a kernel and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from ..config import PROFILES, dataset_of
from ..core import DDError, choose, generator, pick_device
from ..data.dataset import Dataset
from ..distilled import Synthetic
from ..engine.record import Run, resolve_record, side_file
from ..files import home, update_json
from ..methods import METHODS
from ..nets.build import build, initialise
from ..recipe import VERSION
from ..train.loop import predict, train
from . import look as kept_look
from . import plots, tables

# Paul Tol's muted palette with black: ten classes that colour-blind readers can tell apart too.
CLASSES = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#000000",
)
Key = tuple[str, str, int]  # dataset, method, IPC
NEIGHBOURS = 6  # of each first image
DOTS = 60  # real images per class in the embedding


def choices(found: Iterable[Run]) -> dict[Key, Run]:
    """(dataset, method, IPC) -> its run, of those with a kept set: first in the paper's profile, then with the fewest
    overrides, then the longest, then the lowest seed."""
    kept = [run for run in found if run.path.with_suffix(".safetensors").is_file()]
    rows = tables.runs(kept).assign(run=kept)
    rows["size"] = rows.profile.map([*PROFILES].index)
    rows["changes"] = rows.overrides.map(tables.changes)
    order = {"size": False, "changes": True, "iterations": False, "seed": True}
    rows = rows.sort_values([*order], ascending=[*order.values()], kind="stable")
    place = ["dataset", "method", "ipc"]
    rows = rows.drop_duplicates(place).sort_values(place)
    return {(row.dataset, row.method, row.ipc): row.run for row in rows.itertuples()}


def pick(found: dict[Key, Run], dataset: str, method: str, ipc: int, profile: str) -> Run:
    """The run of `choices` with this key; a missing one is a `DDError` with the command that makes it."""
    choose("profile", profile, PROFILES)
    choose("method", method, METHODS)
    if (dataset, method, ipc) not in found:
        raise DDError(
            f"no kept set of {method} on {dataset} at IPC {ipc} in the {profile} profile; make it: python -m "
            f"ddlib run {method} --dataset {dataset} --ipc {ipc} --profile {profile}"
        )
    return found[dataset, method, ipc]


def kept(results: str | Path | None = None) -> dict[Key, Run]:
    """`choices` among the kept runs that can be looked at without their data (`ddlib look`), by default the checkout's.

    Raises `DDError` where there is none.
    """
    results = results or home() / "results"
    found = choices(run for run in tables.stored(results) if kept_look.path_of(run).is_file())
    if not found:
        raise DDError(f"no set in {results} has what it takes to be looked at: ddlib look FILE")
    return found


def steps(run: Run) -> list[int]:
    """The steps whose images are kept, the last one always among them."""
    return sorted({*run.synthetic.snapshots, run.record["accuracy"]["last"]["step"]})


@dataclass(frozen=True)
class Look:
    """A run after `step`: what the views draw. Labels and step size are always the last ones, whatever the step."""

    run: Run
    step: int
    device: str = "auto"
    anew: bool = False  # from the data, whatever is kept

    @property
    def syn(self) -> Synthetic:
        syn = self.run.synthetic
        return replace(syn, images=syn.snapshots.get(self.step, syn.images))

    @cached_property
    def data(self) -> Dataset:
        return dataset_of(resolve_record(self.run.record), pick_device(self.device))

    @cached_property
    def side(self) -> dict[str, torch.Tensor]:
        """What is kept to be shown without the data (`ddlib look`): all of the last step, of others their pixels."""
        facts = {} if self.anew else kept_look.load(self.run)
        if self.step == self.run.record["accuracy"]["last"]["step"]:
            return facts
        pixels = facts.get(f"pixels@{self.step}")
        return {} if pixels is None else {"pixels": pixels}

    @property
    def seen(self) -> Synthetic:
        """The set with its whitening, if it has one, undone: what can be drawn as pixels."""
        syn = self.syn
        return _unwhitened(syn, self.pixels.float() / 255) if syn.zca else syn

    @property
    def pixels(self) -> torch.Tensor:
        """uint8 [n, C, H, W]: the images of a whitened set as they look."""
        if "pixels" in self.side:
            return self.side["pixels"]
        return (self.data.denormalise(self.syn.images) * 255).round().to(torch.uint8)

    @property
    def title(self) -> str:
        return f"{plots.title_of(self.run.synthetic)}, step {self.step}"


def _unwhitened(syn: Synthetic, pixels: torch.Tensor) -> Synthetic:
    images = (pixels.cpu() - syn.mean.cpu()) / syn.std.cpu()
    return replace(syn, images=images, zca=None, mean=syn.mean.cpu(), std=syn.std.cpu())


def images(look: Look) -> Figure:
    """The synthetic images after the step, one row per class."""
    return plots.images(look.seen, title=look.title)


def evolution(look: Look) -> Figure:
    """The first image of each class (of the first ten) at every kept step up to this one."""
    earlier = [step for step in look.syn.snapshots if step < look.step]
    shots = {step: Look(look.run, step, look.device).seen.images for step in earlier}
    shots[look.step] = look.seen.images
    return plots.evolution(replace(look.seen, snapshots=shots), title=look.title)


def nearest(x: torch.Tensor, data: Dataset, count: int) -> torch.Tensor:
    """Rows of the training images nearest to x [n, C, H, W] in normalised pixels (Euclidean): int64 [n, count]."""
    best, rows = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for chunk in torch.arange(len(data.labels["train"]), device=x.device).split(2000):
        far = torch.cat([best, torch.cdist(x.flatten(1), data.batch("train", chunk).flatten(1))], 1)
        best, order = far.topk(min(count, far.shape[1]), largest=False)
        rows = torch.cat([rows, chunk.expand(len(x), -1)], 1).gather(1, order)
    return rows


def _near(look: Look) -> tuple[torch.Tensor, torch.Tensor]:
    """The first image of each class's nearest real ones: uint8 [classes, count, C, H, W], their labels."""
    if "near" in look.side:
        return look.side["near"], look.side["near labels"].long()
    syn, data = look.syn, look.data
    x = syn.training_set()[0][: len(syn.images) : syn.ipc][:10].to(data.device)
    rows = nearest(x, data, NEIGHBOURS)
    train = data.images["train"]
    return train[rows.to(train.device)].cpu(), data.labels["train"][rows].cpu()


def neighbours(look: Look) -> Figure:
    """The first image of each class (of the first ten) and its nearest real training images, of whatever class.

    A neighbour of another class carries that class's name. A decoded set (IDC) shows its first tile.
    """
    syn, (near, found) = look.seen, _near(look)
    first = syn.training_set()[0][: len(syn.images) : syn.ipc][:10]
    first = syn.pixels(images=first).cpu()
    count, labels = near.shape[1], found.tolist()
    figure = plots.grid(
        torch.cat([first[:, None], near.float() / 255], 1).flatten(0, 1),
        count + 1,
        titles=["synthetic", *(f"real {k + 1}" for k in range(count))],
        rows=[name[:12] for name in syn.classes[:10]],
        scale=0.55,
    )
    axis = figure.axes[0]
    odd = [
        (k, j, label) for k, line in enumerate(labels) for j, label in enumerate(line) if label != k
    ]
    for k, j, label in odd:
        axis.text(
            axis.get_xticks()[j + 1],
            axis.get_yticks()[k] + near.shape[3] / 2,
            syn.classes[label][:10],
            color="white",
            fontsize=6,
            ha="center",
            va="center",
            bbox={"fc": "#B34700", "ec": "none", "pad": 1},
        )
    total = found.numel()
    figure.suptitle(
        f"{look.title}\n{total - len(odd)} of {total} nearest training images are of the same class",
        fontsize=9,
    )
    return figure


def labels(look: Look) -> Figure:
    """The labels as a heat map, one row per image, or a class's mean beyond 100 images; hard ones are 0 and 1."""
    syn = look.syn
    soft, each = syn.labels.is_floating_point(), syn.ipc if len(syn.labels) <= 100 else 1
    table = (syn.labels if soft else F.one_hot(syn.labels, len(syn.classes))).cpu().float()
    table = table.unflatten(0, (len(syn.classes) * each, -1)).mean(1).numpy()
    signed, high = bool((table < 0).any()), float(abs(table).max())  # FRePo's are no probabilities
    averaged = f"class of the synthetic image, mean of {syn.ipc} images"
    figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    shown = axis.imshow(
        table,
        aspect="auto",
        cmap="RdBu_r" if signed else "cividis",
        vmin=-high if signed else 0,
        vmax=high,
        interpolation="nearest",
    )
    figure.colorbar(shown, label="label value, no unit")
    _class_ticks(axis.xaxis, syn.classes)
    _class_ticks(axis.yaxis, syn.classes, each)
    axis.set(
        xlabel="class of the label",
        ylabel="class of the synthetic image" if each == syn.ipc else averaged,
    )
    axis.set_title(
        f"{look.title}\n{'soft labels after the last step' if soft else 'hard labels'}", fontsize=9
    )
    return figure


def confusion(look: Look) -> torch.Tensor:
    """Test images by true and predicted class, int64 [classes, classes], of one network trained on the set.

    It is the first network of the run's own evaluation. Kept beside the record in NAME.confusion.json.
    """
    if "confusion" in look.side:
        return look.side["confusion"].long()
    path = look.run.path.with_suffix(".confusion.json")
    kept = side_file(path)
    key = f"step {look.step}, version {VERSION}"
    if key not in kept:
        counts = _confusion(look).tolist()
        kept = update_json(path, "side file", "delete it and look again", {key: counts})
    return torch.tensor(kept[key])


def _confusion(look: Look) -> torch.Tensor:
    syn, data, seed = look.syn, look.data, look.run.record["seed"]
    if not len(data.labels["test"]):
        raise DDError(f"{data.name} has no test images: there is no confusion matrix")
    many = len(syn.classes)
    net = build(syn.backbone, data.shape, many).to(data.device)
    initialise(net, generator(seed, "evaluate", "weights", 0))
    order = generator(seed, "evaluate", "order", 0)
    train(net, *syn.to(data.device).training_set(), syn.recipe, order)
    pairs = data.labels["test"] * many + predict(net, data).argmax(1)
    return torch.bincount(pairs, minlength=many**2).view(many, many).cpu()


def accuracy(look: Look) -> Figure:
    """Accuracy by class and the confusion matrix of one network; a set with learned labels only after the last step.

    The bars carry Wilson's interval, up to 100 classes: of more, the intervals alone would blacken the picture.
    """
    if look.syn.labels.is_floating_point():
        look = replace(look, step=steps(look.run)[-1])
    counts, classes = confusion(look).numpy(), look.syn.classes
    sizes = counts.sum(1).clip(1)
    share = 100 * counts / sizes[:, None]
    right, span = share.diagonal(), None
    if len(classes) <= 100:
        from scipy.stats import binomtest  # loaded here: it takes a second

        pairs = zip(counts.diagonal(), sizes, strict=True)
        found = [binomtest(k, n).proportion_ci(method="wilson") for k, n in pairs]
        span = np.abs([[100 * each.low, 100 * each.high] for each in found] - right[:, None]).T
    total, chance = float(100 * counts.diagonal().sum() / counts.sum()), 100 / len(classes)
    figure, (bars, matrix) = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", width_ratios=(1, 1.3)
    )
    bars.barh(
        range(len(classes)),
        right,
        color=plots.colour_of(look.run.record["method"]),
        xerr=span,
        capsize=2,
        error_kw={"lw": 1},
    )
    bars.axvline(total, color="black", lw=1, ls="--", label=f"all: {total:.1f} %")
    bars.axvline(chance, color="black", lw=1, ls=":", label=f"chance: {chance:.1f} %")
    bars.set(
        xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5), xlabel="test accuracy (%)", ylabel="class"
    )
    bars.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.colorbar(
        matrix.imshow(share, cmap="cividis", vmin=0, vmax=100), label="share of the true class (%)"
    )
    matrix.set(xlabel="predicted class", ylabel="true class")
    for axis in (bars.yaxis, matrix.xaxis, matrix.yaxis):
        _class_ticks(axis, classes)
    for row, column in np.argwhere(share >= 0.5) if len(classes) <= 10 else ():
        matrix.text(
            column,
            row,
            f"{share[row, column]:.0f}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if share[row, column] > 50 else "white",
        )
    figure.suptitle(f"{look.title}, one {look.syn.backbone}", fontsize=9)
    return figure


def _places(look: Look) -> dict[str, torch.Tensor]:
    """Where images lie on the real ones' two main axes, in normalised pixels.

    dots [classes, each, 2]: real images; paths [shots, classes, n, 2]: the set at its steps; share [2]: per cent of the
    real images' variance along each axis.
    """
    if "dots" in look.side:
        return {name: look.side[name].double() for name in ("dots", "paths", "share")}
    syn, data, many = look.syn, look.data, min(10, len(look.syn.classes))
    each = min(DOTS, int(data.class_sizes()[:many].min()))
    rows = data.sample(each, generator(0, "explore", "embedding"), classes=range(many))
    real = data.batch("train", rows).flatten(2).cpu().double()  # [classes, each, D]
    centre = real.flatten(0, 1).mean(0)
    _, strength, axes = torch.linalg.svd(real.flatten(0, 1) - centre, full_matrices=False)
    largest = axes[:2].abs().argmax(1, keepdim=True)
    axes = axes[:2] * axes[:2].gather(1, largest).sign()  # else any machine has its own signs
    shots = [shot for k, shot in syn.snapshots.items() if k < look.step] + [syn.images]
    sets = [
        replace(syn, images=shot[: many * syn.ipc]).training_set()[0].flatten(1).cpu().double()
        for shot in shots
    ]
    paths = (torch.stack(sets) - centre) @ axes.T  # [shots, tiles * classes * ipc, 2]
    paths = paths.unflatten(1, (-1, many, syn.ipc)).transpose(1, 2).flatten(2, 3)
    share = 100 * strength[:2] ** 2 / (strength**2).sum()
    return {"dots": (real - centre) @ axes.T, "paths": paths, "share": share}


def embedding(look: Look) -> Figure:
    """Real and synthetic images of the first ten classes on the two main axes (PCA) of the real ones' pixels.

    A line joins the places of a synthetic image at the kept steps up to this one. Units: normalised pixels.
    """
    syn, places = look.syn, _places(look)
    share, each = places["share"].tolist(), places["dots"].shape[1]
    figure, axis = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    pairs = zip(places["dots"], places["paths"].unbind(1), strict=True)
    for k, (dots, path) in enumerate(pairs):
        axis.scatter(*dots.T, s=9, alpha=0.45, lw=0, color=CLASSES[k])
        axis.plot(*path.unbind(2), lw=1, color=CLASSES[k], zorder=2)
        axis.scatter(
            *path[-1].T,
            s=130 if path.shape[1] == 1 else 70,
            marker="*",
            color=CLASSES[k],
            ec="white",
            lw=0.6,
            zorder=3,
            label=syn.classes[k][:12],
        )
    axis.set(
        xlabel=f"first principal axis ({share[0]:.0f} % of the variance)",
        ylabel=f"second principal axis ({share[1]:.0f} % of the variance)",
    )
    axis.set_title(
        f"{look.title}\ndots: {each} real images a class; stars: synthetic images", fontsize=9
    )
    figure.legend(*axis.get_legend_handles_labels(), title="class", loc="outside right", fontsize=8)
    return figure


VIEWS: dict[str, Callable[[Look], Figure]] = {
    "images": images,
    "evolution": evolution,
    "neighbours": neighbours,
    "labels": labels,
    "accuracy": accuracy,
    "embedding": embedding,
}


def draw(view: str, run: Run, step: int = -1, device: str = "auto") -> Figure:
    """One of `VIEWS` of the run after `step` (-1: the last); raises `DDError` for another view or step."""
    kept = steps(run)
    return VIEWS[choose("view", view, VIEWS)](
        Look(run, choose("step", kept[-1] if step == -1 else step, kept), device)
    )


def keep(run: Run, device: str = "auto") -> Path:
    """Write what every view of the run's last step needs into NAME.look.safetensors; needs the dataset, trains once."""
    look = Look(run, steps(run)[-1], device, anew=True)
    near, labels = _near(look)
    places = {name: value.half() for name, value in _places(look).items()}
    facts = {"near": near, "near labels": labels.to(torch.uint8), **places}
    facts["confusion"] = _confusion(look).int()
    if look.syn.zca:
        facts["pixels"] = look.pixels
        for step in steps(run)[:-1]:
            facts[f"pixels@{step}"] = replace(look, step=step).pixels
    return kept_look.save(run, facts)


def _class_ticks(axis: Axis, classes: tuple[str, ...], each: int = 1) -> None:
    """Class names, at most 20 of them, on an axis with `each` rows per class."""
    shown = range(0, len(classes), -(-len(classes) // 20))
    upright = axis.axis_name == "x" and max(map(len, classes)) > 2
    axis.set_ticks(
        [k * each + (each - 1) / 2 for k in shown],
        [classes[k][:12] for k in shown],
        fontsize=8,
        rotation=90 if upright else 0,
    )
