"""``FLOWMESH_TRACE_HOOKS``: every call of a hook becomes a line of the log."""

from __future__ import annotations

import functools
import logging
import reprlib
import time
from collections.abc import Callable
from typing import Any

import pluggy

from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.masking import mask_sensitive

__all__ = ["trace_hooks"]

_log = logging.getLogger(__name__)
_short = reprlib.Repr()
_short.maxother = _short.maxstring = 200
_short.maxlist = 20


def trace_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Have each hook of a registered plugin log who was called, the answer and the time."""
    _log.setLevel(logging.INFO)  # who asks for it gets it, whatever LOG_LEVEL says
    for caller in manager.get_hookcallers(plugin) or ():
        for impl in caller.get_hookimpls():
            if impl.plugin is plugin:
                traced = _traced(caller.name, impl.plugin_name, impl.function)
                impl.function = traced  # type: ignore[misc] # all callers go through it


def _tell(answer: Any) -> str:
    if isinstance(answer, list):
        answer = [item.name if isinstance(item, ExecutorInfo) else item for item in answer]
    return _short.repr(mask_sensitive(answer))


def _traced(hook: str, plugin: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        started, told = time.perf_counter(), "an exception"
        try:
            answer = function(*arguments)
            told = _tell(answer)
            return answer
        except BaseException as exc:
            told = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            took_ms = (time.perf_counter() - started) * 1000
            _log.info("hook %s: plugin %s: %s in %.1f ms", hook, plugin, told, took_ms)

    return call
