"""Runs of each broken executor the one check alone that should reject it, when asked to."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--expected-alone", action="store_true")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--expected-alone"):
        items[:] = [item for item in items if _clause(item) == item.cls.expected]


def _clause(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("flowmesh_clause")
    return mark and mark.args[0]
