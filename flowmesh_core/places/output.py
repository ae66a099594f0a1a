"""Reads what a child process prints, as fast as it prints, and hands it to a log."""

from __future__ import annotations

import asyncio
import fcntl
import os
import selectors
import struct
import termios
import threading
from typing import Protocol

__all__ = ["OutputPump"]

_CHUNK = 1 << 18
_PIPE_BYTES = 1 << 20
_TAIL_BYTES = 4096
_F_SETPIPE_SZ = 1031


class Sink(Protocol):
    """Where output goes, such as a ``TaskLog``."""

    def write(self, stream: str, data: bytes) -> None:
        """Take the next bytes of ``stdout`` or ``stderr``; never raises."""


class OutputPump:
    """One thread that reads the two pipes of a child until both are closed.

    Args:
        stdout: Reading end; owned by the pump from now on.
        stderr: As above.
        sink: Where output goes at first.
    """

    def __init__(self, stdout: int, stderr: int, sink: Sink) -> None:
        self._names = {stdout: "stdout", stderr: "stderr"}
        self._sink = sink
        self._tail = b""
        self._reading = threading.Lock()
        self._waking = threading.Lock()
        self._ended = False
        self._drained: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        for fd in self._names:
            os.set_blocking(fd, False)
            _enlarge(fd)
            self._selector.register(fd, selectors.EVENT_READ)
        self._open = set(self._names)
        self._thread = threading.Thread(target=self._run, name="flowmesh-output", daemon=True)
        self._thread.start()

    @property
    def tail(self) -> str:
        """The end of what was printed on standard error, at most 4 KiB."""
        return self._tail.decode(errors="replace")

    def forget(self) -> None:
        """Forget the end of what was printed: the next task is not to blame for it."""
        self._tail = b""

    def redirect(self, sink: Sink) -> None:
        """Send what is read from now on elsewhere; call ``drain`` before, when that matters."""
        self._sink = sink

    async def drain(self) -> None:
        """Wait until all that was printed before this call has reached the sink."""
        if self._is_drained():
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._drained.append((loop, future))
        self._wake()
        await future

    def _is_drained(self) -> bool:
        """Look without waiting: mostly there is nothing, and waking a thread costs more."""
        if not self._reading.acquire(blocking=False):
            return False
        try:
            return not any(_waiting_bytes(fd) for fd in tuple(self._open))
        finally:
            self._reading.release()

    def _wake(self) -> None:
        with self._waking:
            if not self._ended:
                os.write(self._wake_write, b".")
                return
        self._answer_drained()

    def _run(self) -> None:
        while self._open:
            ready = [key.fd for key, _ in self._selector.select()]
            for fd in ready:
                if fd in self._open:
                    self._read(fd)
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._answer_drained()
        with self._waking:  # nobody may write to a number that is somebody else's by then
            self._ended = True
            self._selector.close()
            os.close(self._wake_write)
            os.close(self._wake_read)
        self._answer_drained()

    def _read(self, fd: int) -> int:
        """Hand on what is there; return how much it was, 0 when the pipe is empty or closed."""
        with self._reading:
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                return 0
            if data:
                if self._names[fd] == "stderr":
                    self._tail = (self._tail + data)[-_TAIL_BYTES:]
                self._sink.write(self._names[fd], data)
                return len(data)
            self._open.discard(fd)
            self._selector.unregister(fd)
            os.close(fd)
            return 0

    def _answer_drained(self) -> None:
        asked, self._drained = self._drained, []
        for fd in tuple(self._open) if asked else ():
            left = _waiting_bytes(fd)  # no more than this: the child may print without end
            while left > 0 and (count := self._read(fd)):
                left -= count
        for loop, future in asked:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of both pipes."""
        self._thread.join(timeout_s)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _waiting_bytes(fd: int) -> int:
    """Return how much a read would give now."""
    count = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
    return int(struct.unpack("i", count)[0])


def _enlarge(fd: int) -> None:
    try:  # a larger pipe lets a burst of output pass without waiting for this thread
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:  # the user's share of pipe memory is used up
        return
