"""A finished run as it lies in `results/`: its record, its distilled set, and the set under other conditions."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from ..config import PROFILES, Spec, dataset_of, defaults, resolve
from ..core import DDError, checksum, instance, path_of, pick_device, plain, shown, whole
from ..data.dataset import Dataset, derived, folder_checksum, minival_name, subset_name
from ..distilled import Synthetic
from ..files import is_there, lock, read_json, results_folder, sealed, update_json
from ..recipe import VERSION, Recipe
from ..train.evaluate import Evaluation, evaluate
from .checkpoint import check_score, threads_of
from .meter import machine

_CURE = "delete it and run again"
SIDE_FILES = (".transfer.json", ".confusion.json")  # rows beside a record, true of its set alone


def record_path(spec: Spec, results: str | Path | None = None) -> Path:
    """Where the record of a run lies, its set beside it: results/PROFILE/METHOD/NAME.json."""
    return results_folder(results) / spec.profile / spec.method / f"{spec.name}.json"


def record_paths(results: str | Path | None = None, profile: str = "*") -> list[Path]:
    """Every record of a results folder, by profile and name."""
    found = results_folder(results).glob(f"{profile}/*/*-seed*-????????.json")
    return sorted(found, key=lambda path: (path.parts[-3], path.name))


def checkpoint_path(spec: Spec, results: str | Path | None = None) -> Path:
    """Where an unfinished run keeps what it goes on from: results/PROFILE/checkpoints/NAME.safetensors."""
    return results_folder(results) / spec.profile / "checkpoints" / f"{spec.name}.safetensors"


@dataclass(frozen=True)
class Run:
    """A finished run: its record (a dict, see `record`) and, when asked for, its distilled set."""

    path: Path

    def __post_init__(self) -> None:
        path = path_of("the path of a run", self.path)
        if not path.name:
            raise DDError(
                f"the path of a run names its record, a JSON file: it is not {str(path)!r}"
            )
        object.__setattr__(self, "path", path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the run measured, as `dd.run` wrote it; a damaged record, or one of another name, is a `DDError`."""
        record = read_json(self.path, "record", _CURE)
        # Records name their threads since they have a checksum.
        if "threads" in record and not self.sealed:
            raise DDError(f"the record {self.path} was altered: its checksum is missing; {_CURE}")
        with _sense(f"the record {self.path} is no record of a run"):
            _check(record)
        if "threads" in record and record["name"] != self.path.stem:
            raise DDError(
                f"the record {self.path} is that of the run {record['name']}: give it that name, or "
                "delete it and run again"
            )
        return record

    @property
    def complete(self) -> bool:
        """Whether both files of the run, record and set, are there."""
        return is_there(self.path) and is_there(self.path.with_suffix(".safetensors"))

    @property
    def sealed(self) -> bool:
        """Whether a checksum covers the record; False for those of ddlib before its records had one."""
        return sealed(self.path)

    @property
    def results(self) -> Path:
        """The results folder that it lies in, or would if it were not elsewhere."""
        above = self.path.resolve().parents
        return above[min(2, len(above) - 1)]

    @cached_property
    def synthetic(self) -> Synthetic:
        """The distilled set; one that is not the record's is a `DDError`."""
        syn = Synthetic.load(self.path.with_suffix(".safetensors"))
        if not self.has_set(set_checksum(syn)):
            raise DDError(
                f"the set beside {self.path} is not the one of its record: one of the two was "
                "replaced; read the run again, or run with fresh=True (--fresh)"
            )
        return syn

    def has_set(self, made: str | None) -> bool:
        """Whether the set of this checksum is the record's; older records and rows name none and are believed."""
        return made in (None, self.record.get("set_checksum", made))

    @property
    def accuracy(self) -> float:
        """Test accuracy in per cent after the last step, mean over networks."""
        return self.record["accuracy"]["last"]["mean"]

    def transfer(
        self,
        backbone: str | None = None,
        *,
        networks: int = 3,
        protocol: str | None = None,
        epochs: int | None = None,
        augment: str | None = None,
        hard: bool = False,
        data: Dataset | None = None,
        device: str = "auto",
    ) -> dict[str, Any]:
        """The set under other conditions, as {backbone, mean, std, networks, ...} in per cent: another backbone
        (cross-architecture), another protocol or augmentation, or the images' classes as labels (`hard`).

        Kept beside the record in NAME.transfer.json, so a second call trains nothing and needs no data.
        """
        instance("backbone", backbone, str, None)
        instance("data", data, Dataset, None)
        for name, value in (("protocol", protocol), ("augment", augment)):
            instance(name, value, str, None)
        networks = whole("networks", networks, 1)
        epochs = None if epochs is None else whole("epochs", epochs, 1)
        hard = instance("hard", plain(hard), bool)
        path = self.path.with_suffix(".transfer.json")
        changes = {"protocol": protocol, "epochs": epochs, "augment": augment, "hard": hard or None}
        changes = {name: value for name, value in changes.items() if value is not None}
        backbone = backbone or self.synthetic.backbone
        words = (f"{name}={value}" for name, value in changes.items())
        key = ", ".join([f"{backbone} x {networks}", f"version {VERSION}", *words])
        rows = self.transferred()
        if key in rows:
            return rows[key]
        digest = hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()[:8]
        with lock(path.with_suffix(f".{digest}"), f"{key} of {self.path.stem}"):
            rows = self.transferred()
            if key not in rows:
                with threads_of(self.record["profile"]):
                    row = self._transferred(backbone, networks, changes, data, device)
                rows = update_json(
                    path, "side file", _CURE, {key: row}, lambda: self._refuse_replaced(row)
                )
        return rows[key]

    def transferred(self) -> dict[str, dict[str, Any]]:
        """The rows that `transfer` has kept of this set, by their key."""
        rows = side_file(self.path.with_suffix(".transfer.json"))
        return {key: row for key, row in rows.items() if self.has_set(row.get("set_checksum"))}

    def _refuse_replaced(self, row: dict[str, Any]) -> None:
        if not Run(self.path).has_set(row["set_checksum"]):
            raise DDError(
                f"the set beside {self.path} was replaced while its transfer was at work: ask again"
            )

    def _transferred(
        self,
        backbone: str,
        networks: int,
        changes: dict[str, Any],
        data: Dataset | None,
        device: str,
    ) -> dict[str, Any]:
        spec, syn = resolve_record(self.record), self.synthetic
        if changes.get("hard"):
            syn = syn.hardened()
        data = usable(data, spec)
        refuse_other_images(self, spec, data)
        data = data or dataset_of(spec, pick_device(device))
        result = evaluate(
            syn,
            data,
            backbone=backbone,
            networks=networks,
            recipe=_recipe(syn, spec, changes),
            seed=spec.seed,
            compile=spec.run.compile,
            precision=spec.run.eval_precision,
        )
        return {
            **changes,
            "backbone": backbone,
            **summary(self.record["accuracy"]["last"]["step"], result),
            "seconds": round(result.seconds, 3),
            "device": machine(data.device),
            "set_checksum": set_checksum(self.synthetic),
        }

    def __repr__(self) -> str:
        last = self.record["accuracy"]["last"]
        return f"Run({self.path.stem}: {last['mean']:.1f} ± {last['std']:.1f} %)"


