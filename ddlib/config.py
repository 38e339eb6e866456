"""What a run is: method, dataset, IPC, profile, seed and overrides, resolved against the presets and hashed."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from .augment.siamese import check_strategy
from .core import DDError, check_only, choose, fields_from, instance, option, shown, whole
from .data.dataset import Dataset, canonical, load
from .data.zca import KINDS
from .methods import METHODS
from .recipe import PRECISIONS, VERSION, Recipe, own_augment, protocol, usual_epochs

PROFILES = ("smoke", "small", "paper")
PRESETS = Path(__file__).parent / "methods"  # beside the classes
COMMON = PRESETS / "common.yaml"


@dataclass(frozen=True)
class RunConfig:
    """What every run has beside its method's own configuration."""

    backbone: str = "convnet"  # network of distillation and evaluation, e.g. convnet:width=32
    # Another network for the evaluation, e.g. FRePo's without norm; "" is the same
    eval_backbone: str = ""
    protocol: str = "dsa"  # of the evaluation, a name of `recipe.PROTOCOLS`
    # E of the protocol, which makes E + 1 passes in the DC family
    eval_epochs: int = option(1000, least=1)
    # Of distillation, and of evaluation in the DC family
    augment: str = "color_crop_cutout_flip_scale_rotate"
    # Of evaluation; "" is `augment` in the DC family, else the protocol's own
    eval_augment: str = ""
    mirror: bool = True  # a mirrored image keeps its class; False takes the flip out of a protocol's own augmentation
    networks: int = option(5, least=1)  # fresh networks per evaluation
    # Step size of the evaluation; 0 is the protocol's, or the learned one
    eval_lr: float = option(0.0, least=0)
    # Evenly spaced over the run; the last one is after the last step
    evaluations: int = option(1, least=1)
    # Copies of the images kept on the way, to look at
    snapshots: int = option(0, least=0, most=10_000)
    zca: str = option("", allowed=("", *KINDS))  # whitening in place of mean and standard deviation
    resolution: int = option(0, least=0)  # pixels a side; 0 is the dataset's own
    # Share of train kept from distillation, to select a checkpoint on; 0 is off
    minival: float = option(0.0, least=0, below=1)
    # Training images per class to use, drawn once by seed 0; 0 is all of them
    subset: int = option(0, least=0)
    compile: bool = False  # torch.compile networks where there is a compiler
    # Of the evaluation networks' passes; bf16 is autocast, weights and loss stay float32
    eval_precision: str = option("float32", allowed=PRECISIONS)


