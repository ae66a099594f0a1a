"""What every driver of ``flowmesh.transports`` must do; its author subclasses ``TransportSuite``.

Each check is one clause of ``docs/conformance.md``. What the author's ``Wire`` cannot do is
skipped, with what to give.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import pytest

from flowmesh_core.config import load_settings
from flowmesh_core.events import TASK_PROGRESS, TASK_STARTED, TASK_SUCCEEDED, LogChunk, TaskEvent
from flowmesh_core.testing.verdicts import clause, drive, find_left, refuse, skip
from flowmesh_core.transports.base import Delivery, Transport

__all__ = ["WORKER_ID", "TransportSuite", "Wire"]

T = TypeVar("T")
Heard = Sequence[Mapping[str, Any]]
WORKER_ID = "kit-w1"
_LAST = f'{{"assigned_worker": "{WORKER_ID}", "task_id": "last"}}'.encode()
_LOOK_S = 0.01
_BLOCK_S = 5.0  # a busy machine may take long over what does not block
_DURING = [f"during-{number}" for number in range(5)]


class Wire(abc.ABC):
    """The orchestrator's end of a transport, as its author describes it; new for each check.

    Attributes:
        transport: The driver; its worker is ``WORKER_ID``.
        settings: Fields of ``Settings`` that it needs.
    """

    transport: type[Transport]
    settings: Mapping[str, Any] = {}

    def attach(self, transport: Transport) -> None:  # noqa: B027 - most need no object
        """Get each transport before it is opened."""

    @abc.abstractmethod
    def submit(self, body: bytes) -> None:
        """Hand a task message, which names the worker, to it; comes on the event loop."""

    @abc.abstractmethod
    def submit_control(self, body: bytes) -> None:
        """Hand a control message to the worker."""

    @abc.abstractmethod
    def heard(self) -> Heard:
        """Return all events and pieces of logs so far, as decoded JSON, in their order."""

    def cut(self) -> AbstractContextManager[None]:
        """Break the connection, and let none be made until the context ends."""
        raise NotImplementedError


class _Session:
    """Does with a transport what a worker does."""

    def __init__(self, transport: Transport, wire: Wire, patience_s: float) -> None:
        self.transport = transport
        self.wire = wire
        self._patience_s = patience_s

    async def receive(self) -> list[Delivery]:
        """Return what is delivered before one last message."""
        self.wire.submit(_LAST)
        found: list[Delivery] = []
        async for delivery in self.transport.deliveries():
            if delivery.body == _LAST:
                break
            found.append(delivery)
        return found

    def send(self, task_id: str, on_sent: Callable[[], None] | None = None) -> None:
        """Send an outcome."""
        self.transport.send(_outcome(task_id), on_sent)

    async def hear(self, task_id: str) -> list[Mapping[str, Any]]:
        """Return what is heard until the outcome of a task, or until patience ends."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._patience_s
        while True:
            heard = [*self.wire.heard()]
            for number, said in enumerate(heard):
                if (said["task_id"], said["type"]) == (task_id, TASK_SUCCEEDED):
                    return heard[: number + 1]
            if loop.time() > until_s:
                return heard
            await asyncio.sleep(_LOOK_S)


