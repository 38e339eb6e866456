"""Where each setting of a run comes from: its value, the preset file and line that gives it, and the remark there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from ..config import layers, resolve


def table(method: str, dataset: str, ipc: int, profile: str = "smoke") -> pd.DataFrame:
    """One row a setting: key, value, source, remark; what presets give comes first, then plain defaults.

    `source` is FILE:LINE and the level in that file, or "default" where no preset names the key.
    """
    values = resolve(method, dataset, ipc, profile).values
    origins = {}
    for file, path, level in layers(method, dataset, ipc, profile):
        origins |= {key: (file, path) for key in level}
    rows = []
    for key in sorted(values, key=lambda key: (key not in origins, key)):
        source, remark = _place(*origins[key], key) if key in origins else ("default", "")
        rows.append({"key": key, "value": _value(values[key]), "source": source, "remark": remark})
    return pd.DataFrame(rows)


def _value(value: object) -> str:
    if value == "":
        return '""'
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _source(file: Path) -> tuple[yaml.Node, list[str]]:
    text = file.read_text()
    return yaml.compose(text), text.splitlines()


def _place(file: Path, path: tuple, key: str) -> tuple[str, str]:
    """("dm.yaml:14, profiles small ipc 1", the remark on the key's line, else on its level's)."""
    node, lines = _source(file)
    line = remark = None
    for step in (*path, key):
        line, node = _entry(node, str(step))
        remark = _remark(lines[line]) or (remark if step == key else "")
    return f"{file.name}:{line + 1}, {' '.join(map(str, path))}", remark


def _entry(mapping: yaml.MappingNode, key: str) -> tuple[int, yaml.Node] | None:
    """Line (from 0) and value of a key; keys that a `<<` merges in count, and the mapping's own come first."""
    merged = []
    for name, value in mapping.value:
        if name.value == key:
            return name.start_mark.line, value
        if name.value == "<<":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
    for other in merged:
        found = _entry(other, key)
        if found:
            return found
    return None


def _remark(line: str) -> str:
    return line.partition(" # ")[2].strip() if not line.lstrip().startswith("#") else ""
