"""Faults of the earlier systems that no other test of the core shows to be absent."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import Executor, RunContext
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.config import Settings, load_settings
from flowmesh_core.contract import Destination
from flowmesh_core.events import TaskEvent, WorkerEvent
from flowmesh_core.plugins import load_plugins
from flowmesh_core.stores.http import HttpStore
from flowmesh_core.testing import run_task
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.transports.redis_pubsub import RedisPubSubTransport
from flowmesh_core.worker import Worker

Event = TaskEvent | WorkerEvent
ENDS = ("TASK_SUCCEEDED", "TASK_FAILED")
PLUGIN = """
import time
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [
        ExecutorInfo(name="shout", task_types={"shout"}, target=f"{__name__}:Shout",
                     inputs={"rows"}),
        ExecutorInfo(name="nap", task_types={"nap"}, target=f"{__name__}:Nap",
                     capabilities={"cpu", "concurrent"}),
    ]

class Shout(Executor):
    def run(self, ctx):
        items = [{"index": r.index, "output": r.prompt.upper()} for r in ctx.inputs.rows]
        return {"ok": True, "items": items, "usage": {"num_requests": len(items)}}

class Nap(Executor):
    def run(self, ctx):
        (ctx.folder / "began").touch()
        until = time.monotonic() + ctx.raw_spec["seconds"]
        while time.monotonic() < until:
            ctx.check()
            time.sleep(0.005)
        return {"ok": True, "echo": ctx.raw_spec}
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "faults.py"
    path.write_text(PLUGIN)
    return path


def message(task_id: str, spec: dict[str, Any], **fields: Any) -> bytes:
    body = {"task_id": task_id, "task": {"spec": spec}, "assigned_worker": "w1", **fields}
    return json.dumps(body).encode()


class Bench:
    """A worker over the local transport with everything that it said."""

    def __init__(self, settings: Settings, plugin: Path) -> None:
        self.events: list[Event] = []
        self.transport = LocalTransport(settings)
        plugins = load_plugins(settings, files=[plugin])
        self.worker = Worker(settings, transport=self.transport, plugins=plugins)
        self.transport.listen(self.events.append)

    def ends(self, task_id: str = "") -> list[TaskEvent]:
        about = [event for event in self.events if isinstance(event, TaskEvent)]
        return [e for e in about if e.type in ENDS and task_id in ("", e.task_id)]

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, [event.type for event in self.events]
            await asyncio.sleep(0.005)

    def run(self, bodies: Sequence[bytes], condition: Callable[[Bench], Any]) -> None:
        """Give it the messages, stop it once the condition holds, and wait for its end."""

        async def work() -> None:
            working = asyncio.ensure_future(self.worker.run())
            for body in bodies:
                self.transport.submit(body)
            await self.until(lambda: condition(self))
            self.worker.stop()
            await working

        asyncio.run(work())


def make_bench(tmp_path: Path, plugin: Path, **options: Any) -> Bench:
    settings = load_settings({}, worker_id="w1", results_dir=tmp_path / "results", **options)
    return Bench(settings, plugin)


def read(tmp_path: Path, task_id: str, name: str = "responses.json") -> Any:
    return json.loads((tmp_path / "results" / task_id / name).read_text())


def test_a_merged_child_keeps_its_own_export_and_usage(tmp_path: Path, plugin: Path) -> None:
    def spec(*prompts: str) -> dict[str, Any]:
        export = {"path": "out.jsonl", "fields": {"said": "output"}}
        data = {"type": "list", "items": list(prompts)}
        return {"taskType": "shout", "data": data, "postprocess": {"jsonl_export": export}}

    child = {"task_id": "child", "spec": spec("one", "two")}
    bench = make_bench(tmp_path, plugin)
    body = message("lead", spec("zero"), merged_children=[child])
    bench.run([body], lambda bench: bench.ends("lead"))
    lines = (tmp_path / "results" / "child" / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"said": "ONE"}, {"said": "TWO"}]
    assert read(tmp_path, "child")["jsonl_export"]["record_count"] == 2
    assert read(tmp_path, "child")["usage"] == {"num_requests": 2}
    assert read(tmp_path, "lead")["jsonl_export"]["record_count"] == 1
    assert read(tmp_path, "lead")["usage"] == {"num_requests": 1}


