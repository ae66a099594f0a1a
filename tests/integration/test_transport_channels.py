"""Logs, progress and control over a real Redis, also one that stops, stalls or refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from flowmesh_core.config import load_settings
from flowmesh_core.events import TASK_PROGRESS, TASK_SUCCEEDED, LogChunk, TaskEvent
from flowmesh_core.testing.redis_server import RedisServer
from flowmesh_core.transports.base import Delivery
from flowmesh_core.transports.redis_pubsub import RedisPubSubTransport

MIB = 1024 * 1024
Message = dict[str, Any]


def chunk(offset: int, data: bytes, task_id: str = "a", stream: str = "stdout") -> LogChunk:
    return LogChunk(task_id=task_id, worker_id="w1", stream=stream, offset=offset, data=data)


def success(task_id: str = "a") -> TaskEvent:
    return TaskEvent(type=TASK_SUCCEEDED, task_id=task_id, worker_id="w1")


def flood(transport: RedisPubSubTransport, size_bytes: int, task_id: str = "a") -> None:
    """Send that much of a log in pieces of 64 KiB."""
    for offset in range(0, size_bytes, 65536):
        transport.send_log(chunk(offset, b"x" * 65536, task_id))


class Reader:
    """Subscribes on one connection, so that it sees messages in the order Redis got them."""

    def __init__(self, url: str, *patterns: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._pubsub: Any = redis.client.PubSub(self._client.connection_pool)
        self._pubsub.psubscribe(*patterns)
        for _ in patterns:
            assert self._pubsub.get_message(timeout=5)
        self.heard: list[Message] = []
        self.channels: set[str] = set()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_about: object) -> None:
        self._pubsub.close()
        self._client.close()

    def read_until(self, condition: Callable[[Message], bool]) -> list[Message]:
        """Return all messages up to the first for which the condition holds."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            message = self._pubsub.get_message(timeout=0.2)
            if message is not None:
                self.channels.add(message["channel"].decode())
                self.heard.append(json.loads(message["data"]))
                if condition(self.heard[-1]):
                    return self.heard
        raise AssertionError(f"not heard; {len(self.heard)} others: {self.heard[-3:]}")

    def read_to_success(self, task_id: str = "a") -> list[Message]:
        return self.read_until(lambda m: (m["type"], m["task_id"]) == (TASK_SUCCEEDED, task_id))