def _recipe(syn: Synthetic, spec: Spec, changes: dict[str, Any]) -> Recipe:
    """The set's own protocol, or another one as the baselines are evaluated under it, with what changes."""
    augment, recipe = changes.get("augment"), syn.recipe
    if "protocol" in changes or "epochs" in changes:
        settings = {
            "protocol": changes.get("protocol", spec.run.protocol),
            "eval_epochs": changes.get("epochs"),
        }
        recipe = resolve("random", spec.dataset, spec.ipc, spec.profile, **settings).recipe
    if augment:
        recipe = replace(recipe, augment=augment)
    # CutMix augments too.
    return replace(recipe, cutmix=0.0) if augment == "none" else recipe


def set_checksum(syn: Synthetic) -> str:
    """The checksum by which a record and the rows beside it name their set."""
    return checksum(syn.images, syn.labels)


def side_file(path: Path) -> dict[str, Any]:
    """The rows kept beside a record, by their key; none where there is no such file yet.

    A row is a score of `Run.transfer`, or the lines of a confusion matrix; another is a `DDError`.
    """
    # No such file, too, where the name is longer than a file's can be
    rows = read_json(path, "side file", _CURE) if os.path.exists(path) else {}
    with _sense(f"the side file {path} holds something else than rows"):
        for key, row in rows.items():
            if path.name.endswith(".transfer.json"):
                _check_transfer(key, row)
            else:
                _check_counts(row)
    return rows


