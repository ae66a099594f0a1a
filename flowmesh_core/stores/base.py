"""What a store does: take files, then take the result."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination

__all__ = ["Store"]


class Store(abc.ABC):
    """One per worker and destination type; called from the worker's event loop.

    ``upload`` comes for each artifact of a task, then ``deliver`` once; both may come again for
    the same task after a failure and must then replace what they wrote.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Ship one file.

        Args:
            task_id: Whose file it is.
            path: Where the file lies now.
            final: Where it will lie once the task is committed.
            destination: The task's own.

        Returns:
            What the result tells about it: ``url`` and ``download_url`` at least.

        Raises:
            UploadError: It could not be shipped; ``retriable`` says whether to try again.
        """

    @abc.abstractmethod
    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Hand over the result.

        Raises:
            UploadError: As ``upload``.
        """

    async def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Free connections; may come twice."""
