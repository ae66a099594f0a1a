from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from flowmesh_core.config import Settings
from flowmesh_core.events import TASK_STARTED, LogChunk, TaskEvent, WorkerEvent
from flowmesh_core.transports.local import LocalTransport

Heard = list[TaskEvent | WorkerEvent | LogChunk]


def event(number: int) -> TaskEvent:
    return TaskEvent(type=TASK_STARTED, task_id=f"t{number}")


def send_all(transport: LocalTransport, events: list[TaskEvent]) -> None:
    for item in events:
        transport.send(item)


async def bodies(transport: LocalTransport) -> list[bytes]:
    return [delivery.body async for delivery in transport.deliveries()]


def within_time(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


def test_messages_come_in_order_and_those_before_the_stop_all_come() -> None:
    async def work() -> list[bytes]:
        transport = LocalTransport(Settings())
        transport.submit(b"before it opened")
        await transport.open()
        receiving = asyncio.ensure_future(bodies(transport))
        await asyncio.sleep(0)
        for number in range(3):
            transport.submit(b"%d" % number)
        transport.stop_receiving()
        return await receiving

    assert within_time(work()) == [b"before it opened", b"0", b"1", b"2"]


def test_a_stop_before_the_opening_is_not_lost() -> None:
    async def work() -> list[bytes]:
        transport = LocalTransport(Settings())
        transport.stop_receiving()
        await transport.open()
        return await bodies(transport)

    assert within_time(work()) == []


def test_a_stop_may_come_twice_from_any_thread_and_after_the_end() -> None:
    transport = LocalTransport(Settings())

    async def work() -> list[bytes]:
        await transport.open()
        receiving = asyncio.ensure_future(bodies(transport))
        await asyncio.to_thread(transport.stop_receiving)
        transport.stop_receiving()
        return await receiving

    assert within_time(work()) == []
    transport.stop_receiving()
    transport.send(event(1))


def test_every_listener_gets_every_event_in_order_and_on_the_loop() -> None:
    async def work() -> None:
        transport = LocalTransport(Settings())
        await transport.open()
        heard: list[Heard] = [[], []]
        threads = set()
        for one in heard:
            transport.listen(one.append)
        transport.listen(lambda _event: threads.add(threading.current_thread()))
        sent = [event(number) for number in range(20)]
        send_all(transport, sent[:10])
        assert heard == [[], []], "sending must not run the listeners"
        await asyncio.to_thread(send_all, transport, sent[10:])
        assert await transport.flush(1.0)
        assert heard == [sent, sent]
        assert threads == {threading.current_thread()}

    within_time(work())


def test_nobody_hears_anything_after_the_close() -> None:
    async def work() -> None:
        transport = LocalTransport(Settings())
        await transport.open()
        heard: Heard = []
        transport.listen(heard.append)
        await transport.close()
        await transport.close()
        transport.send(event(1))
        await transport.flush(1.0)
        assert heard == []

    within_time(work())


def chunk(offset: int, data: bytes = b"x") -> LogChunk:
    return LogChunk(task_id="t1", worker_id="w1", stream="stdout", offset=offset, data=data)


def test_listeners_get_logs_and_events_in_the_order_in_which_they_were_sent() -> None:
    async def work() -> None:
        transport = LocalTransport(Settings())
        transport.send_log(chunk(0))
        await transport.open()
        heard: Heard = []
        transport.listen(heard.append)
        first, between, last = chunk(1), event(1), chunk(2)
        transport.send_log(first)
        transport.send(between)
        transport.send_log(last)
        assert await transport.flush(1.0)
        assert heard == [first, between, last]

    within_time(work())


def test_a_loop_that_is_busy_gets_eight_mebibytes_of_logs_and_every_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        transport = LocalTransport(Settings())
        await transport.open()
        heard: Heard = []
        transport.listen(heard.append)
        data = bytes(65536)
        for number in range(1000):
            transport.send_log(chunk(number, data))
            transport.send(event(number))
        await transport.flush(1.0)
        logs = [said for said in heard if isinstance(said, LogChunk)]
        assert len(logs) == 128
        assert len(heard) == 1128
        transport.send_log(chunk(1000, data))
        await transport.flush(1.0)
        assert [said.offset for said in heard if isinstance(said, LogChunk)][-1] == 1000
        await transport.close()

    within_time(work())
    assert "872 pieces of logs were dropped" in caplog.text


def test_a_late_thread_may_send_when_the_loop_is_closed() -> None:
    transport = LocalTransport(Settings())
    within_time(transport.open())
    transport.send(event(1))
    transport.send_log(chunk(0))
