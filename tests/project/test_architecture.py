"""The walk through the house names what exists, and imports run one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from ddlib.methods.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
WALK = (ROOT / "docs" / "architecture.md").read_text()


def names_of(path: Path) -> set[str]:
    """Functions, methods, classes and plain variables of a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_walk_names_what_exists():
    stops = re.findall(r"^\d+\. (.*?)(?=^\d+\. |\n\n)", WALK, re.MULTILINE | re.DOTALL)
    assert len(stops) == 12
    for stop in stops:
        words = re.findall(r"`([^`]+)`", stop)
        files = [word for word in words if word.startswith("ddlib/")]
        assert files and all((ROOT / file).is_file() for file in files), stop
        known = set().union(*(names_of(ROOT / f) for f in files if f.endswith(".py")))
        plain = {word for word in words if re.fullmatch(r"[A-Za-z_]+", word)}
        assert plain and plain <= known, plain - known


def test_the_walk_is_short():
    walk = WALK[: WALK.index("Imports run one way")]
    files = re.findall(r"ddlib/[\w./]+", walk)
    assert len(set(files)) <= 12 and files[0].startswith("ddlib/data/")
    assert len(walk.splitlines()) < 40


def test_imports_run_one_way():
    command = "from importlinter.cli import lint_imports_command as main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-500:]


def test_every_methods_module_names_the_pages_with_its_figures():
    pages = set()
    for module in BUILT_IN:
        text = ast.get_docstring(ast.parse((ROOT / f"ddlib/methods/{module}.py").read_text()))
        named = re.findall(r"docs/methods/\w+\.md", text)
        assert named, module
        pages |= set(named)
    assert all("<!-- records:begin" in (ROOT / page).read_text() for page in pages)
    assert len(pages) == len(list((ROOT / "docs/methods").glob("*.md"))) - 1  # less the index
