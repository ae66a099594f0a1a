"""Turns a single-file plugin into the modules of a distribution."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import attrs

from flowmesh_core.config import load_settings
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import plugin_module_name
from flowmesh_core.plugins import load_plugins
from flowmesh_core.scaffold.requirements import foreign_imports

__all__ = ["LIGHT", "OneFile", "loads_much", "read_one_file", "split_modules"]

# What the core itself loads wherever a plugin is read.
LIGHT = {"attr", "attrs", "pydantic", "typing_extensions"}
_TARGET = re.compile(r"""f(["'])\{__name__\}:(\w+)\1""")


@attrs.frozen(kw_only=True)
class OneFile:
    """A single-file plugin.

    Attributes:
        infos: What it declares.
        source: Its text.
        imports: The packages that it needs beside the core.
    """

    infos: Sequence[ExecutorInfo]
    source: str
    imports: Sequence[str]


def read_one_file(path: Path) -> OneFile:
    """Load a single-file plugin as a worker would, and read its text.

    Raises:
        PluginError: It cannot be loaded, or declares no executor.
    """
    settings = load_settings({}, only_plugins=(path.stem,))
    reports = load_plugins(settings, files=[path]).reports
    infos = [info for each in reports if each.name == path.stem for info in each.executors]
    if not infos:
        raise PluginError(f"{path} declares no executor in flowmesh_register_executors")
    source = path.read_text(encoding="utf-8")
    imports = sorted(foreign_imports(ast.walk(ast.parse(source))))
    return OneFile(infos=infos, source=source, imports=imports)


def split_modules(path: Path, one: OneFile, package: str) -> dict[str, str]:
    """Return the text of ``plugin.py``, and of ``executor.py`` when there must be one.

    A file whose imports are light stays as it is: its ``__name__`` leads to its classes in a
    package too. What imports an engine at its top is taken apart, so that commands can read the
    declaration, and the models that it names, without the engine. Where they cannot be taken apart
    it stays whole.
    """
    source = one.source.replace(plugin_module_name(path), f"{package}.plugin")
    parts = _read_parts(source)
    crowded = any(b.node.lineno <= (a.node.end_lineno or 0) for a, b in pairwise(parts))
    if crowded or not loads_much(source):
        return {"plugin.py": source}
    return _take_apart(parts, _declared_names(one), package) or {"plugin.py": source}


def _take_apart(parts: Sequence[_Part], declared: set[str], package: str) -> dict[str, str]:
    """Return both modules; none where the declaration needs what is not light."""
    head, parts = (parts[0].text, parts[1:]) if parts[0].is_docstring else ("", parts)
    used = _used(parts)
    shared = [
        part for part in parts if part.is_import and (part.defines & used or _is_future(part))
    ]
    own = [part for part in parts if part not in shared]  # what nobody uses is imported for itself
    light = _find_light(own, declared)
    rest = [part for part in own if part not in light]
    text = _TARGET.sub(lambda found: _move(found, rest, package), _join(light, shared))
    if loads_much(text) or f'"{package}.executor:' not in text:
        return {}
    needed = sorted(_names(light) & _used(rest))
    link = f"from {package}.plugin import {', '.join(needed)}\n" if needed else ""
    return {"plugin.py": head + text, "executor.py": _join(rest, shared, link)}


@attrs.frozen(eq=False)
class _Part:
    """One statement of a module's top level with the comments above it."""

    text: str
    defines: frozenset[str]
    uses: frozenset[str]
    node: ast.stmt

    @property
    def is_docstring(self) -> bool:
        """Whether it is a text that stands for itself, as the first one of a module does."""
        value = self.node.value if isinstance(self.node, ast.Expr) else None
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    @property
    def is_import(self) -> bool:
        """Whether it goes wherever one of its names is used."""
        return isinstance(self.node, (ast.Import, ast.ImportFrom))

    @property
    def is_hook(self) -> bool:
        """Whether the core calls it."""
        return isinstance(self.node, ast.FunctionDef) and self.node.name.startswith("flowmesh_")


def _read_parts(source: str) -> list[_Part]:
    lines, parts, start = f"{source.rstrip()}\n".splitlines(keepends=True), [], 0
    for node in ast.parse(source).body:
        end = node.end_lineno or node.lineno
        text = "".join(lines[start:end])
        parts.append(_Part(text, frozenset(_bound(node)), frozenset(_loaded(node)), node))
        start = end
    return parts


def _bound(node: ast.stmt) -> Iterable[str]:
    """Yield what a statement of a module's top level gives a name to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    for inner in ast.walk(node):
        if isinstance(inner, ast.alias):
            yield (inner.asname or inner.name).partition(".")[0]
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id


def _loaded(node: ast.stmt) -> Iterable[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id


def _names(parts: Iterable[_Part]) -> set[str]:
    return {name for part in parts for name in part.defines}


def _used(parts: Iterable[_Part]) -> set[str]:
    return {name for part in parts for name in part.uses}


def _declared_names(one: OneFile) -> set[str]:
    """Return the names in the file that commands import: models and examples, no executors."""
    fields = ("spec", "settings", "result", "example")
    targets = [getattr(info, field) for info in one.infos for field in fields]
    return {target.partition(":")[2] for target in targets}


def _find_light(parts: Sequence[_Part], names: set[str]) -> list[_Part]:
    """Return the hooks, the named definitions, and all that these use."""
    wanted = set(names)
    while True:
        light = [part for part in parts if part.is_hook or part.defines & wanted]
        more = wanted | _used(light)
        if more == wanted:
            return light
        wanted = more


def _move(found: re.Match[str], rest: Sequence[_Part], package: str) -> str:
    name = found[2]
    return f'"{package}.executor:{name}"' if name in _names(rest) else found[0]


def _join(parts: Sequence[_Part], shared: Sequence[_Part], link: str = "") -> str:
    """Return a module of parts, with those imports that they use."""
    used = _used(parts)
    kept = [part.text for part in shared if part.defines & used or _is_future(part)]
    text = "".join([*kept, link, *(part.text for part in parts)])
    return text.lstrip("\n").rstrip("\n") + "\n"


def _is_future(part: _Part) -> bool:
    return isinstance(part.node, ast.ImportFrom) and part.node.module == "__future__"


def loads_much(source: str) -> bool:
    """Whether importing a module imports more than the core does."""
    return bool(foreign_imports(_run_by_import(ast.parse(source))) - LIGHT)


def _run_by_import(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    yield node
    for inner in ast.iter_child_nodes(node):
        yield from _run_by_import(inner)
