"""Every fault of docs/faults.md is shown absent by a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from pages import DOCS, ROOT, table, text_of

# Parts that are planned; a row may wait for one of them and for nothing else.
PLANNED = (
    *("durable queue", "server", "archives", "clean-up", "metrics"),
    *("shell", "ws", "grpc"),
)
NOTHING = "\N{EN DASH}"
FAULTS = [row for row in table(text_of(DOCS / "faults.md")) if row[0] != "#"]


@cache
def shown_by(path: Path) -> set[str]:
    """Return ``test_x`` and ``TestY::test_x`` of a file, without importing it."""
    found: set[str] = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            found |= {f"{node.name}::{method.name}" for method in methods}
    return found


def test_every_fault_has_one_row() -> None:
    earlier = [str(number) for number in range(1, 63)]
    second, third = [f"T{n}" for n in range(1, 14)], [f"F{n}" for n in range(1, 20)]
    assert [row[0] for row in FAULTS] == [*earlier, *second, *third]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[0])
def test_a_fault_is_shown_absent_or_waits_for_a_planned_part(row: list[str]) -> None:
    _, fault, claim, shown = row
    tests = re.findall(r"`([^`]+)`", shown)
    waits = re.search(r"\bwith (.+)$", shown)
    assert fault
    assert (claim != NOTHING) == bool(tests), "what is claimed needs a test"
    assert tests or waits
    if waits:
        assert waits[1] in PLANNED
    for test in tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert name in shown_by(ROOT / file), test
