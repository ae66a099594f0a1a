"""The transport of a single process: tasks come from a queue, events go to listeners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from flowmesh_core.config import Settings
from flowmesh_core.events import LogChunk, TaskEvent, WorkerEvent
from flowmesh_core.transports.base import Delivery, Transport
from flowmesh_core.transports.lossy import MAX_WAITING_BYTES

__all__ = ["LocalTransport"]

_log = logging.getLogger(__name__)

Said = TaskEvent | WorkerEvent | LogChunk
Listener = Callable[[Said], None]


class LocalTransport(Transport):
    """Connects a worker with whoever drives it in the same process and event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._queue: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._dropped = 0

    def submit(self, body: bytes) -> None:
        """Hand a message to the worker."""
        self._queue.put_nowait(Delivery(body))

    def submit_control(self, body: bytes) -> None:
        """Hand a control message to the worker."""
        self._queue.put_nowait(Delivery(body, control=True))

    def listen(self, listener: Listener) -> None:
        """Call a function on the event loop for each event and piece of a log from now on."""
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

    def send(
        self, event: TaskEvent | WorkerEvent, on_sent: Callable[[], None] | None = None
    ) -> None:
        """Call the listeners, in order, on the loop."""
        self._call_soon(self._dispatch, event)
        if on_sent is not None:
            self._call_soon(self._confirm, on_sent)

    def send_log(self, chunk: LogChunk) -> None:
        """Call the listeners; a loop that is busy for long misses what does not fit."""
        size = len(chunk.data)
        with self._lock:
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                self._dropped += 1
                return
            self._waiting_bytes += size
        self._call_soon(self._dispatch_log, chunk)

    def _call_soon(self, call: Callable[[Any], None], what: Said | Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call, what)

    def _dispatch_log(self, chunk: LogChunk) -> None:
        with self._lock:
            self._waiting_bytes -= len(chunk.data)
        self._dispatch(chunk)

    def _dispatch(self, what: Said) -> None:
        for listener in self._listeners:
            listener(what)

    def _confirm(self, on_sent: Callable[[], None]) -> None:
        if self._listeners:
            on_sent()

    async def flush(self, timeout_s: float) -> bool:
        """Let the loop run what was sent."""
        await asyncio.sleep(0)
        return True

    async def close(self) -> None:
        """Forget the listeners."""
        if self._dropped:
            _log.warning("%d pieces of logs were dropped", self._dropped)
            self._dropped = 0
        self._listeners.clear()
