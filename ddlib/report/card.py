"""A card for a distilled set: Markdown in the manner of Hugging Face's dataset cards, all of it from the record."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..config import Spec
from ..core import DDError, instance, path_of
from ..data.dataset import canonical
from ..engine.record import Run, resolve_record
from ..files import figures_folder, is_there
from . import tables

# dataset -> (licence as Hugging Face's front matter has it, a sentence). A set inherits the terms of its images.
LICENCES = {
    "digits": ("cc-by-4.0", "Optical Recognition of Handwritten Digits (UCI), CC BY 4.0."),
    "mnist": ("cc-by-sa-3.0", "MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0."),
    "fashionmnist": ("mit", "Fashion-MNIST (Zalando Research), MIT."),
    "svhn": ("other", "SVHN (Netzer et al.), for non-commercial use."),
    "cifar10": (
        "unknown",
        "CIFAR-10 (Krizhevsky): no licence is stated; its authors ask to be cited.",
    ),
    "cifar100": (
        "unknown",
        "CIFAR-100 (Krizhevsky): no licence is stated; its authors ask to be cited.",
    ),
}
IMAGENET = (
    "other",
    "ImageNet's images: for non-commercial research and teaching, by its terms of access.",
)
YOURS = (
    "unknown",
    "The terms of the images that it was distilled from hold; this record does not know them.",
)
SUBSETS = (
    "imagenet",
    "imagewoof",
    "imagefruit",
    "imagemeow",
    "imagesquawk",
    "imageyellow",
    "tinyimagenet",
)


def card(run: Run) -> str:
    """The card of a kept set; raises `DDError` where its record or its set is missing."""
    if not is_there(instance("run", run, Run).path):
        raise DDError(f"a card needs the set's record, and there is no {run.path}")
    record, syn, spec = run.record, run.synthetic, resolve_record(run.record)
    place = canonical(record["dataset"])
    tag, licence = _licence(place)
    front = {
        "pretty_name": f"{record['method']} of {place}, {_counted(record['ipc'])} per class",
        "license": tag,
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", record["method"], place],
        "size_categories": ["n<1K" if len(syn.images) < 1000 else "1K<n<10K"],
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    sections = {
        "What it is": _what(run, spec),
        "How well it trains a network": _accuracy(run),
        "How networks are trained on it": _protocol(syn),
        "How it was made": _making(record, spec),
        "Licence of the data": licence,
        "Use it": _use(run),
        **_pictures(record),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{head}---\n\n# {front['pretty_name']}\n\n{body}\n"


def of_file(path: str | Path, what: str = "a card") -> Run:
    """The run whose record or set is `path`; `what` is what the record is needed for."""
    path = path_of("the path of a set", path)
    run = Run(path.with_suffix(".json") if path.name else path)
    if not is_there(run.path):
        raise DDError(
            f"{what} needs the set's record, and there is no {run.path}: name a set beside its record, "
            "as ddlib run writes them"
        )
    return run


def _counted(ipc: int) -> str:
    return f"{ipc} image{'s' if ipc > 1 else ''}"


def _licence(place: str) -> tuple[str, str]:
    return IMAGENET if place.startswith(SUBSETS) else LICENCES.get(place, YOURS)


def _what(run: Run, spec: Spec) -> str:
    syn, record = run.synthetic, run.record
    n, channels, height, width = syn.images.shape
    soft = syn.labels.is_floating_point()
    colours = f"{channels} channel{'s' if channels > 1 else ''}"
    size = f"{n} synthetic images of {height}x{width} px and {colours}"
    share = f"{syn.ipc} for each of {len(syn.classes)} classes"
    source = f"distilled from `{record['dataset']}` by `{record['method']}`"
    run_of = f"(`{record['profile']}` profile, seed {record['seed']})"
    parts = [
        f"{size}, {share}, {source} {run_of}.",
        "Labels are learned, one real number a class." if soft else "Labels are the classes.",
    ]
    if syn.factor > 1:
        parts.append(
            f"Each stored image holds {syn.factor**2} tiles; decoded, they are "
            f"{n * syn.factor**2} training images."
        )
    if syn.zca:
        parts.append("Pixels live in ZCA space: the data's whitening must be undone to see them.")
    return " ".join(parts)


def _accuracy(run: Run) -> str:
    last, best = (run.record["accuracy"][key] for key in ("last", "best"))
    best = best.get("best", best)
    table = tables.runs([*_random_beside(run), run])
    rows = tables.compare(table)[tables.judge(table).method == run.record["method"]]
    figure = f"{last['mean']:.1f} ± {last['std']:.1f} over {len(last['networks'])} networks"
    lines = [
        "| test accuracy (%) | |",
        "| --- | --- |",
        f"| after the last step ({last['step']}) | {figure} |",
        f"| the best on the way, chosen on the test set | {best['mean']:.1f} ± {best['std']:.1f} |",
    ]
    lines += [
        f"| {name} | {rows[column].iloc[0]} |"
        for name, column in (("the paper's figure", "paper"), ("verdict", "verdict"))
        if column in rows
    ]
    return "\n".join(lines)


def _random_beside(run: Run) -> list[Run]:
    """The random images whose records lie beside the run's, which a verdict needs."""
    stored = tables.stored(run.results, run.record["profile"])
    return [one for one in stored if one.record["method"] == "random" != run.record["method"]]


def _protocol(syn) -> str:
    recipe = syn.recipe
    return (
        f"`{recipe.name}` protocol on `{syn.backbone}`: {recipe.epochs} epochs of {recipe.optimiser}, "
        f"step size {recipe.lr:.4g}, batches of {recipe.batch}, augmentation `{recipe.augment}`."
    )


def _making(record: dict, spec: Spec) -> str:
    seconds = record["seconds"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"`{spec.command()} --seed {record['seed']}`\n\n"
        f"{seconds['distill']:.0f} s of distillation and {seconds['evaluate']:.0f} s of evaluation on "
        f"{record['device']}; peak {record['peak_bytes'] / 2**20:.0f} MiB ({record['peak_method']}). "
        f"{versions}. Data checksum `{record['dataset_checksum'][:12]}`, commit "
        f"`{(record['commit'] or 'not recorded')[:12]}`, {record['written']}."
    )


def _use(run: Run) -> str:
    name = run.path.with_suffix(".safetensors").name
    return (
        f"```python\nfrom ddlib import Synthetic, tensor_dataset\n"
        f'images_and_labels = tensor_dataset(Synthetic.load("{name}"))\n```\n\n'
        f"`ddlib evaluate {name}` scores it; `ddlib export {name} --to FOLDER` writes PNG files."
    )


def _pictures(record: dict) -> dict[str, str]:
    """A link to the figure of such a set, where one is kept."""
    figures = figures_folder() / record["profile"]
    name = f"{record['method']}_images_ipc{record['ipc']}.png"
    if not (figures / name).is_file():
        return {}
    return {"Pictures": f"![The images, by class](figures/{record['profile']}/{name})"}
