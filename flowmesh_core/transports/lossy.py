"""What waits to be published and may be lost: logs and progress, bounded and joined."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable

import attrs

from flowmesh_core.contract import TASK_LOGS_CHANNEL, TASK_PROGRESS_CHANNEL
from flowmesh_core.events import LOG_CHUNK_BYTES, LogChunk, TaskEvent

__all__ = ["MAX_WAITING_BYTES", "LossyQueue", "Waiting"]

_log = logging.getLogger(__name__)
MAX_WAITING_BYTES = 8 * 1024 * 1024
_LINGER_S = 0.02
_PAUSE_S = 1.0
# About what Python keeps for one message besides its text.
_OVERHEAD_BYTES = 512


@attrs.define(eq=False)
class Waiting:
    """One message: a progress event as JSON, or a chunk of a log that may still grow."""

    task_id: str
    data: bytearray
    chunk: LogChunk | None = None

    @property
    def size_bytes(self) -> int:
        """What it counts for."""
        return len(self.data) + _OVERHEAD_BYTES

    @property
    def key(self) -> tuple[str, str]:
        """The log that it belongs to."""
        return self.task_id, self.chunk.stream if self.chunk else ""

    @property
    def channel(self) -> str:
        """Where it is published."""
        template = TASK_LOGS_CHANNEL if self.chunk else TASK_PROGRESS_CHANNEL
        return template.format(task_id=self.task_id)

    def to_json(self) -> bytes:
        """Return what is published."""
        data = bytes(self.data)
        return attrs.evolve(self.chunk, data=data).to_json() if self.chunk else data

    def join(self, chunk: LogChunk) -> bool:
        """Take a chunk in if it goes on where this one ends; return whether it did."""
        first = self.chunk
        if first is None or len(self.data) + len(chunk.data) > LOG_CHUNK_BYTES:
            return False
        if first.offset + len(self.data) != chunk.offset:
            return False
        self.data += chunk.data
        return True


class LossyQueue:
    """Messages in order of arrival; when too many wait, the oldest are dropped and counted.

    Everything but ``take`` and ``put_back``, which belong to one thread, is for any thread.

    Args:
        wake: Called when the first message begins to wait.
        max_bytes: How much may wait.
    """

    def __init__(self, wake: Callable[[], None], *, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self.dropped = 0
        self._wake = wake
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._queue: collections.deque[Waiting] = collections.deque()
        self._growing: dict[tuple[str, str], Waiting] = {}
        self._bytes = 0
        self._due = float("inf")

    def wait_s(self) -> float:
        """Return how long the messages may wait for more to join them."""
        return max(0.0, self._due - time.monotonic())

    def put_log(self, chunk: LogChunk) -> None:
        """Add a chunk, to the message before it if that is possible."""
        with self._lock:
            growing = self._growing.get((chunk.task_id, chunk.stream))
            if growing is not None and growing.join(chunk):
                self._bytes += len(chunk.data)
                first = False
            else:
                first = self._append(Waiting(chunk.task_id, bytearray(chunk.data), chunk))
            self._shrink()
        if first:
            self._wake()

    def put_progress(self, event: TaskEvent) -> None:
        """Add an event."""
        try:
            body = event.to_json()
        except (TypeError, ValueError, RecursionError) as exc:
            _log.error("task %s: progress cannot be sent: %s", event.task_id, exc)
            return
        with self._lock:
            first = self._append(Waiting(event.task_id, bytearray(body)))
            self._shrink()
        if first:
            self._wake()

    def _append(self, message: Waiting) -> bool:
        first = not self._queue
        if first:
            self._due = time.monotonic() + _LINGER_S
        self._queue.append(message)
        self._bytes += message.size_bytes
        if message.chunk is not None:
            self._growing[message.key] = message
        return first

    def _shrink(self) -> None:
        while self._bytes > self._max_bytes:
            message = self._queue.popleft()
            self._forget(message)
            self.dropped += 1

    def _forget(self, message: Waiting) -> None:
        self._bytes -= message.size_bytes
        if self._growing.get(message.key) is message:
            del self._growing[message.key]

    def take(self, max_bytes: int, tasks: Collection[str] | None = None) -> list[Waiting]:
        """Remove and return the oldest messages, at least one if there is any.

        Args:
            max_bytes: Of all together, but for the last.
            tasks: Whose messages; those of all tasks without it.
        """
        taken: list[Waiting] = []
        with self._lock:
            passed: list[Waiting] = []
            while self._queue and max_bytes > 0:
                message = self._queue.popleft()
                if tasks is not None and message.task_id not in tasks:
                    passed.append(message)
                    continue
                taken.append(message)
                self._forget(message)
                max_bytes -= message.size_bytes
            self._queue.extendleft(reversed(passed))
            if not self._queue:
                self._due = float("inf")
        return taken

    def put_back(self, messages: Iterable[Waiting]) -> None:
        """Return to the front what could not be sent; it waits a second before the next try."""
        with self._lock:
            for message in reversed([*messages]):
                self._queue.appendleft(message)
                self._bytes += message.size_bytes
            self._due = time.monotonic() + _PAUSE_S
            self._shrink()

    def drop(self, count: int) -> None:
        """Count messages that were refused."""
        with self._lock:
            self.dropped += count

    def count_lost(self) -> int:
        """Return how many messages were dropped or wait still."""
        with self._lock:
            return self.dropped + len(self._queue)
