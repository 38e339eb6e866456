"""Each defect of the first review of faults has a test, and the page that says so names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| (\d+) \| .+? \| (.+) \|$", (ROOT / "docs" / "defects.md").read_text(), re.MULTILINE
)


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_defect_has_tests_that_exist():
    assert [int(number) for number, _ in ROWS] == [*range(1, 27)]
    for number, named in ROWS:
        words = re.findall("`([^`]+)`", named)
        assert words[0].endswith(".py") and len(words) > 1, number
        for word in words:
            if word.endswith(".py"):
                known = functions_of(word)
            else:
                assert word in known, (number, word)
