"""Import what is named by text; whatever that raises comes out as one error of ours."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from flowmesh_core.errors import PluginLoadError

__all__ = ["import_plugin_file", "import_target", "is_importable", "plugin_module_name"]


def is_importable(name: str) -> bool:
    """Return whether a package, or ``package.module``, is installed, without importing any of it.

    A bare folder of that name on the path does not count.
    """
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    for step in below:
        places = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(step, places) if places else None
    return spec is not None and spec.origin is not None


def import_target(target: str) -> Any:
    """Import ``package.module:Name``.

    Raises:
        PluginLoadError: The module or the name does not exist, or importing it raised.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as exc:  # whatever it raises, the plugin is broken
        raise PluginLoadError(f"cannot import {target}: {type(exc).__name__}: {exc}") from exc


def plugin_module_name(path: Path) -> str:
    """Return the name under which a single-file plugin is imported."""
    return re.sub(r"\W", "_", f"flowmesh_plugin_{path.stem}")


def import_plugin_file(path: Path) -> ModuleType:
    """Import a single-file plugin under the name by which its targets are found.

    Raises:
        PluginLoadError: There is no such file.
    """
    name = plugin_module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PluginLoadError(f"plugin file {path} must be an existing .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
