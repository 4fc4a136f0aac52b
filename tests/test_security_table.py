"""``docs/security.md`` names only tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    line
    for line in (ROOT / "docs/security.md").read_text().partition("## Attacks, guards, tests")[2].splitlines()
    if line.startswith("| ") and not line.startswith(("| attack |", "| --- "))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_each_attack_names_a_test_that_exists(row: str) -> None:
    """At least one, by file and function."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named
    for file, function in named:
        definitions = ast.parse((ROOT / file).read_text()).body
        functions = [node for node in definitions if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert function in {node.name for node in functions}


def test_the_table_is_found() -> None:
    """A heading that was renamed must not make all of this pass."""
    assert len(ROWS) >= 58
