"""What a store does: take files, then take the result."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination

__all__ = ["Parcel", "Receipt", "Store"]


class Store(abc.ABC):
    """One per worker and destination type; called from the worker's event loop.

    ``send`` comes for each artifact of a task, then ``deliver`` once; both may come again for
    the same task after a failure and must then replace what they wrote.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> Mapping[str, Any]:
        """Ship one file that is whole.

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

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        """Ship one file that may still grow, such as an archive that is being packed.

        By default this waits until the file is whole and calls ``upload``. A store that can send
        what is there already overrides it, and so may one that can look at what arrived: only
        what is ``verified`` is ever removed here.

        Raises:
            UploadError: As ``upload``.
            ArchiveError: What the file was given up with, as it is.
        """
        await parcel.whole()
        told = await self.upload(parcel.task_id, parcel.path, parcel.final, destination)
        return Receipt(told=told)

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