def test_a_child_that_cannot_be_delivered_fails_no_parent(tmp_path: Path, plugin: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        output = {"destination": {"type": "http", "url": url}}
        child = {"task_id": "child", "spec": {"taskType": "echo", "output": output}}
        body = message("lead", {"taskType": "echo"}, merged_children=[child])
        bench = make_bench(tmp_path, plugin, delivery_retries=0)
        bench.run([body], lambda bench: bench.ends("lead"))
    assert [event.type for event in bench.ends()] == ["TASK_SUCCEEDED"]
    assert read(tmp_path, "child")["ok"] is True


def test_many_tasks_at_once_are_each_answered_once_and_without_a_ticker(
    tmp_path: Path, plugin: Path
) -> None:
    ids = [f"t{number}" for number in range(60)]
    bodies = [message(task_id, {"taskType": "nap", "seconds": 0.02}) for task_id in ids]
    bench = make_bench(tmp_path, plugin, max_concurrent_tasks=8)
    started = time.monotonic()
    bench.run(bodies, lambda bench: len(bench.ends()) == len(ids))
    # A worker that asks for one task every five seconds would take five minutes.
    assert time.monotonic() - started < 30
    assert sorted(event.task_id for event in bench.ends()) == sorted(ids)
    assert {event.type for event in bench.ends()} == {"TASK_SUCCEEDED"}
    statuses = [event.status for event in bench.events if event.type == "STATUS"]
    assert "RUNNING" in statuses
    assert statuses[-1] == "IDLE"


def test_a_task_that_waits_when_the_worker_stops_never_starts(tmp_path: Path, plugin: Path) -> None:
    long, waiting = ({"taskType": "nap", "seconds": seconds} for seconds in (60, 0))
    bench = make_bench(tmp_path, plugin, drain_timeout_s=0.1)
    running = tmp_path / "results" / ".long.attempt-1" / "began"
    bench.run(
        [message("long", long), message("waiting", waiting)],
        lambda bench: running.exists() and "waiting" in bench.worker._ledger.held,
    )
    (end,) = bench.ends("waiting")
    assert (end.type, end.payload["code"]) == ("TASK_FAILED", "cancelled")
    assert end.payload["retriable"] is True
    assert not list((tmp_path / "results").glob("*waiting*"))


class Talks(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        ctx.log("x" * 1_000_000)
        ctx.log("y")
        return {"ok": True}


def test_a_log_line_of_a_million_characters_arrives_whole(tmp_path: Path) -> None:
    run = run_task(Talks, {}, folder=tmp_path)
    first, second = (run.folder / "logs" / "task.log").read_text().splitlines()
    assert first.endswith(" INFO " + "x" * 1_000_000)
    assert second.endswith(" INFO y")


def test_an_outage_never_blocks_who_reports(tmp_path: Path) -> None:
    async def report() -> float:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
            transport = RedisPubSubTransport(load_settings({}, redis_url=url, worker_id="w1"))
            opening = asyncio.ensure_future(transport.open())
            await asyncio.sleep(0.05)
            started = time.monotonic()
            for number in range(5000):
                transport.send(TaskEvent(type="TASK_PROGRESS", task_id=f"t{number}"))
            elapsed_s = time.monotonic() - started
            assert not await transport.flush(0.1)
            transport.stop_receiving()
            await transport.close()
            await opening
            return elapsed_s

    assert asyncio.run(report()) < 5


def test_echo_shows_no_credential_that_stands_in_its_spec(tmp_path: Path) -> None:
    destination = {"headers": {"Authorization": "Bearer abc123"}}
    spec = {"qdrant": {"api_key": "k-123456"}, "output": {"destination": destination}}
    run = run_task("echo", {"taskType": "echo", "message": "hi", **spec}, folder=tmp_path)
    assert run.result["echo"]["message"] == "hi"
    assert run.result["echo"]["qdrant"] == {"api_key": "***"}
    assert "abc123" not in json.dumps(run.result)


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Reads a request and writes an answer in small steps, for longer than the timeouts below."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    server.bind(("127.0.0.1", 0))
    server.listen(1)

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(1024)
                if not piece:
                    return
                head += piece
            words = head.lower().split(b"content-length: ")
            left = int(words[1].split(b"\r\n")[0]) if len(words) > 1 else 0
            left -= len(head.split(b"\r\n\r\n", 1)[1])
            until = time.monotonic() + 3.5
            while left > 0:
                piece = connection.recv(1 << 16)
                if not piece:
                    return
                left -= len(piece)
                time.sleep(0.01 if time.monotonic() < until else 0)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n"
            )
            for _ in range(15):
                connection.sendall(b"x")
                time.sleep(0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/file"
    thread.join(30)
    server.close()


def test_a_slow_download_that_lives_outlasts_its_timeout(slow_server: str, tmp_path: Path) -> None:
    fetcher = Fetcher(policy=NetworkPolicy(), results_dir=tmp_path, attempts=1)
    started = time.monotonic()
    path = fetcher.download(slow_server, tmp_path / "in", timeout_s=2.5)
    assert time.monotonic() - started > 2.5
    assert path.read_bytes() == b"x" * 15


def test_a_slow_upload_that_lives_outlasts_its_timeout(slow_server: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(24 << 20))
    settings = load_settings({}, results_dir=tmp_path, worker_id="w1", delivery_retries=0)
    destination = Destination(type="http", url=slow_server, timeout_s=2.5)

    async def upload() -> dict[str, Any]:
        store = HttpStore(settings)
        try:
            return await store.upload("task", path, path, destination)
        finally:
            await store.close()

    started = time.monotonic()
    assert asyncio.run(upload())["uploaded"] is True
    assert time.monotonic() - started > 2.5
