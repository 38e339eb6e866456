"""Every method by name: ours, and those that other packages offer under the entry point group `ddlib.methods`.

    @register("idm", paper="CVPR 2023")        # in a module of another package, whose pyproject.toml says
    class IDM(ImageMethod): ...                # [project.entry-points."ddlib.methods"]  idm = "its_module:IDM"

`METHODS[name]` is the class. A module is imported when its method is first asked for.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ..core import KINDS, DDError, kind_of

GROUP = "ddlib.methods"
BUILT_IN = {
    "coreset": ("random", "herding", "kcenter", "kmeans", "forgetting"),
    "gradient": ("dc", "dsa", "idc"),
    "dream": ("dream", "dream_plus"),
    "dm": ("dm",),
    "trajectory": ("mtt", "tesla", "ftd", "datm"),
    "frepo": ("frepo",),
}
NAME = re.compile(r"[A-Za-z0-9_]+")  # a part of the names of files and commands
MEMBERS = ("Config", "version", "step", "state_dict", "load_state_dict", "result", "summary")
ROOM = __name__.rpartition(".")[0]  # ddlib.methods


@dataclasses.dataclass(frozen=True)
class Registration:
    """A method as it was registered, with what reports may show of it."""

    name: str
    cls: type
    paper: str = ""  # where to read about it: an arXiv number, or venue and year
    presets: Path | None = None  # the YAML beside the class, where there is one
    protocol: str = ""  # of its evaluation, where no preset names one; "" is the common preset's
    colour: str = ""  # in plots; "" is the next one of a cycle
    # Settings that are the method's own, and the values they may have (`BaseMethod.only`)
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)


def register(
    name: str,
    *,
    paper: str = "",
    presets: str = "",
    protocol: str = "",
    colour: str = "",
) -> Callable[[type], type]:
    """A decorator that offers a class as the method `name`; see `Registration` for the rest, all of it optional.

    `presets` is the name of a file beside the class's module; without one, NAME.yaml is read if it is there, and the
    defaults of the Config are the method's settings if not. Raises `DDError` for a name that is taken or that no file
    can have, and for a class that lacks a part of the contract (`ddlib.methods.base.Method`).
    """

    def decorate(cls: type) -> type:
        _check(name, cls)
        folder = _folder(cls)
        preset = presets or f"{getattr(cls, 'preset', '') or name}.yaml"
        METHODS.add(
            Registration(
                name,
                cls,
                paper=paper,
                presets=_file(folder, preset, name, required=bool(presets)),
                protocol=protocol,
                colour=colour,
                only=getattr(cls, "only", {}),
            )
        )
        return cls

    return decorate


def _folder(cls: type) -> Path | None:
    """Where the class's module lies; None for a class of a notebook."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file).parent if file else None


def _file(folder: Path | None, name: str, method: str, *, required: bool) -> Path | None:
    path = folder / name if folder else None
    if path and path.is_file():
        return path
    if required:
        raise DDError(f"the method {method!r} names {name}, which does not lie beside its module")
    return None


def _check(name: str, cls: type) -> None:
    """Raise `DDError` where `cls` is no method; its instances are checked when one is made."""
    what = f"the method {name!r} ({cls.__module__}.{cls.__qualname__})"
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise DDError(f"{what} has a name that files cannot have: take letters, digits and _ alone")
    missing = [member for member in (*MEMBERS, "needs") if getattr(cls, member, None) is None]
    if missing:
        raise DDError(
            f"{what} lacks {', '.join(missing)}: add it, or derive from ddlib.methods.base.ImageMethod"
        )
    if not dataclasses.is_dataclass(cls.Config):
        raise DDError(f"{what} has a Config that is no dataclass: decorate it with @dataclass")
    fields = {field.name: field for field in dataclasses.fields(cls.Config)}
    if "iterations" not in fields:
        raise DDError(
            f"{what} has no field `iterations` in its Config: add it, the number of steps"
        )
    if unknown := sorted(getattr(cls, "only", {}).keys() - fields.keys()):
        raise DDError(
            f"{what} names {', '.join(unknown)} in `only`, which its Config lacks: add the field, or "
            "take it out of `only`"
        )
    for field in fields.values():
        if field.default is dataclasses.MISSING:
            raise DDError(f"{what} has no default for {field.name} in its Config: give it one")
        if kind_of(field) not in KINDS:
            raise DDError(
                f"{what} has a {kind_of(field)} in its Config, {field.name}; allowed: {', '.join(KINDS)}"
            )


class Methods(Mapping):
    """name -> class, in a fixed order: ours first, then those of other packages by name."""

    def __init__(self) -> None:
        self._registered: dict[str, Registration] = {}
        self._offered: dict[str, EntryPoint] | None = None

    def add(self, entry: Registration) -> None:
        module = {name: f"{ROOM}.{module}" for module, names in BUILT_IN.items() for name in names}
        known = self._registered.get(entry.name)
        owner = module.get(entry.name) or (known and known.cls.__module__)
        # A module may be imported twice, and a notebook's cell run again.
        if owner and owner != entry.cls.__module__:
            raise DDError(
                f"the method name {entry.name!r} is taken by {owner}: register "
                f"{entry.cls.__module__}.{entry.cls.__qualname__} under another name"
            )
        self._registered[entry.name] = entry

    def registration(self, name: str) -> Registration:
        """What was said of a method when it was registered; an unknown name is a KeyError."""
        if name not in self._registered:
            for module, names in BUILT_IN.items():
                if name in names:
                    import_module(f"{ROOM}.{module}")
        if name not in self._registered and name in self._entry_points():
            _load(name, self._entry_points()[name])
        return self._registered[name]

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._offered is None:
            taken = {name for names in BUILT_IN.values() for name in names}
            self._offered = {}
            for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
                if point.name in taken:
                    warnings.warn(
                        f"the package {_package(point)} offers a method {point.name!r}, a name that is "
                        "taken: it is left out until that package gives it another name"
                    )
                    continue
                taken.add(point.name)
                self._offered[point.name] = point
        return self._offered

    def __getitem__(self, name: str) -> type:
        return self.registration(name).cls

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        ours = [name for names in BUILT_IN.values() for name in names]
        return iter(dict.fromkeys([*ours, *self._entry_points(), *self._registered]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _load(name: str, point: EntryPoint) -> None:
    try:
        cls = point.load()
    except DDError:
        raise
    except Exception as error:
        raise DDError(
            f"the method {name!r} of the package {_package(point)} cannot be imported "
            f"({type(error).__name__}: {error}): mend that package, or uninstall it"
        ) from error
    if name in METHODS._registered:
        return
    if not isinstance(cls, type):
        raise DDError(
            f"the entry point {name!r} of the package {_package(point)} is {point.value}, which is no class: "
            "name the class of the method"
        )
    register(name)(cls)


METHODS = Methods()
