"""Our transports keep what the suite checks; those that are right but for one fault do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import redis
from relay import Relay

from flowmesh_core.events import LogChunk, TaskEvent, WorkerEvent
from flowmesh_core.testing import RedisServer, TransportSuite, Wire, wait_for
from flowmesh_core.testing.transport_suite import WORKER_ID
from flowmesh_core.transports.base import Delivery, Transport
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.transports.redis_pubsub import RedisPubSubTransport

DOCS = Path(__file__).parents[2] / "docs"


class LocalWire(Wire):
    transport: type[Transport] = LocalTransport

    def __init__(self, transport: type[Transport] = LocalTransport) -> None:
        self.transport = transport
        self.said: list[Mapping[str, Any]] = []

    def attach(self, transport: Transport) -> None:
        assert isinstance(transport, LocalTransport)
        self.near = transport
        transport.listen(lambda said: self.said.append(json.loads(said.to_json())))

    def submit(self, body: bytes) -> None:
        self.near.submit(body)

    def submit_control(self, body: bytes) -> None:
        self.near.submit_control(body)

    def heard(self) -> Sequence[Mapping[str, Any]]:
        return self.said


class TestLocal(TransportSuite):
    @pytest.fixture
    def wire(self) -> Wire:
        return LocalWire()


class RedisWire(Wire):
    transport = RedisPubSubTransport

    def __init__(self, server: RedisServer) -> None:
        self.relay = Relay(server.port)
        self.settings = {"redis_url": f"redis://127.0.0.1:{self.relay.port}/0"}
        self.client = redis.Redis.from_url(server.url)
        # Of its pool alone: one connection, so that messages are read in the order Redis got them.
        self.pubsub: Any = redis.client.PubSub(self.client.connection_pool)
        self.pubsub.psubscribe("tasks.*")
        assert self.pubsub.get_message(timeout=5)
        self.said: list[Mapping[str, Any]] = []

    def close(self) -> None:
        self.pubsub.close()
        self.client.close()
        self.relay.close()

    def submit(self, body: bytes) -> None:
        self.client.publish("tasks", body)

    def submit_control(self, body: bytes) -> None:
        self.client.publish(f"workers.control:{WORKER_ID}", body)

    def heard(self) -> Sequence[Mapping[str, Any]]:
        while message := self.pubsub.get_message(timeout=0):
            if message["type"] == "pmessage":
                self.said.append(json.loads(message["data"]))
        return self.said

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Cut the worker off alone: what is published while nobody listens is gone."""
        self.relay.cut()
        yield
        self.relay.restore()


class TestRedisPubSub(TransportSuite):
    @pytest.fixture
    def wire(self, flowmesh_redis_server: RedisServer) -> Iterator[Wire]:
        flowmesh_redis_server.start()
        flowmesh_redis_server.flush()
        wire = RedisWire(flowmesh_redis_server)
        yield wire
        wire.close()


# Broken on purpose.

CASES: dict[str, tuple[type[Transport], str, str]] = {}


def breaks(clause: str, told: str) -> Callable[[type[Transport]], type[Transport]]:
    """Name the check that must reject a transport, alone, and what that must say."""

    def note(cls: type[Transport]) -> type[Transport]:
        CASES[cls.__name__] = (cls, f"transport.{clause}", told)
        return cls

    return note


Event = TaskEvent | WorkerEvent
OnSent = Callable[[], None] | None


@breaks("once", "submitted were .*, delivered")
class ForgetsWhatItKnows(LocalTransport):
    async def deliveries(self) -> AsyncIterator[Delivery]:
        last = b""
        async for delivery in super().deliveries():
            if delivery.body != last:
                yield delivery
            last = delivery.body


@breaks("whole", "was not delivered as it is")
class ReadsAsText(LocalTransport):
    async def deliveries(self) -> AsyncIterator[Delivery]:
        async for delivery in super().deliveries():
            yield attrs.evolve(delivery, body=delivery.body.decode(errors="replace").encode())


@breaks("control", "control must be .*True.*, got .*False")
class ForgetsTheChannel(LocalTransport):
    def submit_control(self, body: bytes) -> None:
        self.submit(body)


@breaks("stop", "deliveries goes on after stop_receiving")
class StopsAtTheNextMessage(LocalTransport):
    stopped = False

    def stop_receiving(self) -> None:
        self.stopped = True

    async def deliveries(self) -> AsyncIterator[Delivery]:
        while not self.stopped:
            delivery = await self._queue.get()
            assert delivery is not None
            yield delivery


@breaks("order", "events of the loop must be 0 to 99, heard were")
class PutsEveryTenthLast(LocalTransport):
    def send(self, event: Event, on_sent: OnSent = None) -> None:
        late = isinstance(event, TaskEvent) and event.task_id == "loop-10"
        if late:
            self.late = event
            return
        super().send(event, on_sent)
        if isinstance(event, TaskEvent) and event.task_id == "loop-20":
            super().send(self.late)


@breaks("sent", r"came for \['t1', 't1', 't2', 't2'\]")
class ConfirmsTwice(LocalTransport):
    def send(self, event: Event, on_sent: OnSent = None) -> None:
        super().send(event, on_sent)
        if on_sent is not None:
            self._call_soon(self._confirm, on_sent)