@dataclass(frozen=True)
class Spec:
    """One run, fully resolved. `name` is unique to everything that can change its result."""

    method: str
    dataset: str
    ipc: int
    profile: str
    seed: int
    values: dict[str, Any]  # every key of the method's Config and of RunConfig

    @property
    def case(self) -> dict[str, Any]:
        """All but its values, by the names of `resolve` and `run`."""
        names = ("method", "dataset", "ipc", "profile", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def run(self) -> RunConfig:
        return fields_from(RunConfig, _subset(RunConfig, self.values), "preset")

    @property
    def config(self) -> Any:
        """The method's own configuration."""
        cls = METHODS[self.method].Config
        return fields_from(cls, _subset(cls, self.values), "preset")

    @property
    def recipe(self) -> Recipe:
        run = self.run
        recipe = protocol(
            run.protocol,
            epochs=run.eval_epochs,
            mirror=run.mirror,
            augment=run.eval_augment or (None if own_augment(run.protocol) else run.augment),
        )
        if run.eval_augment:  # asked for, so also where the protocol has none
            recipe = replace(recipe, augment=run.eval_augment)
        return replace(recipe, lr=run.eval_lr) if run.eval_lr else recipe

    @property
    def overrides(self) -> dict[str, Any]:
        """The values that are not the preset's."""
        preset = resolve_anyway(self.method, self.dataset, self.ipc, self.profile).values
        return {key: value for key, value in self.values.items() if preset.get(key) != value}

    def command(self, verb: str = "run") -> str:
        """What to type for this run (its seed apart), or for the experts that it needs."""
        words = ["python", "-m", "ddlib", instance("verb", verb, str), self.method]
        words += ["--dataset", self.dataset, "--ipc", str(self.ipc), "--profile", self.profile]
        for key, value in self.overrides.items():
            text = value if yaml.safe_load(str(value)) == value else json.dumps(value)
            words += ["--set", f"{key}={text}"]
        return shlex.join(words)

    @property
    def name(self) -> str:
        # Values at their defaults stay out, so that a new key leaves the names of old records alone.
        plain = defaults(self.method)
        chosen = {key: value for key, value in self.values.items() if value != plain.get(key)}
        facts = json.dumps(
            [asdict(self) | {"values": chosen}, METHODS[self.method].version, VERSION],
            sort_keys=True,
        )
        place = re.sub(r"[^A-Za-z0-9]+", "_", self.dataset).strip("_")
        return (
            f"{self.method}-{place}-ipc{self.ipc}-{self.profile}-seed{self.seed}-"
            f"{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
        )


def defaults(method: str) -> dict[str, Any]:
    """Every key of the method's Config and of `RunConfig` with its default."""
    return {
        field.name: field.default
        for cls in (RunConfig, METHODS[method].Config)
        for field in fields(cls)
    }


def _subset(cls: type, values: dict) -> dict:
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


class _Unambiguous(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, where PyYAML takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.value, key.tag), key.start_mark.line + 1
            if name in lines and key.value != "<<":
                raise DDError(
                    f"key {key.value!r} stands twice in one level, in lines {lines[name]} and {line}: "
                    "delete one of them"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


@cache
def preset(path: Path) -> dict:
    """The levels of a preset file; one that cannot be read is a `DDError` that names file, key and lines."""
    try:
        found = yaml.load(path.read_text(), _Unambiguous) or {}
    except DDError as error:
        raise DDError(f"preset {path.name}: {error}") from None
    except OSError as error:
        raise DDError(f"cannot read the preset {path.name}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise DDError(f"preset {path.name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise DDError(
            f"preset {path.name} must hold levels (defaults, methods, datasets, profiles)"
        )
    return found


def _beside(method: str) -> dict:
    """The presets beside the class of a method, {} where there are none."""
    path = METHODS.registration(method).presets
    try:
        return preset(path) if path else {}
    except DDError as error:
        raise DDError(f"the method {method!r} has presets that cannot be used: {error}") from None


def preset_files(method: str) -> dict[Path, dict]:
    """The presets of a method by file, the weaker first: what all methods share, and those beside its class."""
    path = METHODS.registration(method).presets
    return {COMMON: preset(COMMON)} | ({path: _beside(method)} if path else {})


def layers(method: str, dataset: str, ipc: int, profile: str) -> Iterator[tuple[Path, tuple, dict]]:
    """What a preset is laid from, the weakest first: (file, keys down to a level, the level's plain keys)."""
    place, own = canonical(dataset), ("methods", method)
    levels = (
        ("defaults",),
        own,
        ("datasets", place),
        ("profiles", profile),
        (*own, "profiles", profile),
    )
    for path in levels:
        for file, level in preset_files(method).items():
            for key in path:
                level = (level or {}).get(key)
            level = level or {}
            if file == COMMON and level.get("iterations", 0) > defaults(method)["iterations"]:
                # What all methods share shortens a run, and lengthens none
                level = {key: value for key, value in level.items() if key != "iterations"}
            yield from _exceptions(file, path, level, place, ipc)


def _exceptions(
    file: Path, path: tuple, level: dict, dataset: str, ipc: int
) -> Iterator[tuple[Path, tuple, dict]]:
    """A level's plain keys, then those of its exceptions for this IPC and for this dataset."""
    nested = ("profiles", "datasets", "ipc")
    yield file, path, {key: value for key, value in level.items() if key not in nested}
    if ipc in (level.get("ipc") or {}):
        yield file, (*path, "ipc", ipc), level["ipc"][ipc] or {}
    if dataset in (level.get("datasets") or {}):
        deeper = (*path, "datasets", dataset)
        yield from _exceptions(file, deeper, level["datasets"][dataset] or {}, dataset, ipc)


def _brought_along(protocol: str, dataset: str, ipc: int) -> dict[str, Any]:
    """What a protocol that is asked for by name changes in the paper profile: its usual epochs, and exceptions."""
    values = {"eval_epochs": usual_epochs(protocol)}
    path = ("protocols", protocol)
    level = preset(COMMON)["protocols"].get(protocol, {})
    for _, _, exception in _exceptions(COMMON, path, level, canonical(dataset), ipc):
        values |= exception
    return values


def resolve(
    method: str, dataset: str, ipc: int, profile: str = "smoke", seed: int = 0, **overrides: Any
) -> Spec:
    """Find the preset, apply `overrides` (keys of the method's Config and of `RunConfig`) and validate every value.

    Raises `DDError` naming the unknown or impossible part and what is allowed. In the profile `paper` a setting that
    paper and code give by dataset or IPC, and not for this one, is refused too, unless `overrides` give it.
    """
    spec = _resolved(method, dataset, ipc, profile, seed, overrides)
    if profile == "paper":
        _refuse_unpublished(method, dataset, ipc, overrides)
    return spec


def resolve_anyway(method: str, dataset: str, ipc: int, profile: str, **overrides: Any) -> Spec:
    """As `resolve`, but where paper and code give no setting, defaults stand in. For what distils nothing."""
    return _resolved(method, dataset, ipc, profile, 0, overrides)


def _refuse_unpublished(method: str, dataset: str, ipc: int, overrides: dict[str, Any]) -> None:
    """Raise where a class's default would pass for the paper's setting.

    The rows of a preset's `ipc:` and `datasets:` are what paper and code give. Beside them, a key that the rows set
    has no value of theirs, and none else in the presets counts but a plainer level's.
    """
    rows, place = _beside(method), canonical(dataset)
    given = {key for key, value in overrides.items() if value is not None}
    for _, _, level in layers(method, dataset, ipc, "paper"):
        given |= level.keys()
    for level in (rows.get("methods", {}).get(method) or {}, rows):
        for known, keys in _tables(level, place, ipc):
            if missing := sorted(keys - given):
                raise DDError(
                    f"neither paper nor code gives {', '.join(missing)} of {method} on {place} at IPC {ipc}, "
                    f"only for {known}: set each of them, or take another profile than paper"
                )


def borrowed(method: str, dataset: str, ipc: int) -> bool:
    """Whether the paper profile has another row's or method's settings here, since no source gives its own."""
    rows = _beside(method).get("borrowed", {}).get(method, {})
    ipcs = rows.get(canonical(dataset), ())
    return ipcs == "all" or ipc in ipcs


def _tables(level: dict, dataset: str, ipc: int) -> Iterator[tuple[str, set[str]]]:
    """Of each table in a level that has no row for this case: the rows that it has, and the keys that they set."""
    by_ipc, by_dataset = level.get("ipc") or {}, level.get("datasets") or {}
    if by_ipc and ipc not in by_ipc:
        keys = set().union(*(row or {} for row in by_ipc.values()))
        yield "IPC " + ", ".join(map(str, by_ipc)), keys
    if dataset in by_dataset:
        yield from _tables(by_dataset[dataset] or {}, dataset, ipc)
    elif by_dataset:
        keys = set.intersection(*(_row_keys(row or {}) for row in by_dataset.values()))
        yield ", ".join(by_dataset), keys


def _row_keys(row: dict) -> set[str]:
    """The keys that a dataset's row sets at every IPC of its own."""
    by_ipc = [set(level or {}) for level in (row.get("ipc") or {}).values()]
    plain = row.keys() - {"ipc", "datasets", "profiles"}
    return plain | (set.intersection(*by_ipc) if by_ipc else set())


def _resolved(
    method: str, dataset: str, ipc: int, profile: str, seed: int, overrides: dict[str, Any]
) -> Spec:
    cls = METHODS[choose("method", method, METHODS)]
    choose("profile", profile, PROFILES)
    if not isinstance(dataset, str):
        raise DDError(f"dataset must be a name or folder:PATH, not {shown(dataset)}")
    ipc, seed = whole("ipc", ipc, 1), whole("seed", seed, 0)
    allowed = sorted({f.name for c in (cls.Config, RunConfig) for f in fields(c)})
    values: dict[str, Any] = {}
    levels = list(layers(method, dataset, ipc, profile))
    for _, _, level in levels:
        values |= level
    own = METHODS.registration(method).protocol
    if own and not any("protocol" in level for file, _, level in levels if file != COMMON):
        values["protocol"] = own
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("protocol", values.get("protocol")) != values.get("protocol"):
        values.pop("eval_augment", None)  # it belongs to the preset's protocol
    values |= given
    if profile == "paper" and "protocol" in given:
        values |= _brought_along(given["protocol"], dataset, ipc) | given
    for key in values:
        choose(f"preset key for {method}", key, allowed)
    if given.get("kind", method) != method:
        raise DDError(
            f"kind {given['kind']!r} is another method: ask for that one, not for {method}"
        )
    configs = [fields_from(c, _subset(c, values), "preset") for c in (cls.Config, RunConfig)]
    check_only(method, METHODS.registration(method).only, configs[0])
    spec = Spec(method, dataset, ipc, profile, seed, asdict(configs[0]) | asdict(configs[1]))
    _check_evaluation(spec)
    check_strategy(spec.run.augment)
    return spec


def _check_evaluation(spec: Spec) -> None:
    """Raise `DDError` for an impossible protocol: now, not after the distillation."""
    instance("the recipe", spec.recipe, Recipe)


def load_as(name: str, values: Mapping[str, Any], device: str | torch.device) -> Dataset:
    """The dataset in the form that a run with these values sees: its resolution and whitening."""
    resolution, zca = values.get("resolution") or None, values.get("zca") or None
    return load(name, device=device, resolution=resolution, zca=zca)


def dataset_of(spec: Spec, device: torch.device) -> Dataset:
    """The dataset that a run sees: its resolution, whitening and subset applied."""
    run, data = spec.run, load_as(spec.dataset, spec.values, device)
    data = data.subset(run.subset) if run.subset else data
    return data.minival(run.minival) if run.minival else data
