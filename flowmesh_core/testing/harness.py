"""Run an executor as a worker would, without a queue."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.checking import check_result
from flowmesh_core.config import Settings, load_settings
from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import ExecutionError, FlowmeshError
from flowmesh_core.executor import Executor, ExecutorInfo, Outcome
from flowmesh_core.places.base import PlaceContext
from flowmesh_core.plugins import Plugins, load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.resources import ResourceLedger
from flowmesh_core.runner import Runner, RunnerEvents
from flowmesh_core.telemetry.probes import Gpu, usable_cores, usable_memory_bytes

__all__ = ["TaskRun", "build_runner", "run_task"]


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
    clock: Callable[[], float] = time.monotonic,
) -> TaskRun:
    """Run one task as on a worker: same validation, inputs, limits, masking and places.

    A class runs in this process, an installed executor in a child when it declares so. A result
    that does not fit the model that ``ExecutorInfo.result`` names is an error here.

    Args:
        executor: A class, or the name of an installed executor.
        spec: The document's ``spec``; ``taskType`` may be left out for a class.
        info: The class's declaration; a bare one is made when it is not given.
        folder: Where the attempt's folder is made; a temporary one by default.
        settings: The operator's decisions; defaults without the environment.
        task_id: A plain name.
        plugin_files: Single-file plugins, whose executors count as installed.
        clock: Monotonic seconds that ``timeoutSec`` and ``ctx.remaining_s`` count, such as a
            ``ManualClock``; a process of its own has the real one.
    """
    root = Path(tempfile.mkdtemp(prefix="flowmesh-")) if folder is None else folder
    chosen = load_settings({}, results_dir=root) if settings is None else settings
    plugins = load_plugins(chosen, files=plugin_files)
    return asyncio.run(_run(executor, dict(spec), info, chosen, root, task_id, plugins, clock))


async def _run(
    executor: type[Executor] | str,
    spec: dict[str, Any],
    info: ExecutorInfo | None,
    settings: Settings,
    root: Path,
    task_id: str,
    plugins: Plugins,
    clock: Callable[[], float],
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
    note: Callable[[str, Mapping[str, Any]], None] = lambda _id, values: progress.append(values)  # noqa: E731
    runner = build_runner(settings, plugins, registry, note, clock=clock)
    task = parse_task({"spec": spec}, task_id=task_id)
    attempt = TaskFolders(root).begin(task_id, task.destination)
    runner.admit([task_id])
    try:
        async with runner.reserve(task) as reservation:
            outcome = await runner.run(task, attempt, reservation)
        outcome = _refuse_misfit(registry, task, outcome)
    except FlowmeshError as exc:
        outcome = Outcome(error=exc)
    finally:
        await runner.close()
    return TaskRun(outcome=outcome, folder=attempt.folder, progress=tuple(progress))


def build_runner(
    settings: Settings,
    plugins: Plugins,
    registry: ExecutorRegistry,
    on_progress: Callable[[str, Mapping[str, Any]], None],
    *,
    slots: int = 1,
    gpus: Sequence[Gpu] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Runner:
    """Return a worker's runner without its queue; close it on the loop that it ran on.

    Args:
        settings: ``results_dir`` is where everything is written.
        plugins: For observers, model sources and the files that child processes import.
        registry: The executors.
        on_progress: Gets a task id and every report of that task.
        slots: Tasks at once.
        gpus: Those that tasks may use.
        clock: Monotonic seconds that time limits count.
    """
    root = settings.results_dir
    return Runner(
        settings,
        plugins,
        registry,
        Fetcher(policy=NetworkPolicy.from_settings(settings), results_dir=root),
        ledger=ResourceLedger(slots, usable_cores(), usable_memory_bytes(), gpus),
        places=PlaceContext(
            settings=settings,
            load_class=registry.load_class,
            folder=TaskFolders(root).worker_log(settings.worker_id).parent,
            plugin_files=plugins.files,
            pythons=plugins.pythons,
        ),
        events=RunnerEvents(on_progress=on_progress, progress_interval_s=0.0),
        clock=clock,
    )


def _refuse_misfit(registry: ExecutorRegistry, task: Task, outcome: Outcome) -> Outcome:
    """A worker only warns of a result that is not what its executor declares; a test fails."""
    info = registry.resolve(task.task_type, task.spec, executor=task.common.executor)
    problems = check_result(info, outcome.result) if outcome.ok else []
    if not problems:
        return outcome
    told = f"not the result that {info.name} declares: {'; '.join(problems)}"
    return attrs.evolve(outcome, error=ExecutionError(told))


def _bare_info(executor: type[Executor], spec: Mapping[str, Any]) -> ExecutorInfo:
    return ExecutorInfo(
        name=f"test.{executor.__name__}",
        task_types={str(spec.get("taskType") or "test")},
        target=f"{executor.__module__}:{executor.__qualname__}",
        places=("inline",),
    )