@breaks("logs", r"logged were \d+ characters, heard 0")
class DropsLogs(LocalTransport):
    def send_log(self, chunk: LogChunk) -> None:
        """Forget it."""


class MayBeCut(LocalTransport):
    """Keeps events while it is cut off."""

    off: ClassVar[bool] = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: list[tuple[Event, OnSent]] = []

    def send(self, event: Event, on_sent: OnSent = None) -> None:
        if self.off:
            self.keep(event, on_sent)
            return
        kept, self.kept = self.kept, []
        for earlier, earlier_on_sent in kept:
            super().send(earlier, earlier_on_sent)
        super().send(event, on_sent)

    def keep(self, event: Event, on_sent: OnSent) -> None:
        self.kept.append((event, on_sent))

    async def flush(self, timeout_s: float) -> bool:
        await super().flush(timeout_s)
        return not self.off


class CutWire(LocalWire):
    @contextmanager
    def cut(self) -> Iterator[None]:
        MayBeCut.off = True
        yield
        MayBeCut.off = False


class TestMayBeCut(TransportSuite):
    @pytest.fixture
    def wire(self) -> Wire:
        return CutWire(MayBeCut)


@breaks("outage", "sent were .*, heard .*'before', 'during-4', 'after'")
class KeepsOneEvent(MayBeCut):
    def keep(self, event: Event, on_sent: OnSent) -> None:
        self.kept = [(event, on_sent)]


@breaks("outage", "send must not block while it is cut off")
class BlocksUntilItIsBack(MayBeCut):
    def keep(self, event: Event, on_sent: OnSent) -> None:
        wait_for(lambda: not self.off)
        super().keep(event, on_sent)


@breaks("outage", "flush must end in time while it is cut off")
class FlushesUntilItIsBack(MayBeCut):
    async def flush(self, timeout_s: float) -> bool:
        while self.off:
            await asyncio.sleep(0.01)
        return True


@breaks("outage", "while it is cut off, flush must return False")
class SaysThatAllHasLeft(MayBeCut):
    async def flush(self, timeout_s: float) -> bool:
        return True


@breaks("outage", r"while it is cut off, on_sent must not come, came for \['during-0', ")
class ConfirmsWhatItKeeps(MayBeCut):
    def keep(self, event: Event, on_sent: OnSent) -> None:
        super().keep(event, None)
        if on_sent is not None:
            on_sent()


@breaks("outage", r"on_sent must come once for each of .*, came for \[\]")
class ForgetsWhoAsked(MayBeCut):
    def keep(self, event: Event, on_sent: OnSent) -> None:
        super().keep(event, None)


@breaks("outage", "no message comes any more after an outage")
class HearsNothingAfterwards(MayBeCut):
    deaf = False

    def keep(self, event: Event, on_sent: OnSent) -> None:
        super().keep(event, on_sent)
        self.deaf = True

    async def deliveries(self) -> AsyncIterator[Delivery]:
        async for delivery in super().deliveries():
            if not self.deaf:
                yield delivery


@breaks("closed", r"left among threads: reader \(1\)")
class LeavesAThread(LocalTransport):
    ended: ClassVar[threading.Event] = threading.Event()

    async def open(self) -> None:
        await super().open()
        threading.Thread(target=self.ended.wait, name="reader").start()


@pytest.fixture
def ending_threads() -> Iterator[None]:
    yield
    LeavesAThread.ended.set()
    LeavesAThread.ended.clear()


CHECKS = {
    check.pytestmark[0].args[0]: check
    for name, check in vars(TransportSuite).items()
    if name.startswith("test_")
}


class Impatient(TransportSuite):
    patience_s = 0.5


@pytest.mark.usefixtures("ending_threads")
@pytest.mark.parametrize("name", CASES)
def test_a_transport_is_rejected_by_the_one_check_for_its_fault(name: str) -> None:
    cls, clause, told = CASES[name]
    failed = {}
    for checked, check in CHECKS.items():
        wire = CutWire(cls) if issubclass(cls, MayBeCut) else LocalWire(cls)
        with contextlib.suppress(pytest.skip.Exception):
            try:
                check(Impatient(), wire)
            except pytest.fail.Exception as exc:
                failed[checked] = str(exc)
    assert list(failed) == [clause], failed
    assert re.search(told, failed[clause], re.DOTALL), failed[clause]


def test_every_check_has_a_transport_that_breaks_it_and_its_row_on_the_page() -> None:
    assert {clause for _, clause, _ in CASES.values()} == set(CHECKS)
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    assert list(CHECKS) == re.findall(r"^\| `(transport\.[a-z-]+)` \|", page, re.MULTILINE)


def test_a_cut_that_cuts_nothing_off_is_told() -> None:
    class Uncut(LocalWire):
        def cut(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    with pytest.raises(pytest.fail.Exception, match=r"Wire\.cut must let nothing through, heard"):
        CHECKS["transport.outage"](TransportSuite(), Uncut())


def test_an_outage_that_cannot_be_made_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"give Wire\.cut"):
        CHECKS["transport.outage"](TransportSuite(), LocalWire())
