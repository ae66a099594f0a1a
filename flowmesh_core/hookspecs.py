"""The two pluggy markers and every hook that a plugin may implement.

Hooks are called by keyword; an implementation names only the arguments that it wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from flowmesh_core.executor import ExecutorInfo, Outcome

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "flowmesh"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def flowmesh_register_executors() -> Sequence[ExecutorInfo]:  # type: ignore[empty-body]
    """Declare executors.

    Called once per process when plugins are loaded, before anything runs, on a thread of its own;
    it must return within milliseconds and import no engine. If it raises, or has not returned
    within ``FLOWMESH_PLUGIN_TIMEOUT_S``, the plugin is reported and the worker starts without it.
    """


@hookspec
def flowmesh_register_model_sources() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Declare kinds of ``model.source``: ``{type: "package.module:resolver"}``.

    Called like ``flowmesh_register_executors``. A resolver is imported when the first task names
    its type and is called as ``resolver(source, offline=...)`` with the ``model.source`` block;
    it returns the local path of the model, or raises ``InputError``.
    """


@hookspec
def flowmesh_before_task(task_id: str, task_type: str, metadata: Mapping[str, Any]) -> None:
    """Observe that a task is about to run.

    Called once per run, on the event loop: return within a millisecond. Nothing comes back; an
    exception is logged with the plugin's name and changes nothing.
    """


@hookspec
def flowmesh_after_task(task_id: str, task_type: str, outcome: Outcome, runtime_s: float) -> None:
    """Observe the outcome of a task, before it is written and announced.

    Called once per run, on the event loop, like ``flowmesh_before_task``.
    """


@hookspec
def flowmesh_heartbeat_fields() -> Mapping[str, Any]:  # type: ignore[empty-body]
    """Add JSON fields to the heartbeat's metrics.

    Called about once per beat on a thread of its own; a slow one delays no beat, the last answer
    is sent instead. The contract's own keys cannot be replaced. An exception is logged.
    """


@hookspec(firstresult=True)
def flowmesh_choose_executor(
    task_type: str, spec: Mapping[str, Any], candidates: Sequence[ExecutorInfo]
) -> str | None:
    """Choose among the executors that can serve a task, ranked best first.

    Called once per task on the event loop. The first answer that is not None wins and must be
    the name of a candidate; any other name fails the task. If it raises, the task fails.
    """
