"""What every transport promises to the worker."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.events import TaskEvent, WorkerEvent

__all__ = ["Delivery", "Transport"]


@attrs.frozen
class Delivery:
    """One message as it came, not looked into."""

    body: bytes


class Transport(abc.ABC):
    """Brings deliveries and carries events away.

    Events leave in the order in which they were sent and survive an outage of the queue as long
    as the process lives; after a doubtful failure one may arrive twice, never not at all.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and subscribe; when it returns, no message for this worker is missed.

        Raises:
            TransportError: The settings can never work (a wrong password, say). An outage is
                waited for instead.
        """

    @abc.abstractmethod
    def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield messages until ``stop_receiving`` is called."""

    @abc.abstractmethod
    def stop_receiving(self) -> None:
        """End ``deliveries``; safe from any thread, and may come twice."""

    @abc.abstractmethod
    def send(self, event: TaskEvent | WorkerEvent) -> None:
        """Take an event over; never blocks, never raises for an outage, safe from any thread."""

    @abc.abstractmethod
    async def flush(self, timeout_s: float) -> bool:
        """Wait until all events have left; return whether they have."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Free connections and threads; may come twice."""
