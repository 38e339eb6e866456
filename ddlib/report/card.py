"""A card for a distilled set: Markdown in the manner of Hugging Face's dataset cards, all of it from the record.

An imported set has no record: its card says what the file tells, and that the rest is not known.
"""

from __future__ import annotations

import html
import io
from pathlib import Path

import yaml
from PIL import Image
from torch import Tensor

from ..config import Spec
from ..core import DDError, instance, path_of
from ..data.dataset import canonical
from ..data.folders import SUBSETS
from ..distilled import Synthetic
from ..engine.record import Run, resolve_record, timed_on
from ..exchange.outward import class_folders
from ..files import is_there
from . import look, tables

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
UNKNOWN_ACCURACY = (
    "Not known: no record lies beside the set. "
    "`ddlib evaluate FILE` trains networks on it and tests them."
)


def card(of: Run | Synthetic, *, pictures: str = "", use: str = "") -> str:
    """The card of a run's kept set, or of a set alone, which says what nobody has recorded.

    `pictures` is Markdown that shows the images; `use` stands in place of how the set's own file is read. Raises
    `DDError` where a run's record or its set is missing.
    """
    for name, text in (("pictures", pictures), ("use", use)):
        instance(name, text, str)
    run = of if isinstance(instance("what the card is of", of, Run, Synthetic), Run) else None
    if run and not is_there(run.path):
        raise DDError(f"a card needs the set's record, and there is no {run.path}")
    syn = run.synthetic if run else of
    made = run.record if run else {"method": "unknown"} | syn.spec
    place, method = canonical(syn.dataset), made["method"]
    tag, licence = _licence(place)
    front = {
        "pretty_name": f"{method} of {place}, {_counted(syn.ipc)} per class",
        "license": tag,
        "task_categories": ["image-classification"],
        "tags": ["dataset-distillation", method, place],
        "size_categories": ["n<1K" if len(syn.images) < 1000 else "1K<n<10K"],
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    sections = {
        "Pictures": pictures,
        "What it is": _what(syn, made),
        "How well it trains a network": _accuracy(run) if run else UNKNOWN_ACCURACY,
        "How networks are trained on it": _protocol(syn),
        "How it was made": _making(made, resolve_record(made)) if run else _origin(syn),
        "Licence of the data": licence,
        "Use it": use or _use(run.path.with_suffix(".safetensors").name if run else "FILE"),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{head}---\n\n# {front['pretty_name']}\n\n{body}\n"


def picture(of: Run | Synthetic) -> bytes | None:
    """At most ten images of each of the first ten classes as a PNG, a column per class.

    None for a whitened set without the pixels that `ddlib look` keeps: only its dataset could undo the whitening.
    """
    syn = of.synthetic if isinstance(of, Run) else of
    pixels = seen(of) if syn.zca else (syn.pixels() * 255).round().byte().cpu()
    if pixels is None:
        return None
    images = pixels.unflatten(0, (len(syn.classes), syn.ipc))[:10, :10]  # [classes, ipc, C, H, W]
    drawn = look.mosaic(images.transpose(0, 1))
    scale = max(1, 640 // drawn.width)
    drawn = drawn.resize((drawn.width * scale, drawn.height * scale), Image.NEAREST)
    file = io.BytesIO()
    drawn.save(file, format="PNG", optimize=True)
    return file.getvalue()


def seen(of: Run | Synthetic) -> Tensor | None:
    """The pixels of a whitened set that `ddlib look` has kept beside its run, uint8 [n, C, H, W], or None."""
    return look.load(of).get("pixels") if isinstance(of, Run) else None


def of_set(path: str | Path) -> Run | Synthetic:
    """What a card of the set at `path` is of: its run, or the set alone where it was imported, and so has no record."""
    path = path_of("the path of a set", path)
    if is_there(path) and path.suffix == ".safetensors" and not is_there(path.with_suffix(".json")):
        syn = Synthetic.load(path)
        if "imported" in syn.spec:
            return syn
    return of_file(path)


def of_folder(of: Run | Synthetic) -> str:
    """The card that lies as README.md among the PNG files of `save_images`: the first image of ten classes, by row."""
    syn = of.synthetic if isinstance(of, Run) else of
    shown = zip(class_folders(syn.classes)[:10], syn.classes, strict=False)
    pictures = "\n".join(
        f'<img src="{name}/0000.png" alt="{html.escape(title)}" title="{html.escape(title)}" width="64">'
        for name, title in shown
    )
    more = "; the whitening is undone" if syn.zca else ""
    more += "; `labels.csv` has the labels" if syn.labels.is_floating_point() else ""
    use = (
        '```python\nfrom torchvision.datasets import ImageFolder\n\nimages = ImageFolder(".")\n```\n\n'
        f"Pixels are clamped to [0, 1] and have 8 bits; `set.json` has normalisation and protocol{more}."
    )
    return card(of, pictures=pictures, use=use)


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
    theirs = place.startswith(("imagenet", "tinyimagenet", *SUBSETS))
    return IMAGENET if theirs else LICENCES.get(place, YOURS)


def _what(syn: Synthetic, made: dict) -> str:
    n, channels, height, width = syn.images.shape
    soft = syn.labels.is_floating_point()
    colours = f"{channels} channel{'s' if channels > 1 else ''}"
    size = f"{n} synthetic images of {height}x{width} px and {colours}"
    share = f"{syn.ipc} for each of {len(syn.classes)} classes"
    source = f"distilled from `{syn.dataset}` by `{made['method']}`"
    if "imported" not in made and "profile" in made:
        source += f" (`{made['profile']}` profile, seed {made.get('seed')})"
    parts = [
        f"{size}, {share}, {source}.",
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
    last_mean, best_mean = (tables.with_spread(s["mean"], s["std"]) for s in (last, best))
    figure = f"{last_mean} over {len(last['networks'])} networks"
    lines = [
        "| test accuracy (%) | |",
        "| --- | --- |",
        f"| after the last step ({last['step']}) | {figure} |",
        f"| the best on the way, chosen on the test set | {best_mean} |",
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
        f"{timed_on(record)}; peak {record['peak_bytes'] / 2**20:.0f} MiB ({record['peak_method']}). "
        f"{versions}. Data checksum `{record['dataset_checksum'][:12]}`, commit "
        f"`{(record['commit'] or 'not recorded')[:12]}`, {record['written']}."
    )


def _origin(syn: Synthetic) -> str:
    """What is known of the making of a set that has no record."""
    file = syn.spec.get("imported")
    known = isinstance(file, dict)  # a set from elsewhere may say anything there
    read = f"Read from `{file.get('file')}`, SHA-256 `{file.get('sha256')}`. " if known else ""
    return f"{read}Its settings, its cost and the machine are not known: no record lies beside it."


def _use(name: str) -> str:
    return (
        f"```python\nfrom ddlib import Synthetic, tensor_dataset\n"
        f'images_and_labels = tensor_dataset(Synthetic.load("{name}"))\n```\n\n'
        f"`ddlib evaluate {name}` scores it; `ddlib export {name} --to FOLDER` writes PNG files."
    )
