"""The worker's side of ``keeper.py``: start children, stop them, hear when all has ended.

Everything happens on the worker's event loop. When ``KeptProcess.ended`` resolves, the child and
everything that it ever started are gone. All children end soon after the worker is gone, also when
it was killed. Linux only.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs

from flowmesh_core.errors import CrashError

__all__ = ["ExitStatus", "Keeper", "KeptProcess"]

KEEPER = Path(__file__).with_name("keeper.py")
ANSWER_S = 30.0
MARGIN_S = 5.0


@attrs.frozen(kw_only=True)
class ExitStatus:
    """How a child ended.

    Attributes:
        code: Exit code, None when a signal ended it or nobody knows.
        signal: Name such as ``SIGKILL``, when a signal ended it.
        left: Descendants of the child that had to be killed.
        left_alive: Processes that could not be killed: stuck in the kernel, or another user's.
    """

    code: int | None = None
    signal: str | None = None
    left: int = 0
    left_alive: int = 0


class KeptProcess:
    """A child with everything below it; made by ``Keeper.spawn``.

    Attributes:
        pid: The child, which leads its own session.
        minder_pid: Its parent: all that it ever started is below this process.
    """

    def __init__(self, leash: _Leash, *, pid: int, minder_pid: int) -> None:
        self._leash = leash
        self.pid = pid
        self.minder_pid = minder_pid

    @property
    def ended(self) -> asyncio.Future[ExitStatus]:
        """Resolves once the child and all its descendants are gone; cancelling it harms nobody.

        When the minder was killed, nobody saw how the child ended: the status says ``SIGKILL``,
        which the kernel sends the child then, and counts nothing.
        """
        return asyncio.shield(self._leash.ended)

    def terminate(self) -> None:
        """Send SIGTERM to the child and all its descendants; harmless after the end."""
        self._leash.order(b"T")

    def end_orphans(self) -> None:
        """Kill the descendants that have lost a parent; spares the child and what is below it."""
        self._leash.order(b"O")

    def kill(self) -> None:
        """Kill the child and all its descendants; harmless after the end."""
        self._leash.order(b"K")


class Keeper:
    """Starts the children of one worker, from one event loop.

    Its process starts with the first child, and again when it was killed, which ends its children.

    Args:
        patience_s: How long to wait for killed processes to be gone before giving them up.
    """

    def __init__(self, *, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._leashes: set[_Leash] = set()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The keeper's process, None while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        control: int,
        stdout: int,
        stderr: int,
    ) -> KeptProcess:
        """Start a child in a session of its own, without input; if cancelled, the child ends.

        Args:
            argv: Its first item is a path; ``PATH`` is not searched.
            env: All that the child's environment holds.
            cwd: The child's working folder.
            control: Becomes descriptor 3 of the child, which has no other beyond it. The caller
                keeps this and the next two, and closes them.
            stdout: Becomes descriptor 1.
            stderr: Becomes descriptor 2.

        Raises:
            CrashError: The child or the keeper could not be started.
        """
        request = json.dumps({"argv": list(argv), "env": dict(env), "cwd": str(cwd)}).encode()
        for _ in range(3):  # one that was just killed may take a request, and then refuse one
            leash = await self._ask(request, (control, stdout, stderr))
            answer = await leash.read_answer()
            if "pid" in answer:
                return KeptProcess(leash, pid=answer["pid"], minder_pid=answer["minder"])
            if "error" in answer:
                raise CrashError(answer["error"])
        raise CrashError(
            f"cannot start {argv[0]!r}: the keeper ends before it answers;"
            " what it wrote to the worker's stderr says why"
        )

    async def _ask(self, request: bytes, fds: Sequence[int]) -> _Leash:
        if self._closed:
            raise CrashError("cannot start a process: the keeper is closed", retriable=False)
        ours, theirs = socket.socketpair()
        with theirs, os.fdopen(os.memfd_create("request"), "wb") as file:
            file.write(request)
            file.flush()
            _, leash = await asyncio.get_running_loop().create_unix_connection(_Leash, sock=ours)
            self._leashes.add(leash)
            leash.ended.add_done_callback(lambda _: self._leashes.discard(leash))
            try:
                self._send([theirs.fileno(), file.fileno(), *fds])
            except OSError as exc:
                leash.drop()
                raise CrashError(f"cannot reach the keeper: {exc}") from exc
        return leash

    def _send(self, fds: Sequence[int]) -> None:
        requests = self._requests if self.pid else None
        try:
            socket.send_fds(requests or self._start(), [b"R"], fds)
        except (BrokenPipeError, ConnectionResetError):
            self._end()  # it is gone: the leash ends, and the next request starts another

    def _start(self) -> socket.socket:
        """Start the keeper's process; takes a few milliseconds, once in a worker's life."""
        self._end()
        self._requests, theirs = socket.socketpair()
        self._requests.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own script
                [sys.executable, "-I", "-S", str(KEEPER), str(self._patience_s)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._requests

    def _end(self) -> None:
        """End the keeper's process; minders that are still there end theirs at once."""
        if self._process:
            self._process.kill()
            self._process.wait()
        if self._requests:
            self._requests.close()
        self._requests = self._process = None

    async def close(self) -> None:
        """End every child and the keeper; may come twice."""
        self._closed = True
        leashes = list(self._leashes)
        for leash in leashes:
            leash.order(b"K")
        if leashes:
            await asyncio.wait(
                [leash.ended for leash in leashes], timeout=self._patience_s + MARGIN_S
            )
        for leash in leashes:
            leash.drop()
        self._end()


class _Leash(asyncio.Protocol):
    """Ties one child to the worker: carries orders there and news back.

    Attributes:
        ended: Resolves when the other end is closed, which is when nothing is left to end.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ExitStatus] = loop.create_future()
        self._answer: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._status = ExitStatus(signal="SIGKILL")
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for message in map(json.loads, lines):
            if "exit" in message:
                self._status = read_status(message)
                self._transport.close()
            else:
                self._answer.set_result(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result({})
        self.ended.set_result(self._status)

    async def read_answer(self) -> dict[str, Any]:
        """Return the first message, empty when the keeper ended; drops the child if cancelled.

        Raises:
            CrashError: No answer came in time.
        """
        try:
            done, _ = await asyncio.wait([self._answer], timeout=ANSWER_S)
        except asyncio.CancelledError:
            self.drop()
            raise
        if not done:
            self.drop()
            raise CrashError(f"the keeper did not answer within {ANSWER_S:g} s")
        return self._answer.result()

    def order(self, what: bytes) -> None:
        """Send an order, unless all is over."""
        if not self._transport.is_closing():
            self._transport.write(what)

    def drop(self) -> None:
        """Let go at once, which ends the child; ``ended`` resolves without waiting for that."""
        self._transport.abort()


def read_status(message: Mapping[str, Any]) -> ExitStatus:
    """Read a minder's last message; its ``exit`` is a wait status, or None when not known."""
    code = None if message["exit"] is None else os.waitstatus_to_exitcode(message["exit"])
    counts = {"left": message["left"], "left_alive": message["left_alive"]}
    if code is not None and code < 0:
        return ExitStatus(signal=name_signal(-code), **counts)
    return ExitStatus(code=code, **counts)


def name_signal(number: int) -> str:
    """Return ``SIGTERM`` for 15; most real-time signals have a number only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
