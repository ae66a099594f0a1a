"""The doctor's part in child processes: what may hang, crash or end the process is done here.

Each function gets and returns JSON data; ``places/trial.py`` calls it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowmesh_core.checking import check_spec
from flowmesh_core.config import load_plugin_settings, load_settings, plugin_variables
from flowmesh_core.errors import FlowmeshError, PluginError, PluginLoadError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.plugins import load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.validation import as_model

__all__ = [
    "TARGETS",
    "build_schema",
    "build_schema_of",
    "check_declaration",
    "import_engine",
    "load_rows",
    "rows_of",
]

TARGETS = ("spec", "settings", "result", "example")


def load_rows(name: str, only: Sequence[str], disabled: Sequence[str]) -> list[dict[str, Any]]:
    """Load one plugin, for as long as it takes; on the main thread."""
    import logging  # noqa: PLC0415 - only there

    logging.disable()  # what is wrong stands in the rows
    try:
        return rows_of(name, only, disabled)
    except KeyboardInterrupt as exc:  # nobody's Ctrl-C gets here, and Python would make it a signal
        raise PluginLoadError(f"KeyboardInterrupt: {exc}") from exc


def rows_of(name: str, only: Sequence[str], disabled: Sequence[str]) -> list[dict[str, Any]]:
    """Load one plugin here and return its rows; a plugin that the lists block is not imported."""
    settings = load_settings(
        {},
        only_plugins=(name,) if not only or name in only else ("",),
        disable_plugins=tuple(disabled),
        plugin_timeout_s=0.0,  # on the main thread, whose stack is told when it hangs
        envs_dir=None,
    )
    before = set(sys.modules)
    rows = [row.to_dict() for row in load_plugins(settings).reports if row.name == name]
    loaded = set(sys.modules) - before
    for row in rows:
        needs = {need for info in row["executors"] for need in info["needs"]}
        row["loaded"] = sorted(needs & loaded)
    return rows


def check_declaration(data: Mapping[str, Any]) -> list[str]:
    """Build the schemas, read the settings and check the example that a declaration names."""
    info = ExecutorInfo.from_dict(data)
    problems: list[str] = []
    for field in (field for field in TARGETS if getattr(info, field)):
        try:
            found = import_target(getattr(info, field))
            if field == "settings":
                load_plugin_settings(found, plugin=info.name)
            if field == "example":
                problems += [f"example: {each}" for each in _check_example(info, found)]
            else:
                build_schema(info, field)
        except (FlowmeshError, AttributeError, TypeError, ValueError) as exc:
            problems.append(f"{field} {getattr(info, field)}: {exc}")
    return problems


def _check_example(info: ExecutorInfo, found: Any) -> list[str]:
    with TemporaryDirectory() as folder:
        spec = found(Path(folder)) if callable(found) else found
        if not isinstance(spec, Mapping):
            return [f"must be a mapping, or a callable that returns one, got {type(spec).__name__}"]
        return check_spec(info.spec, spec) if info.spec else []


def build_schema(info: ExecutorInfo, field: str) -> dict[str, Any]:
    """Return the JSON schema of ``spec``, ``settings`` or ``result``.

    Properties of settings have a key ``variable`` beside those of the standard.

    Raises:
        PluginError: It declares none, or it cannot be imported.
    """
    target = getattr(info, field)
    if not target:
        raise PluginError(f"executor {info.name!r} declares no {field}")
    model = as_model(import_target(target), target)
    schema: dict[str, Any] = model.model_json_schema()
    if field == "settings":
        variables = plugin_variables(model, plugin=info.name)
        for shape, variable in zip(schema.get("properties", {}).values(), variables, strict=True):
            shape["variable"] = variable
    return schema


def build_schema_of(data: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Do as ``build_schema`` for a declaration of another environment, in its Python."""
    return build_schema(ExecutorInfo.from_dict(data), field)


def import_engine(data: Mapping[str, Any]) -> dict[str, Any]:
    """Import an executor and all that it needs, as its first task does."""
    info = ExecutorInfo.from_dict(data)
    started = time.perf_counter()
    ExecutorRegistry([info]).load_class(info)
    for need in info.needs:
        import_target(f"{need}:__name__")
    answer: dict[str, Any] = {"import_s": time.perf_counter() - started}
    torch = sys.modules.get("torch")
    if torch is not None:  # loaded by an engine that is built on it
        answer["torch"] = str(torch.__version__)
        answer["torch_gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return answer
