"""Where the rows of a study are kept: `results/PROFILE/studies/`, one JSON file per question."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Spec
from ..core import DDError
from ..engine.meter import commit
from ..files import lock, read_json, results_folder, sealed, write_json

VERSION = 1  # of `trajectories`, part of every name: raise it when a change there changes the rows


def _place(dataset: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", dataset).strip("_")


def cached(
    kind: str, spec: Spec, options: dict[str, Any], compute: Callable[[], list[dict]]
) -> pd.DataFrame:
    """The rows of a study from `results/PROFILE/studies/`, else computed and written there."""
    facts = json.dumps([spec.name, options, VERSION], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    name = f"{kind}-{spec.method}-{_place(spec.dataset)}-ipc{spec.ipc}-{digest}.json"
    path = results_folder() / spec.profile / "studies" / name
    if path.is_file():
        return pd.DataFrame(_rows(path))
    with lock(path, f"the study {name}"):
        if not path.is_file():  # another process may have made it meanwhile
            origin = {"study": kind, "run": spec.name, "values": spec.values, "commit": commit()}
            record = {**origin, "options": options, "rows": compute()}
            write_json(path, record)
    return pd.DataFrame(_rows(path))


def _rows(path: Path) -> list[dict]:
    cure = "delete it and run again"
    study = read_json(path, "study", cure)
    # Studies name their commit since they have a checksum.
    if "commit" in study and not sealed(path):
        raise DDError(f"the study {path} was altered: its checksum is missing; {cure}")
    rows = study.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DDError(f"the study {path} holds no rows; {cure}")
    return rows


def kept(kind: str, dataset: str = "", results: str | Path | None = None) -> pd.DataFrame:
    """All rows of the kept studies of one kind, on any dataset or on one and samples of it, whatever the profile and
    options."""
    folder = results_folder(results)
    place = f"*{_place(dataset)}*" if dataset else "*"
    paths = sorted(folder.glob(f"*/studies/{kind}-{place}-ipc*.json"))
    return pd.DataFrame([row for path in paths for row in _rows(path)])