@contextmanager
def _sense(what: str) -> Iterator[None]:
    """Say `what` and the cure where the contents of a file fail a check."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DDError(f"{what} ({type(error).__name__}: {error}); {_CURE}") from error


def _check_transfer(key: str, row: dict[str, Any]) -> None:
    if not re.fullmatch(r".+ x \d+, version \d+(, .+)?", key, re.DOTALL):
        raise ValueError(f"a key is {shown(key)}")
    if not isinstance(row["backbone"], str):
        raise TypeError(f"a backbone is {shown(row['backbone'])}")
    check_score(row)


def _check_counts(row: list[list[int]]) -> None:
    if not all(len(line) == len(row) and {*map(type, line)} == {int} for line in row):
        raise ValueError(f"a confusion matrix is {shown(row)}")


def _check(record: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless the record has what every table reads of it."""
    for key, kind in _TYPES.items():
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise TypeError(f"{key} is {shown(record[key])}")
    # Its method may be one of a package that is not installed here: tables leave such a record out.
    if record["profile"] not in PROFILES:
        raise ValueError(f"profile is {shown(record['profile'])}")
    for part in ("distill", "evaluate"):
        float(record["seconds"][part])
    if not record["evaluations"]:
        raise ValueError("evaluations are none")
    last = record["accuracy"]["last"]
    for score in (last, *record["accuracy"].values(), *record["evaluations"]):
        check_score(score)
    for number in [row["step"] for row in record["history"]] + record.get("together", []):
        number + 0


_TYPES = {
    "name": str,
    "method": str,
    "dataset": str,
    "ipc": int,
    "profile": str,
    "seed": int,
    "values": dict,
    "backbone": str,
    "recipe": dict,
    "accuracy": dict,
    "evaluations": list,
    "history": list,
    "seconds": dict,
    "peak_bytes": int,
    "peak_method": str,
    "device": str,
}


def usable(data: Dataset | None, spec: Spec) -> Dataset | None:
    """`data` where it is what `dataset_of(spec)` would load, None where that has the images in another form.

    Raises `DDError` for data of another name, and for a part of the named ones or arrays under their name, whose run
    would pass for one of the named.
    """
    if data is None:
        return None
    if data.name != spec.dataset:
        raise DDError(
            f"the data are {data.name!r} and the run is of {spec.dataset!r}: give both one name, or "
            "leave the data out"
        )
    if data.part:
        raise DDError(
            f"the data are not what load({data.name!r}) gives ({data.part}): leave them out; of a part "
            "say subset=IMAGES_PER_CLASS or minival=SHARE, which the record keeps"
        )
    run = spec.run
    fits = (
        (data.zca.kind if data.zca else "") == run.zca
        and not run.subset
        and not run.minival
        and run.resolution in (0, data.shape[-1])
    )
    return data if fits else None


def timed_on(record: dict[str, Any]) -> str:
    """The device of a record, and the other runs that its seconds and peak memory hold too."""
    others = [str(ipc) for ipc in record.get("together", ()) if ipc != record["ipc"]]
    return record["device"] + (f", together with IPC {', '.join(others)}" if others else "")


def refuse_other_images(run: Run, spec: Spec, data: Dataset | None) -> None:
    """Raise `DDError` where the kept run was made from other images than `data`, or than its folder holds now.

    A folder that is not at hand cannot be asked: its record stands as it is.
    """
    made = run.record.get("dataset_checksum")
    present = data.checksum if data else _present_checksum(spec)
    if made and present and made != present:
        raise DDError(
            f"the record {run.path} was made from other images of the name {spec.dataset!r}: give "
            "these another name, or run with fresh=True (--fresh), which replaces the record"
        )


def _present_checksum(spec: Spec) -> str | None:
    """The checksum of the images that a run of `spec` would see now, where a folder may have changed."""
    if not spec.dataset.startswith("folder:"):
        return None
    run = spec.run
    found = folder_checksum(spec.dataset, run.resolution or None)
    if found and run.subset:
        found = derived(found, subset_name(run.subset))
    if found and run.minival:
        found = derived(found, minival_name(run.minival))
    return found


def resolve_record(record: dict[str, Any]) -> Spec:
    """The spec of a stored record, as `spec.name` was computed from; a key younger than the record has its default."""
    facts = {key: record[key] for key in ("method", "dataset", "ipc", "profile", "seed")}
    return Spec(**facts, values=defaults(record["method"]) | record["values"])


def summary(step: int, result: Evaluation) -> dict[str, Any]:
    """An evaluation after `step` as records keep it."""
    extras = {
        name: {"mean": fmean(values), "std": pstdev(values), "networks": list(values)}
        for name, values in result.extras.items()
    }
    return {
        "step": step,
        "mean": result.mean,
        "std": result.std,
        "networks": list(result.accuracies),
    } | extras
