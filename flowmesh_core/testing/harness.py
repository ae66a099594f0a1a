"""Run an executor as a worker would, without a queue."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.config import Settings, load_settings
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import Executor, ExecutorInfo, Outcome
from flowmesh_core.plugins import ExecutorRegistry, load_plugins
from flowmesh_core.runner import Runner

__all__ = ["TaskRun", "run_task"]


@attrs.frozen(kw_only=True)
class TaskRun:
    """What one run of an executor did.

    Attributes:
        folder: The attempt's folder, with what the executor wrote.
        progress: Everything passed to ``ctx.progress``, in order.
    """

    outcome: Outcome
    folder: Path
    progress: tuple[Mapping[str, Any], ...]

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.outcome.ok

    @property
    def result(self) -> Mapping[str, Any]:
        """The result; empty when it failed."""
        return self.outcome.result

    @property
    def error(self) -> FlowmeshError | None:
        """Why it failed."""
        return self.outcome.error


def run_task(
    executor: type[Executor] | str,
    spec: Mapping[str, Any],
    *,
    info: ExecutorInfo | None = None,
    folder: Path | None = None,
    settings: Settings | None = None,
    task_id: str = "task",
) -> TaskRun:
    """Run one task in this process: same validation, inputs, limits and masking as on a worker.

    Args:
        executor: A class, or the name of an installed executor.
        spec: The document's ``spec``; ``taskType`` may be left out for a class.
        info: The class's declaration; a bare one is made when it is not given.
        folder: Where the attempt's folder is made; a temporary one by default.
        settings: The operator's decisions; defaults without the environment.
        task_id: A plain name.
    """
    root = Path(tempfile.mkdtemp(prefix="flowmesh-")) if folder is None else folder
    chosen = load_settings({}, results_dir=root) if settings is None else settings
    return asyncio.run(_run(executor, dict(spec), info, chosen, root, task_id))


async def _run(
    executor: type[Executor] | str,
    spec: dict[str, Any],
    info: ExecutorInfo | None,
    settings: Settings,
    root: Path,
    task_id: str,
) -> TaskRun:
    plugins = load_plugins(settings)
    registry = ExecutorRegistry(plugins.executors)
    if isinstance(executor, str):
        spec.setdefault("executor", executor)
    else:
        info = info or _bare_info(executor, spec)
        spec.setdefault("taskType", min(info.task_types))
        spec.setdefault("executor", info.name)
        registry.register(info, executor)
    progress: list[Mapping[str, Any]] = []
    runner = Runner(
        settings,
        plugins,
        registry,
        Fetcher(policy=NetworkPolicy.from_settings(settings), results_dir=root),
        on_progress=lambda _task_id, values: progress.append(values),
    )
    task = parse_task({"spec": spec}, task_id=task_id)
    attempt = TaskFolders(root).begin(task_id, task.destination)
    try:
        outcome = await runner.run(task, attempt)
    finally:
        await runner.close()
    return TaskRun(outcome=outcome, folder=attempt.folder, progress=tuple(progress))


def _bare_info(executor: type[Executor], spec: Mapping[str, Any]) -> ExecutorInfo:
    return ExecutorInfo(
        name=f"test.{executor.__name__}",
        task_types={str(spec.get("taskType") or "test")},
        target=f"{executor.__module__}:{executor.__qualname__}",
        places=("inline",),
    )
