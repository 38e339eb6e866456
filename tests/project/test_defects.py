"""Each defect of the first review of faults has a test, and the page that says so names tests that exist."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "defects.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| .+? \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_defect_has_tests_that_exist():
    assert [int(number) for number, _, _ in ROWS] == [*range(1, 27)]
    for number, named, _ in ROWS:
        words = re.findall("`([^`]+)`", named)
        assert words[0].endswith(".py") and len(words) > 1, number
        for word in words:
            if word.endswith(".py"):
                known = functions_of(word)
            else:
                assert word in known, (number, word)


def test_every_defect_names_a_commit_at_which_it_was_there():
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=False)
    if git("cat-file", "-e", "99e6fe5^{commit}").returncode:
        pytest.skip("needs the whole history")
    for number, _, failed in ROWS:
        commits = re.findall(r"\b[0-9a-f]{7}\b", failed)
        assert commits, number
        for commit in commits:
            assert not git("merge-base", "--is-ancestor", commit, "HEAD").returncode, commit
