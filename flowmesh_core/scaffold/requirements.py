"""What a piece of Python imports, as requirements with the lowest version that is known to do."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions, requires, version

__all__ = ["find_requirements", "foreign_imports"]

_OWN = "flowmesh_core"


def foreign_imports(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the packages that statements import, without Python's own and the core."""
    names = {name for node in nodes for name in _imported(node)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {_OWN}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module


def find_requirements(packages: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return requirements, and those packages whose distribution cannot be told here.

    What the core requires too gets the core's bounds, other things at least the version that is
    installed. What is not installed is not guessed: its distribution may have another name, and
    something else that one.
    """
    known = _distributions_by_package()
    bounds = dict(_core_bounds())
    found, unknown = [], []
    for package in sorted(packages):
        name, *others = sorted(known.get(package, ())) or [""]
        if not name or others:
            unknown.append(package)
            continue
        found.append(name + bounds.get(_normal(name), f">={version(name).partition('+')[0]}"))
    return found, unknown


@functools.cache
def _distributions_by_package() -> Mapping[str, set[str]]:
    """Look at what was installed: Python 3.10's own function only reads what few still write."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for distribution in distributions():
        for path in distribution.files or ():
            if path.suffix in (".py", ".so"):
                found[path.parts[0].partition(".")[0]].add(distribution.metadata["Name"])
    return found


def _core_bounds() -> Iterator[tuple[str, str]]:
    for entry in requires("flowmesh-core") or ():
        name, bounds = re.match(r"([\w.-]+)([^;]*)", entry).groups()  # type: ignore[union-attr]
        yield _normal(name), ",".join(sorted(bounds.strip(" ()").split(","), reverse=True))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
