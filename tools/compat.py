"""The oldest and the newest torch that ddlib supports on every Python that it supports: `make compat`.

Each pair is installed into an environment of its own, some 6 GB and minutes each, in a folder that is removed, and
tried by the tests of TESTS. What cannot be had on a machine, a Python that is not there or a torch that its index does
not offer, is named in one sentence and is no failure. `--only 3.12` or `--only 3.12-oldest` takes a part. The record is
results/campaigns/compat.json, a row a pair: the versions, the last line of the tests, the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from ddlib.engine.meter import commit
from ddlib.files import update_json

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TESTS = (
    "unit/test_synthetic",
    "unit/test_faults",
    "oracles/test_dm",
    "oracles/test_unroll",
    "unit/test_runs",
)
BUILDS = ("torch", "torchvision")
RECORD = ROOT / "results" / "campaigns" / "compat.json"
VERSIONS = (
    "import json, platform, torch, torchvision as vision;"
    "print(json.dumps(dict(python=platform.python_version(), torch=torch.__version__, torchvision=vision.__version__)))"
)


def versions(which: str) -> list[str]:
    """The requirements of torch and torchvision: the pins, or the lower bounds of pyproject.toml."""
    if which == "newest":
        pins = (ROOT / "constraints.txt").read_text()
        return [re.search(rf"^{name}==\S+", pins, re.MULTILINE)[0] for name in BUILDS]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [text.replace(">=", "==") + ".*" for text in project["dependencies"]]
    return [text for text in bounds if text.partition("==")[0] in BUILDS]


def found(python: str) -> str | None:
    """A Python of this version that runs: on the path, or one of pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    ours = root.glob(f"versions/{python}*/bin/python{python}")
    for path in (shutil.which(f"python{python}"), *map(str, sorted(ours))):
        if path and not subprocess.run([path, "-V"], check=False, capture_output=True).returncode:
            return path
    return None


def environment(python: str, which: str, place: Path) -> Path | None:
    """The interpreter of a new environment; None where this Python or this torch cannot be had."""
    interpreter = found(python)
    if not interpreter:
        return None
    subprocess.run([interpreter, "-m", "venv", place], check=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in pins if line.partition("==")[0] not in BUILDS]
    (place / "constraints.txt").write_text("\n".join([*kept, *versions(which)]))
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    words += ["-c", place / "constraints.txt", "-e", f"{ROOT}[test]"]
    done = subprocess.run(
        [place / "bin" / "python", *words], check=False, capture_output=True, text=True
    )
    if done.returncode and "No matching distribution" not in done.stderr:
        raise SystemExit(done.stderr[-2000:])
    return None if done.returncode else place / "bin" / "python"


def tried(python: str, which: str) -> dict[str, str] | None:
    """One pair's row of the record; None where it cannot be had."""
    with tempfile.TemporaryDirectory() as place:
        interpreter = environment(python, which, Path(place) / "env")
        if interpreter is None:
            return None
        installed = subprocess.run([interpreter, "-c", VERSIONS], check=True, capture_output=True)
        files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
        words = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `make test` does
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, cwd=ROOT, env=alone
        )
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    print(*(line for line in said if line.startswith(("FAILED", "ERROR"))), sep="\n")
    end = {"tests": said[-1].strip("= "), "passed": done.returncode == 0}
    return json.loads(installed.stdout) | end | {"commit": commit()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    names = [f"{python}-{which}" for python in PYTHONS for which in ("oldest", "newest")]
    missing, failed = [], False
    for name in (name for name in names if name.startswith(tuple(args.only))):
        row = tried(*name.split("-"))
        if row is None:
            missing.append(name)
            continue
        update_json(args.out, "record of the pairs", "run make compat", {name: row})
        print(name, *row.values(), flush=True)
        failed |= not row["passed"]
    if missing:
        print(f"not to be had on this machine, so not tried: {', '.join(missing)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
