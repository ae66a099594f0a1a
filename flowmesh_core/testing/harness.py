"""Run an executor as a worker would, without a queue."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
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
from flowmesh_core.places.base import PlaceContext
from flowmesh_core.plugins import Plugins, load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.resources import ResourceLedger
from flowmesh_core.runner import Runner, RunnerEvents
from flowmesh_core.telemetry.probes import usable_cores, usable_memory_bytes

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
    plugin_files: Sequence[Path] = (),
) -> TaskRun:
    """Run one task as on a worker: same validation, inputs, limits, masking and places.

    A class runs in this process, an installed executor in a child when it declares so.

    Args:
        executor: A class, or the name of an installed executor.
        spec: The document's ``spec``; ``taskType`` may be left out for a class.
        info: The class's declaration; a bare one is made when it is not given.
        folder: Where the attempt's folder is made; a temporary one by default.
        settings: The operator's decisions; defaults without the environment.
        task_id: A plain name.
        plugin_files: Single-file plugins, whose executors count as installed.
    """
    root = Path(tempfile.mkdtemp(prefix="flowmesh-")) if folder is None else folder
    chosen = load_settings({}, results_dir=root) if settings is None else settings
    plugins = load_plugins(chosen, files=plugin_files)
    return asyncio.run(_run(executor, dict(spec), info, chosen, root, task_id, plugins))


async def _run(
    executor: type[Executor] | str,
    spec: dict[str, Any],
    info: ExecutorInfo | None,
    settings: Settings,
    root: Path,
    task_id: str,
    plugins: Plugins,
) -> TaskRun:
    registry = ExecutorRegistry(plugins.executors)
    if isinstance(executor, str):
        declared = [info for info in registry.infos if info.name == executor]
        spec.setdefault("taskType", min(declared[0].task_types) if declared else executor)
        spec.setdefault("executor", executor)
    else:
        info = info or _bare_info(executor, spec)
        spec.setdefault("taskType", min(info.task_types))
        spec.setdefault("executor", info.name)
        registry.register(info, executor)
    progress: list[Mapping[str, Any]] = []
    folders = TaskFolders(root)
    runner = Runner(
        settings,
        plugins,
        registry,
        Fetcher(policy=NetworkPolicy.from_settings(settings), results_dir=root),
        ledger=ResourceLedger(1, usable_cores(), usable_memory_bytes(), ()),
        places=PlaceContext(
            settings=settings,
            load_class=registry.load_class,
            folder=folders.worker_log(settings.worker_id).parent,
            plugin_files=plugins.files,
            pythons=plugins.pythons,
        ),
        events=RunnerEvents(
            on_progress=lambda _task_id, values: progress.append(values), progress_interval_s=0.0
        ),
    )
    task = parse_task({"spec": spec}, task_id=task_id)
    attempt = folders.begin(task_id, task.destination)
    runner.admit([task_id])
    try:
        async with runner.reserve(task) as reservation:
            outcome = await runner.run(task, attempt, reservation)
    except FlowmeshError as exc:
        outcome = Outcome(error=exc)
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
