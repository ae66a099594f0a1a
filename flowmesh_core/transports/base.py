"""What every transport promises to the worker."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable

import attrs

from flowmesh_core.config import Settings
from flowmesh_core.events import LogChunk, TaskEvent, WorkerEvent

__all__ = ["Delivery", "Transport"]


@attrs.frozen
class Delivery:
    """One message as it came, not looked into.

    Attributes:
        body: A task message, or a control message.
        control: Whether it came on the worker's control channel: see ``contract.parse_control``.
    """

    body: bytes
    control: bool = attrs.field(default=False, kw_only=True)


class Transport(abc.ABC):
    """Brings deliveries and carries events away.

    Events leave in the order in which they were sent and survive an outage of the queue as long
    as the process lives; after a doubtful failure one may arrive twice, never not at all.

    Logs and ``TASK_PROGRESS`` may be lost: when more than 8 MiB of them wait, the oldest are
    dropped and counted. They hold up no event, but for the last of their own task: whoever reads
    until then has all that was sent before it and not dropped.
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
    def send(
        self, event: TaskEvent | WorkerEvent, on_sent: Callable[[], None] | None = None
    ) -> None:
        """Take an event over; never blocks, never raises for an outage, safe from any thread.

        Args:
            event: What to send.
            on_sent: Called once, on any thread, when the event has left for certain and, where
                that can be told, somebody has it. Never called for one that is lost with the
                process or given up, nor for ``TASK_PROGRESS``. It must be quick and not raise.
        """

    @abc.abstractmethod
    def send_log(self, chunk: LogChunk) -> None:
        """Take a piece of a log over; never blocks, never raises, safe from any thread."""

    @abc.abstractmethod
    async def flush(self, timeout_s: float) -> bool:
        """Wait until all events, logs and progress have left; return whether they have."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Free connections and threads; may come twice."""
