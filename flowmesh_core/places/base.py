"""What a place does: run one task's executor, keep its engine warm, give the engine back."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path

from flowmesh_core.executor import Executor, ExecutorInfo, Outcome, RunContext

__all__ = ["Place"]


class Place(abc.ABC):
    """One per worker and place name; called from the worker's event loop.

    Args:
        load_class: Imports an executor's class.
    """

    def __init__(self, load_class: Callable[[ExecutorInfo], type[Executor]]) -> None:
        self.load_class = load_class

    async def stage_in(self, paths: Sequence[Path]) -> None:  # noqa: B027 - shared file system
        """Bring local paths to where the executor runs; nothing to do on one machine."""

    async def collect(self, folder: Path) -> None:  # noqa: B027 - shared file system
        """Bring what the executor wrote back into the attempt's folder."""

    @abc.abstractmethod
    async def run(self, info: ExecutorInfo, ctx: RunContext) -> Outcome:
        """Run one task on the engine of its key, loading it first when it is not warm.

        Raises:
            Exception: Whatever the executor raised.
            asyncio.CancelledError: The task was cancelled; the place has told the executor.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Unload every engine; may come twice."""
