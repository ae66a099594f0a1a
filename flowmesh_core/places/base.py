"""What a place does: run one task's executor, keep its engine warm, give the engine back."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.errors import CrashError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, Outcome, RunContext
from flowmesh_core.masking import SecretMask
from flowmesh_core.task_log import TaskLog

__all__ = ["Job", "Place", "PlaceContext"]


@attrs.frozen(kw_only=True)
class PlaceContext:
    """What every place is told about the worker.

    Attributes:
        settings: The operator's decisions.
        load_class: Imports an executor's class into this process.
        folder: The worker's own folder, for logs that belong to no task.
        plugin_files: Single-file plugins, to be loaded wherever executors run.
        pythons: Interpreter of each further virtual environment, by its name.
    """

    settings: Settings
    load_class: Callable[[ExecutorInfo], type[Executor]]
    folder: Path
    plugin_files: tuple[Path, ...] = ()
    pythons: Mapping[str, Path] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Job:
    """One task on its way through a place.

    Attributes:
        info: The executor that serves it.
        spec: Plain data, secrets resolved; a place in another process validates it there.
        ctx: What the executor is told; its callbacks may be called from any thread.
        log: Takes what the executor's process prints.
        mask: The secrets that the document names.
        variables: Environment variables that its process keeps, beside what all keep.
        memory_bytes: Most host memory that all its processes may use together, or None.
        gpu_memory_bytes: Memory that it wants on each of its GPUs, or None.
    """

    info: ExecutorInfo
    spec: Mapping[str, Any]
    ctx: RunContext
    log: TaskLog
    mask: SecretMask = attrs.field(factory=lambda: SecretMask({}))
    variables: tuple[str, ...] = ()
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None

    def shrink(self, error: BaseException) -> bool:
        """Halve the batch when memory ran out; return whether another run may succeed so."""
        short = isinstance(error, CrashError) and error.oom
        if not short or Capability.SHRINK not in self.info.capabilities:
            return False
        if self.ctx.batch_scale < 1.0:  # once is enough
            return False
        self.log.line("warning", f"{error}; running once more with half the batch")
        self.ctx.batch_scale = 0.5
        return True


class Place(abc.ABC):
    """One per worker and place name; called from the worker's event loop.

    Args:
        context: The worker that it belongs to.
    """

    def __init__(self, context: PlaceContext) -> None:
        self.context = context

    async def stage_in(self, paths: Sequence[Path]) -> Mapping[Path, Path]:
        """Bring local paths to where the executor runs; return where each lies there.

        Called before ``run`` with the attempt's folder first, then whatever the task reads. On
        one machine every path stays where it is.
        """
        return {path: path for path in paths}

    async def collect(self, folder: Path) -> None:  # noqa: B027 - shared file system
        """Bring what the executor wrote back; comes after ``run``, also when that raised."""

    @abc.abstractmethod
    async def run(self, job: Job) -> Outcome:
        """Run one task on the engine of its key, loading it first when it is not warm.

        Raises:
            Exception: Whatever the executor raised.
            asyncio.CancelledError: The caller gave the task up; when it is raised, what the task
                had started has ended, as far as the place can see to that.
        """

    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        """Run tasks that agree on their executor's ``group_key`` as one batch.

        Returns:
            One task per job, each done as soon as its member has finished. Cancelling one gives
            that member up, and the process too when no other member needs it. Here they run one
            after the other.
        """
        turn = asyncio.Lock()

        async def run(job: Job) -> Outcome:
            async with turn:
                return await self.run(job)

        return [asyncio.ensure_future(run(job)) for job in jobs]

    def stop(self, task_id: str) -> None:  # noqa: B027 - where the executor sees ctx.cancelled
        """Ask the executor to stop; ``ctx.cancelled`` is true already. Never blocks."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Unload every engine; may come twice."""
