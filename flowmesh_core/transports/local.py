"""The transport of a single process: tasks come from a queue, events go to listeners."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from flowmesh_core.config import Settings
from flowmesh_core.events import TaskEvent, WorkerEvent
from flowmesh_core.transports.base import Delivery, Transport

__all__ = ["LocalTransport"]

Listener = Callable[[TaskEvent | WorkerEvent], None]


class LocalTransport(Transport):
    """Connects a worker with whoever drives it in the same process and event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._queue: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, body: bytes) -> None:
        """Hand a message to the worker."""
        self._queue.put_nowait(Delivery(body))

    def listen(self, listener: Listener) -> None:
        """Call a function on the event loop for each event from now on."""
        self._listeners.append(listener)

    async def open(self) -> None:
        """Remember the loop, on which listeners are called."""
        self._loop = asyncio.get_running_loop()

    async def deliveries(self) -> AsyncIterator[Delivery]:
        """Yield what was submitted."""
        while (delivery := await self._queue.get()) is not None:
            yield delivery

    def stop_receiving(self) -> None:
        """End ``deliveries``, even those that have not begun."""
        if self._loop is None:
            self._queue.put_nowait(None)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, None)

    def send(self, event: TaskEvent | WorkerEvent) -> None:
        """Call the listeners, in order, on the loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, event)

    def _dispatch(self, event: TaskEvent | WorkerEvent) -> None:
        for listener in self._listeners:
            listener(event)

    async def flush(self, timeout_s: float) -> bool:
        """Let the loop run what was sent."""
        await asyncio.sleep(0)
        return True

    async def close(self) -> None:
        """Forget the listeners."""
        self._listeners.clear()
