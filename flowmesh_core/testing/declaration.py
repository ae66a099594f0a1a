"""Reads an executor's declaration in a fresh process, and tells what that loads.

``python -m flowmesh_core.testing.declaration`` is that process's part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import attrs
from pydantic import BaseModel

from flowmesh_core.config import load_settings
from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.plugins import load_plugins

__all__ = ["TARGETS", "Reading", "find_dropping_models", "is_same_or_below", "read_declaration"]

# Fields of a declaration that the worker imports, and that must need no engine.
TARGETS = ("spec", "settings", "result", "example")
_LIMIT_S = 120.0


@attrs.frozen
class Reading:
    """What reading a declaration did.

    Attributes:
        problems: What could not be imported.
        modules: What was loaded beside the core and pydantic.
    """

    problems: Sequence[str]
    modules: Sequence[str]


def read_declaration(info: ExecutorInfo, plugin: str, files: Sequence[Path]) -> Reading:
    """Load one plugin and import what its declaration names, in another process.

    Args:
        info: The declaration.
        plugin: Name of the plugin that made it.
        files: Single-file plugins.
    """
    targets = [target for field in TARGETS if (target := getattr(info, field))]
    asked = {"plugin": plugin, "files": [str(path) for path in files], "targets": targets}
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh_core.testing.declaration", json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        return Reading([f"reading it ended with {done.returncode}: {done.stderr[-500:]}"], [])
    return Reading(**json.loads(done.stdout.splitlines()[-1]))


def is_same_or_below(package: str, modules: Sequence[str]) -> bool:
    """Return whether a package, or a module of it, is among modules."""
    return any(f"{name}.".startswith(f"{package}.") for name in modules)


def _main(asked: dict[str, Any]) -> None:
    import_target("flowmesh_core.specs:TaskSpec")  # what most specs are made of counts as the core
    import_target("flowmesh_core.serving:ServeSettings")
    before, problems = set(sys.modules), []
    try:
        files = [Path(path) for path in asked["files"]]  # they may import one another
        only = (asked["plugin"], *(path.stem for path in files))
        load_plugins(load_settings({}, only_plugins=only, strict_plugins=True), files=files)
    except FlowmeshError as exc:
        problems.append(str(exc))
    for target in asked["targets"]:
        try:
            import_target(target)
        except FlowmeshError as exc:
            problems.append(str(exc))
    loaded = sorted(set(sys.modules) - before)
    sys.stdout.write("\n" + json.dumps({"problems": problems, "modules": loaded}) + "\n")


def find_dropping_models(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yield the blocks of a model that take unknown keys and lose them, as pydantic does at first.

    What refuses them (``extra="forbid"``) or says that it keeps them (``"allow"``) is right.
    """
    yield from _dropping(model, path, set())


def _dropping(model: type[BaseModel], path: str, seen: set[type]) -> Iterator[str]:
    if model in seen:
        return
    seen.add(model)
    if model.model_config.get("extra", "ignore") == "ignore":
        yield f"{path} ({model.__name__})"
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from _dropping(inner, f"{path}.{name}", seen)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