class TransportSuite:
    """Subclass it as ``class TestMine(TransportSuite)`` with a fixture ``wire``.

    Attributes:
        patience_s: Longest that what was sent may take to be heard.
        limit_s: Longest that one check may take.
    """

    patience_s: ClassVar[float] = 20.0
    limit_s: ClassVar[float] = 60.0

    @pytest.fixture
    def wire(self) -> Wire:
        """The other end; the subclass gives it."""
        pytest.fail("give a fixture `wire` that returns a Wire", pytrace=False)

    def drive(self, wire: Wire, work: Callable[[_Session], Awaitable[T]]) -> T:
        """Work with an open transport, which is closed twice afterwards."""
        settings = load_settings({}, **{"worker_id": WORKER_ID, **wire.settings})

        async def main() -> T:
            transport = wire.transport(settings)
            wire.attach(transport)
            try:
                await transport.open()
                return await work(_Session(transport, wire, self.patience_s))
            finally:
                transport.stop_receiving()
                await transport.close()
                await transport.close()

        return drive(main(), self.limit_s)

    # What comes.

    @clause("transport.once")
    def test_each_message_comes_once_and_in_order(self, wire: Wire) -> None:
        """Also when several wait, and when two are the same."""
        bodies = [_message(f"t{number // 2}") for number in range(20)]

        async def work(session: _Session) -> list[str]:
            for body in bodies:
                wire.submit(body)
            found = [delivery.body for delivery in await session.receive()]
            return [] if found == bodies else [f"submitted were {bodies}, delivered {found}"]

        refuse(self.drive(wire, work))

    @clause("transport.whole")
    def test_a_message_comes_as_it_is(self, wire: Wire) -> None:
        """Bytes that are no text and messages of 1 MB are the contract's to judge."""
        bodies = [
            _message("Zoë 漢字 🎉"),
            b"\xff\x00 " + WORKER_ID.encode() + b"\r\n",
            _message("x" * (1 << 20)),
        ]

        async def work(session: _Session) -> Iterator[str]:
            for body in bodies:
                wire.submit(body)
            found = [delivery.body for delivery in await session.receive()]
            return (
                f"{body[:60]!r} of {len(body)} bytes was not delivered as it is"
                for body in bodies
                if body not in found
            )

        refuse(self.drive(wire, work))

    @clause("transport.control")
    def test_orders_are_told_from_tasks(self, wire: Wire) -> None:
        """What comes on the control channel is marked, and nothing else is."""
        task, order = _message("t1"), b'{"type": "CANCEL", "task_id": "t1"}'

        async def work(session: _Session) -> list[str]:
            wire.submit(task)
            wire.submit_control(order)
            found = await session.receive()
            if len(found) < 2:  # the channels may be two roads
                found += await session.receive()
            marked = {delivery.body: delivery.control for delivery in found}
            wanted = {task: False, order: True}
            return [] if marked == wanted else [f"control must be {wanted}, got {marked}"]

        refuse(self.drive(wire, work))

    @clause("transport.stop")
    def test_receiving_ends_when_it_is_stopped(self, wire: Wire) -> None:
        """From any thread, and twice."""

        async def work(session: _Session) -> list[str]:
            async def receive() -> int:
                return len([delivery async for delivery in session.transport.deliveries()])

            receiving = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            await asyncio.to_thread(session.transport.stop_receiving)
            session.transport.stop_receiving()
            await asyncio.wait({receiving}, timeout=self.patience_s)
            return [] if receiving.done() else ["deliveries goes on after stop_receiving"]

        refuse(self.drive(wire, work))

    # What goes.

    @clause("transport.order")
    def test_events_keep_their_order(self, wire: Wire) -> None:
        """Those of the loop, and those of each other thread; every one once."""

        async def work(session: _Session) -> list[str]:
            def send_all(name: str) -> None:
                for number in range(100):
                    session.send(f"{name}-{number}")

            send_all("loop")
            await asyncio.to_thread(send_all, "thread")
            session.send("last")
            heard = [said["task_id"] for said in await session.hear("last")]
            faults = []
            for name in ("loop", "thread"):
                found = [task_id for task_id in heard if task_id.startswith(name)]
                wanted = [f"{name}-{number}" for number in range(100)]
                if found != wanted:
                    faults.append(f"events of the {name} must be 0 to 99, heard were {found}")
            return faults

        refuse(self.drive(wire, work))

    @clause("transport.sent")
    def test_what_has_left_is_confirmed_once(self, wire: Wire) -> None:
        """``on_sent`` comes for an outcome that somebody has, and never for progress."""
        confirmed: list[str] = []

        async def work(session: _Session) -> list[str]:
            progress = TaskEvent(type=TASK_PROGRESS, task_id="t1", worker_id=WORKER_ID)
            session.transport.send(progress)
            for name in ("t1", "t2"):
                session.send(name, lambda name=name: confirmed.append(name))  # type: ignore[misc]
            await session.hear("t2")
            flushed = await session.transport.flush(self.patience_s)
            await asyncio.sleep(_LOOK_S)
            faults = [] if flushed else ["flush must return True once all have left"]
            if confirmed != ["t1", "t2"]:
                faults.append(f"on_sent must come once for t1 and t2, came for {confirmed}")
            return faults

        refuse(self.drive(wire, work))

    @clause("transport.logs")
    def test_who_reads_until_the_outcome_has_the_whole_log(self, wire: Wire) -> None:
        """What was logged before a task's outcome is heard before it."""
        text = "".join(f"line {number} 漢字\n" for number in range(200))

        async def work(session: _Session) -> list[str]:
            session.transport.send(TaskEvent(type=TASK_STARTED, task_id="t1", worker_id=WORKER_ID))
            offset = 0
            for line in text.splitlines(keepends=True):
                session.transport.send_log(_chunk(offset, line.encode()))
                offset += len(line.encode())
            session.send("t1")
            heard = await session.hear("t1")
            found = "".join(said["data"] for said in heard if "offset" in said)
            same = found == text
            return [] if same else [f"logged were {len(text)} characters, heard {len(found)}"]

        refuse(self.drive(wire, work))

    # Outages and the end.

    @clause("transport.outage")
    def test_events_survive_an_outage(self, wire: Wire) -> None:
        """Sending never blocks nor raises; all is heard in order afterwards, and tasks come."""
        confirmed: list[str] = []

        async def work(session: _Session) -> list[str]:
            session.send("before")
            await session.hear("before")
            with _cut(wire):
                faults = await self._judge_sending(session, confirmed)
            session.send("after")
            # One may come twice after a doubtful failure.
            heard = dict.fromkeys(said["task_id"] for said in await session.hear("after"))
            wanted = ["before", *_DURING, "after"]
            if [*heard] != wanted:
                faults.append(f"sent were {wanted}, heard {[*heard]}")
            await session.transport.flush(self.patience_s)
            await asyncio.sleep(_LOOK_S)
            if sorted(confirmed) != _DURING:
                faults.append(f"on_sent must come once for each of {_DURING}, came for {confirmed}")
            return faults + await self._judge_receiving(session)

        refuse(self.drive(wire, work))

    async def _judge_sending(self, session: _Session, confirmed: list[str]) -> list[str]:
        """Send while it is cut off, first on a thread: a block there does not hold this up."""

        def send(name: str) -> None:
            session.send(name, lambda: confirmed.append(name))

        sending = asyncio.ensure_future(asyncio.to_thread(send, _DURING[0]))
        if not await self._ends(sending):
            return ["send must not block while it is cut off"]
        for name in _DURING[1:]:
            send(name)
        flushing = asyncio.ensure_future(session.transport.flush(0.2))
        if not await self._ends(flushing):
            return ["flush must end in time while it is cut off"]
        heard = [said["task_id"] for said in session.wire.heard() if said["task_id"] in _DURING]
        faults = {
            "flush must return False": flushing.result(),
            f"on_sent must not come, came for {confirmed}": confirmed,
            f"Wire.cut must let nothing through, heard were {heard}": heard,
        }
        return [f"while it is cut off, {fault}" for fault, found in faults.items() if found]

    async def _ends(self, work: asyncio.Future[Any]) -> bool:
        await asyncio.wait({work}, timeout=min(self.patience_s, _BLOCK_S))
        if work.done():
            work.result()  # raises what it raised
            return True
        work.cancel()
        return False

    async def _judge_receiving(self, session: _Session) -> list[str]:
        """Submit until a message comes: what was submitted too early may be lost."""
        receiving = asyncio.ensure_future(session.receive())
        for _ in range(int(self.patience_s / 0.1)):
            await asyncio.wait({receiving}, timeout=0.1)
            if receiving.done():
                return []
            session.wire.submit(_LAST)
        receiving.cancel()
        return ["no message comes any more after an outage"]

    @clause("transport.closed")
    def test_nothing_is_left_once_it_is_closed(self, wire: Wire) -> None:
        """``close`` frees connections and threads, and may come twice."""

        async def work(session: _Session) -> None:
            session.send("t1")
            await session.transport.flush(self.patience_s)

        refuse(find_left(lambda: self.drive(wire, work)))


def _outcome(task_id: str) -> TaskEvent:
    return TaskEvent(type=TASK_SUCCEEDED, task_id=task_id, worker_id=WORKER_ID)


def _chunk(offset: int, data: bytes) -> LogChunk:
    return LogChunk(task_id="t1", worker_id=WORKER_ID, stream="stdout", offset=offset, data=data)


def _message(task_id: str) -> bytes:
    return f'{{"assigned_worker": "{WORKER_ID}", "task_id": "{task_id}"}}'.encode()


def _cut(wire: Wire) -> AbstractContextManager[None]:
    try:
        return wire.cut()
    except NotImplementedError:
        skip("give Wire.cut")
