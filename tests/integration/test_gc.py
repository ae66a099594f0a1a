"""What real workers reported goes, and nothing else: outages, kills, groups, services, reruns."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from flowmesh_core.config import load_settings
from flowmesh_core.events import TASK_STARTED, TASK_SUCCEEDED, TaskEvent
from flowmesh_core.housekeeping.history import History
from flowmesh_core.testing import wait_for
from flowmesh_core.testing.redis_server import RedisServer
from flowmesh_core.testing.worker_process import WorkerProcess
from flowmesh_core.transports.redis_pubsub import RedisPubSubTransport

ROUGH = Path(__file__).parents[1] / "executors" / "rough.py"
ENDS = ("TASK_SUCCEEDED", "TASK_FAILED")


class Fleet:
    """One worker on a Redis of its own, and whoever sends it tasks."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.server = server
        self.results = folder / "results"
        self.worker = WorkerProcess(
            server.url, self.results, arguments=("--plugin", str(ROUGH)), environ={"LOG_LEVEL": ""}
        )
        self._count = 0

    def start(self) -> None:
        self.worker.start()
        with self.client() as client:
            wait_for(lambda: client.hget("worker:w1", "status") == "IDLE")

    @contextmanager
    def client(self) -> Iterator[Any]:
        with redis.Redis.from_url(self.server.url, decode_responses=True) as client:
            yield client

    @contextmanager
    def listening(self) -> Iterator[Callable[[str], str]]:
        """Hear events, as an orchestrator does; gives a function that waits for a task's end."""
        with self.client() as client, client.pubsub() as pubsub:
            pubsub.subscribe("tasks.events")
            assert pubsub.get_message(timeout=5)

            def wait(task_id: str) -> str:
                def ended() -> str:
                    message = pubsub.get_message(timeout=0.5)
                    event = json.loads(message["data"]) if message else {}
                    ours = event.get("task_id") == task_id and event["type"] in ENDS
                    if ours and event["error"]:
                        sys.stdout.write(f"{task_id} {event['error']}\n")  # seen when it fails
                    return str(event["type"]) if ours else ""

                return str(wait_for(ended))

            yield wait

    def send(self, task_id: str, children: tuple[dict[str, Any], ...] = (), **spec: Any) -> None:
        self._count += 1
        body = {
            "task_id": task_id,
            "assigned_worker": "w1",
            "task": {"spec": {"taskType": "echo", **spec}},
            "dispatched_at": f"2026-01-01T00:00:{self._count:02}+00:00",
            "merged_children": list(children) or None,
        }
        with self.client() as client:
            assert client.publish("tasks", json.dumps(body)) == 1

    def order(self, **order: str) -> None:
        with self.client() as client:
            assert client.publish("workers.control:w1", json.dumps(order)) == 1

    def is_reported(self, task_id: str) -> bool:
        history = History(self.results)
        history.refresh()
        return history.reported_at(task_id) is not None

    def is_held(self, task_id: str) -> bool:
        history = History(self.results)
        history.refresh()
        return history.is_held(task_id)

    def clean(self, *options: str) -> set[str]:
        """Remove what was reported, however young; return what went."""
        argv = ("gc", "--older-than", "0s", "--results-dir", str(self.results), "--json", *options)
        done = subprocess.run(
            [sys.executable, "-m", "flowmesh_core", *argv],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return {Path(row["folder"]).name for row in json.loads(done.stdout)["removed"]}

    def names(self) -> set[str]:
        return {path.name for path in self.results.iterdir()} - {".workers"}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with RedisServer() as server:
        fleet = Fleet(server, tmp_path)
        fleet.start()
        yield fleet
        if fleet.worker.alive:
            fleet.worker.stop()


def test_what_an_outage_and_a_kill_kept_from_being_reported_stays(fleet: Fleet) -> None:
    with fleet.listening() as wait:
        fleet.send("told")
        assert wait("told") == "TASK_SUCCEEDED"
        fleet.send("bad", taskType="rough", do="fail")
        assert wait("bad") == "TASK_FAILED"
        wait_for(lambda: fleet.is_reported("told") and fleet.is_reported("bad"))
        fleet.send("untold", taskType="rough.together", s=1.0)
        wait_for(lambda: fleet.is_held("untold"))
        fleet.server.stop()
    wait_for((fleet.results / "untold" / "responses.json").exists)
    time.sleep(0.5)
    fleet.worker.signal(signal.SIGKILL)
    fleet.worker.wait()
    gone = fleet.clean("--max-size", "0")
    assert gone >= {"told", "bad"}
    assert fleet.names() == {"untold"}
    # What its engines left went too: they ended with the worker.
    assert len(gone) == 4
    assert not list((fleet.results / ".workers" / "w1" / "engines").iterdir())
    # The task is sent again, and its folder replaced and reported.
    fleet.server.start(empty=True)
    fleet.start()
    with fleet.listening() as wait:
        fleet.send("untold", taskType="rough.together", s=0)
        assert wait("untold") == "TASK_SUCCEEDED"
    wait_for(lambda: fleet.is_reported("untold"))
    assert fleet.clean() == {"untold"}


def test_an_outcome_that_nobody_heard_is_not_reported_until_somebody_does(fleet: Fleet) -> None:
    fleet.send("t1")
    wait_for((fleet.results / "t1" / "responses.json").exists)
    time.sleep(0.8)
    assert fleet.clean("--unreported") == set()  # the worker that lives has it to say yet
    with fleet.listening() as wait:
        assert wait("t1") == "TASK_SUCCEEDED"
    wait_for(lambda: fleet.is_reported("t1"))
    assert fleet.clean() == {"t1"}


def test_children_are_reported_with_their_leader_and_not_by_its_failure(fleet: Fleet) -> None:
    spec = {"taskType": "inference", "executor": "rough.infers", "inference": {"temperature": 1}}
    child: dict[str, Any] = {"task_id": "c1", "spec": {**spec, "data": "x"}}
    refused = {"task_id": "c2", "spec": 7}
    with fleet.listening() as wait:
        fleet.send("good", (child, refused), **spec, data="y")
        assert wait("good") == "TASK_SUCCEEDED"
        wait_for(lambda: all(map(fleet.is_reported, ("good", "c1", "c2"))))
        assert fleet.clean() == {"good", "c1", "c2"}
        fleet.send("bad", ({**child, "task_id": "c3"},), **spec, data="y", do="fail")
        assert wait("bad") == "TASK_FAILED"
        wait_for(lambda: fleet.is_reported("bad"))
        assert (fleet.results / "c3" / "responses.json").exists()
        assert not fleet.is_reported("c3")
        assert not fleet.is_held("c3")
        assert fleet.clean() == {"bad"}
        # Sent again alone, it is acknowledged with what was kept of it.
        fleet.send("c3", **child["spec"])
        assert wait("c3") == "TASK_SUCCEEDED"
    wait_for(lambda: fleet.is_reported("c3"))
    assert fleet.clean() == {"c3"}


def test_a_service_that_is_up_keeps_its_folder(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.listening() as wait:
        fleet.send("s1", taskType="rough.serves", marker=str(tmp_path / "marker"))
        assert wait("s1") == "TASK_SUCCEEDED"
    time.sleep(0.5)
    assert fleet.clean("--max-size", "0") == set()
    assert (fleet.results / "s1").exists()
    fleet.order(type="CANCEL", task_id="s1")
    wait_for(lambda: fleet.is_reported("s1"))
    assert fleet.clean() == {"s1"}


def test_a_service_is_reported_when_it_ends_with_its_worker(fleet: Fleet, tmp_path: Path) -> None:
    with fleet.listening() as wait:
        fleet.send("s1", taskType="rough.serves", marker=str(tmp_path / "marker"))
        assert wait("s1") == "TASK_SUCCEEDED"
    assert fleet.worker.stop() == 0
    assert fleet.clean() == {"s1"}


def test_a_task_that_runs_again_keeps_what_it_left_before(fleet: Fleet) -> None:
    with fleet.listening() as wait:
        fleet.send("t1", taskType="rough", do="fail")
        assert wait("t1") == "TASK_FAILED"
        wait_for(lambda: fleet.is_reported("t1"))
        fleet.send("t1", taskType="rough", do="wait")
        wait_for((fleet.results / ".t1.attempt-2").exists)
        wait_for(lambda: fleet.is_held("t1"))
        assert fleet.clean("--unreported", "--max-size", "0") == set()
        assert fleet.names() == {".t1.attempt-1", ".t1.attempt-2"}
        fleet.order(type="CANCEL", task_id="t1")
        assert wait("t1") == "TASK_FAILED"
    wait_for(lambda: fleet.is_reported("t1"))
    assert fleet.clean() == {"t1"}
    assert fleet.names() == set()


def test_no_outcome_is_lost_when_a_clean_up_runs_all_the_time(fleet: Fleet) -> None:
    stop = threading.Event()
    gone: list[str] = []

    def clean() -> None:
        while not stop.is_set():
            gone.extend(fleet.clean("--max-size", "0", "--unreported"))

    cleaning = threading.Thread(target=clean)
    cleaning.start()
    try:
        with fleet.listening() as wait:
            for number in range(40):
                fleet.send("again", taskType="rough.together", s=0.02)
                assert wait("again") == "TASK_SUCCEEDED"
                fleet.send(f"t{number}")
                assert wait(f"t{number}") == "TASK_SUCCEEDED"
    finally:
        stop.set()
        cleaning.join()

    def is_clean() -> bool:
        gone.extend(fleet.clean())
        return not fleet.names()

    wait_for(is_clean)
    assert fleet.names() == set()
    assert {f"t{number}" for number in range(40)} <= set(gone)


def test_the_transport_tells_when_an_event_has_left_for_certain() -> None:
    async def work(server: RedisServer) -> None:
        left: list[str] = []
        transport = RedisPubSubTransport(load_settings({"REDIS_URL": server.url}))
        await transport.open()
        try:
            server.stop()
            for kind in (TASK_STARTED, TASK_SUCCEEDED):
                event = TaskEvent(type=kind, task_id="t1", worker_id="w1")
                transport.send(event, partial(left.append, kind))
            await asyncio.sleep(0.5)
            assert left == []
            server.start()
            assert await transport.flush(10)
            assert left == [TASK_STARTED]  # nobody listens: the outcome is kept
            with redis.Redis.from_url(server.url) as client, client.pubsub() as pubsub:
                pubsub.subscribe("tasks.events")
                await asyncio.to_thread(wait_for, lambda: len(left) > 1)
                assert pubsub.get_message(timeout=1)
            assert left == [TASK_STARTED, TASK_SUCCEEDED]
            await asyncio.sleep(0.7)
            assert len(left) == 2
        finally:
            await transport.close()

    with RedisServer() as server:
        asyncio.run(work(server))