def log_of(heard: list[Message], task_id: str = "a", stream: str = "stdout") -> str:
    """Return what a reader has of a log, and check that nothing is missing in it."""
    text = ""
    for message in heard:
        if (message["type"], message["task_id"], message.get("stream")) == (
            *("TASK_LOG", task_id),
            stream,
        ):
            assert message["offset"] == len(text.encode())
            text += message["data"]
    return text


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisPubSubTransport]:
    transport = RedisPubSubTransport(load_settings({}, redis_url=url, worker_id="w1", **options))
    opening = asyncio.ensure_future(transport.open())
    try:
        await asyncio.wait_for(asyncio.shield(opening), 10)
        yield transport
    finally:
        transport.stop_receiving()
        await transport.close()
        await opening


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server that may be stopped and stalled."""
    with RedisServer() as server:
        yield server


def test_small_pieces_leave_joined_and_soon(flowmesh_redis_url: str) -> None:
    line = "epoch 1, loss 0.5, é\n"
    size = len(line.encode())

    async def work() -> tuple[list[Message], float]:
        async with opened(flowmesh_redis_url) as transport:
            for number in range(1000):
                transport.send_log(chunk(number * size, line.encode()))
            started = time.monotonic()
            end = 1000 * size
            heard = await asyncio.to_thread(
                reader.read_until, lambda m: m["offset"] + m["size"] == end
            )
            return heard, time.monotonic() - started

    with Reader(flowmesh_redis_url, "tasks.logs:*") as reader:
        heard, took_s = asyncio.run(work())
        assert reader.channels == {"tasks.logs:a"}
    assert log_of(heard) == line * 1000
    assert len(heard) < 20
    assert took_s < 1


def test_who_reads_until_the_outcome_has_the_whole_log_and_the_last_progress(
    flowmesh_redis_url: str,
) -> None:
    async def work() -> None:
        async with opened(flowmesh_redis_url) as transport:
            flood(transport, 4 * MIB, "other")
            for number in range(50):
                task_id = f"t{number}"
                transport.send_log(chunk(0, b"first ", task_id))
                transport.send_log(chunk(0, b"warning", task_id, "stderr"))
                transport.send_log(chunk(6, b"last", task_id))
                progress = TaskEvent(type=TASK_PROGRESS, task_id=task_id, payload={"fraction": 1})
                transport.send(progress)
                transport.send(success(task_id))
                await asyncio.sleep(0.001)
            assert await transport.flush(10)

    with Reader(flowmesh_redis_url, "tasks.*") as reader:
        asyncio.run(work())
        for number in range(50):
            heard = reader.read_to_success(f"t{number}")
            assert log_of(heard, f"t{number}") == "first last"
            assert log_of(heard, f"t{number}", "stderr") == "warning"
            about = [m["type"] for m in heard if m["task_id"] == f"t{number}"]
            assert about.count(TASK_PROGRESS) == 1


def test_a_flush_brings_everything_out(flowmesh_redis_url: str) -> None:
    async def work() -> None:
        async with opened(flowmesh_redis_url) as transport:
            transport.send_log(chunk(0, b"the end"))
            assert await transport.flush(10)

    with Reader(flowmesh_redis_url, "tasks.logs:a") as reader:
        asyncio.run(work())
        assert log_of(reader.read_until(lambda m: m["size"] == 7)) == "the end"


def test_events_overtake_a_flood_of_logs(flowmesh_redis_url: str) -> None:
    async def work() -> None:
        async with opened(flowmesh_redis_url) as transport:
            flood(transport, 8 * MIB - 128 * 1024, "noisy")
            await asyncio.to_thread(reader.read_until, lambda m: m["type"] == "TASK_LOG")
            transport.send(success("quiet"))
            await asyncio.to_thread(reader.read_to_success, "quiet")
            assert await transport.flush(10)

    with Reader(flowmesh_redis_url, "tasks.*") as reader:
        asyncio.run(work())
        before = sum(message.get("size", 0) for message in reader.heard)
        heard = reader.read_until(lambda m: m.get("offset") == 8 * MIB - 3 * 65536)
    assert before < 7 * MIB
    assert len(log_of(heard, "noisy")) == 8 * MIB - 128 * 1024


def test_a_flood_that_never_ends_holds_up_neither_outcome_nor_flush(
    flowmesh_redis_url: str,
) -> None:
    async def work() -> list[float]:
        took: list[float] = []
        async with opened(flowmesh_redis_url) as transport:
            ended = threading.Event()

            def service() -> None:
                offset = 0
                while not ended.is_set():
                    transport.send_log(chunk(offset, b"x" * 65536, "service"))
                    offset += 65536

            working = asyncio.ensure_future(asyncio.to_thread(service))
            for number in range(20):
                started = time.monotonic()
                transport.send(success("service"))  # a service succeeds while it runs on
                transport.send(success(f"t{number}"))
                await asyncio.to_thread(reader.read_to_success, f"t{number}")
                took.append(time.monotonic() - started)
            assert await transport.flush(10)
            ended.set()
            await working
        return took

    with Reader(flowmesh_redis_url, "tasks.events") as reader:
        took = asyncio.run(work())
    assert max(took) < 3


def test_a_stalled_redis_slows_no_writer_and_costs_only_logs(own_server: RedisServer) -> None:
    async def work() -> float:
        async with opened(own_server.url) as transport:
            assert own_server.pid
            os.kill(own_server.pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                flood(transport, 64 * MIB)
                transport.send(success())
                took_s = time.monotonic() - started
                assert not await transport.flush(0.5)
            finally:
                os.kill(own_server.pid, signal.SIGCONT)
            assert await transport.flush(10)
            return took_s

    with Reader(own_server.url, "tasks.*") as reader:
        took_s = asyncio.run(work())
        heard = reader.read_to_success()
    assert took_s < 1
    logs = [message for message in heard if message["type"] == "TASK_LOG"]
    offsets = [message["offset"] for message in logs]
    assert offsets == sorted(offsets)
    assert 7 * MIB < sum(message["size"] for message in logs) < 12 * MIB
    assert offsets[-1] + logs[-1]["size"] == 64 * MIB, "the latest are kept"


def user_url(server: RedisServer, *rules: str) -> str:
    """Return the address for a user with these rights."""
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", *rules)
    return f"redis://app:pw@{urlsplit(server.url).netloc}/0"


def test_logs_wait_for_a_redis_that_refuses_connections_for_a_while(
    own_server: RedisServer,
) -> None:
    async def work() -> None:
        async with opened(user_url(own_server, "allchannels")) as transport:
            with redis.Redis.from_url(own_server.url) as client:
                client.execute_command("ACL", "SETUSER", "app", "off")
                client.execute_command("CLIENT", "KILL", "USER", "app")
                transport.send_log(chunk(0, b"during "))
                await asyncio.sleep(0.3)
                transport.send_log(chunk(7, b"the outage"))
                transport.send(success())
                assert not await transport.flush(0.5)
                client.execute_command("ACL", "SETUSER", "app", "on")
            assert await transport.flush(10)

    with Reader(own_server.url, "tasks.*") as reader:
        asyncio.run(work())
        assert log_of(reader.read_to_success()) == "during the outage"


def test_forbidden_channels_cost_logs_and_progress_but_no_event(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = ("&tasks", "&tasks.events", "&workers.events", "&workers.control:*")
    url = user_url(own_server, "resetchannels", *earlier)

    async def work() -> None:
        async with opened(url) as transport:
            for number in range(3):
                transport.send_log(chunk(0, b"text", f"t{number}"))
                transport.send(TaskEvent(type=TASK_PROGRESS, task_id=f"t{number}"))
                transport.send(success(f"t{number}"))
                await asyncio.to_thread(reader.read_to_success, f"t{number}")
            assert await transport.flush(10)

    with Reader(own_server.url, "tasks.*") as reader:
        asyncio.run(work())
        assert [message["type"] for message in reader.heard] == [TASK_SUCCEEDED] * 3
    assert caplog.text.count("redis refuses logs or progress") == 1
    assert "6 messages of logs and progress were not sent" in caplog.text


# Control.


async def next_of(deliveries: AsyncIterator[Delivery]) -> Delivery:
    return await asyncio.wait_for(deliveries.__anext__(), 10)


def test_orders_are_told_from_tasks_and_need_not_name_the_worker(flowmesh_redis_url: str) -> None:
    async def work() -> list[Delivery]:
        async with opened(flowmesh_redis_url) as transport:
            with redis.Redis.from_url(flowmesh_redis_url) as client:
                client.publish("tasks", b'{"assigned_worker": "somebody else"}')
                client.publish("workers.control:w2", b"for another")
                client.publish("workers.control:w1", b'{"type": "DRAIN"}')
                client.publish("tasks", b'{"assigned_worker": "w1"}')
            deliveries = transport.deliveries()
            return [await next_of(deliveries), await next_of(deliveries)]

    assert asyncio.run(work()) == [
        Delivery(b'{"type": "DRAIN"}', control=True),
        Delivery(b'{"assigned_worker": "w1"}'),
    ]


def test_orders_are_heard_again_after_a_lost_connection(flowmesh_redis_url: str) -> None:
    async def work() -> Delivery:
        async with opened(flowmesh_redis_url) as transport:
            with redis.Redis.from_url(flowmesh_redis_url) as client:
                assert client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
                deadline = time.monotonic() + 10
                while not client.publish("workers.control:w1", b"order"):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
            return await next_of(transport.deliveries())

    assert asyncio.run(work()) == Delivery(b"order", control=True)


def test_open_returns_when_both_channels_are_heard(flowmesh_redis_url: str) -> None:
    async def work() -> None:
        async with opened(flowmesh_redis_url):
            with redis.Redis.from_url(flowmesh_redis_url) as client:
                heard = client.pubsub_numsub("tasks", "workers.control:w1")
        assert dict(heard) == {b"tasks": 1, b"workers.control:w1": 1}

    asyncio.run(work())
