from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from flowmesh_core.config import Settings
from flowmesh_core.events import TASK_STARTED, TaskEvent, WorkerEvent
from flowmesh_core.transports.local import LocalTransport


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
        heard: list[list[TaskEvent | WorkerEvent]] = [[], []]
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
        heard: list[TaskEvent | WorkerEvent] = []
        transport.listen(heard.append)
        await transport.close()
        await transport.close()
        transport.send(event(1))
        await transport.flush(1.0)
        assert heard == []

    within_time(work())
