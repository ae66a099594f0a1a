"""A real worker whose executors do what heavy libraries do by accident, and its own death."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from flowmesh_core.testing import StandInOrchestrator, WorkerProcess

ROUGH = Path(__file__).parents[1] / "executors" / "rough.py"
BEAT_S = 1.0

# What is sent, and how it must end: None is success, else the code and a part of the reason.
TASKS: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    "segfault": ({"do": "segfault"}, ("crash", "SIGSEGV")),
    "exit": ({"do": "exit"}, ("crash", "exit code 3")),
    "hold-gil": ({"do": "hold_gil", "timeoutSec": 3}, ("deadline", "deadline")),
    "detach": ({"do": "detach"}, None),
    "detach-and-die": ({"do": "detach", "then": "kill"}, ("crash", "SIGKILL")),
    "long-line": ({"do": "print", "size": 10_000_000}, None),
    "no-output": ({"do": "close_stdout"}, None),
    "deaf": ({"do": "ignore_sigterm", "timeoutSec": 1}, ("deadline", "deadline")),
    "greedy": (
        {"do": "eat", "resources": {"hardware": {"memory": "300Mi"}}},
        ("crash.out_of_memory", "resources.hardware.memory"),
    ),
    "late": ({"do": "write_after_stop", "timeoutSec": 1}, ("deadline", "deadline")),
    "well": ({"do": "write"}, None),
}


@pytest.fixture
def host(flowmesh_orchestrator: StandInOrchestrator) -> StandInOrchestrator:
    return flowmesh_orchestrator


@pytest.fixture
def client(flowmesh_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(flowmesh_redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def worker(
    host: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> Iterator[WorkerProcess]:
    with WorkerProcess(
        flowmesh_redis_url,
        tmp_path / "results",
        environ={
            "HEARTBEAT_INTERVAL_SEC": str(BEAT_S),
            "FLOWMESH_CANCEL_GRACE_S": "0.5",
            "FLOWMESH_DRAIN_TIMEOUT_S": "1",
        },
        arguments=("--plugin", str(ROUGH)),
    ) as process:
        host.wait_workers(1)
        yield process


def publish(client: redis.Redis, task_id: str, **spec: Any) -> None:
    task = {"spec": {"taskType": "rough", **spec}}
    message = {"task_id": task_id, "task": task, "assigned_worker": "w1"}
    client.publish("tasks", json.dumps(message))


def wait_event(host: StandInOrchestrator, task_id: str, *kinds: str) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        events = (e for e in host.events if e.get("task_id") == task_id)
        return next((e for e in events if e.get("type") in kinds), None)

    return host.wait_for(find, 30)


def wait_outcome(host: StandInOrchestrator, task_id: str) -> dict[str, Any]:
    return wait_event(host, task_id, "TASK_SUCCEEDED", "TASK_FAILED")


def family(worker: WorkerProcess) -> list[psutil.Process]:
    return worker.process.children(recursive=True)


def marked(folder: Path) -> list[str]:
    """Return the marked processes that began below a folder, detached ones too."""
    infos = [process.info for process in psutil.process_iter(["cmdline", "cwd"])]
    lines = [
        " ".join(i["cmdline"] or []) for i in infos if (i["cwd"] or "").startswith(str(folder))
    ]
    return [line for line in lines if "flowmesh-rough" in line]


def test_a_worker_survives_everything_that_executors_do(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis, tmp_path: Path
) -> None:
    for task_id, (spec, expected) in TASKS.items():
        publish(client, task_id, **spec)
        event = wait_outcome(host, task_id)
        if expected is None:
            assert event["type"] == "TASK_SUCCEEDED", event
        else:
            assert event["payload"]["code"] == expected[0], event
            assert expected[1] in event["error"]
    assert worker.alive
    beats = [
        datetime.fromisoformat(event["ts"]).timestamp()
        for event in host.events
        if event.get("type") == "HEARTBEAT"
    ]
    gaps = [after - before for before, after in itertools.pairwise(beats)]
    assert len(beats) > 5
    assert max(gaps) < 2 * BEAT_S, gaps
    everything = [*family(worker)]
    assert worker.stop() == 0
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive
    assert not marked(tmp_path)


def test_nothing_outlives_a_worker_that_was_killed(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis, tmp_path: Path
) -> None:
    publish(client, "shell", do="detach", then="shell")
    wait_event(host, "shell", "TASK_STARTED")
    host.wait_for(lambda: len(marked(tmp_path)) >= 2, 10)
    everything = family(worker)
    assert len(everything) >= 4
    worker.signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(everything, timeout=5)
    assert not alive
    host.wait_for(lambda: not marked(tmp_path), 5)


def test_a_worker_goes_on_when_its_keeper_was_killed(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis
) -> None:
    publish(client, "waits", do="wait")
    wait_event(host, "waits", "TASK_STARTED")
    host.wait_for(lambda: len(family(worker)) >= 3, 10)
    keeper = worker.process.children()[0]
    keeper.kill()
    event = wait_outcome(host, "waits")
    assert event["payload"]["code"] == "crash"
    publish(client, "next", do="write")
    assert wait_outcome(host, "next")["type"] == "TASK_SUCCEEDED"


def test_a_task_is_cancelled_over_the_control_channel(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis, tmp_path: Path
) -> None:
    publish(client, "running", do="shell")
    publish(client, "waiting", do="write")
    wait_event(host, "running", "TASK_STARTED")
    host.wait_for(lambda: marked(tmp_path), 10)
    for task_id in ("nobody", "waiting", "running"):
        order = {"type": "CANCEL", "task_id": task_id, "reason": "changed my mind"}
        assert client.publish("workers.control:w1", json.dumps(order)) == 1
    for task_id in ("running", "waiting"):
        event = wait_outcome(host, task_id)
        assert (event["payload"]["code"], event["error"]) == ("cancelled", "changed my mind")
    assert not marked(tmp_path)
    assert not list(worker.results_dir.rglob("made.txt"))


def test_a_worker_drains_when_it_is_told_to(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis
) -> None:
    client.publish("workers.control:w1", "not an order")
    client.publish("workers.control:w1", json.dumps({"type": "DRAIN"}))
    assert worker.wait() == 0
    host.wait_for(lambda: any(e.get("type") == "UNREGISTER" for e in host.events))


def test_what_a_job_prints_is_published_in_order_with_offsets(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis
) -> None:
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("tasks.logs:talks")
        pubsub.get_message(timeout=1)
        publish(client, "talks", do="print_lines", count=20_000)
        wait_outcome(host, "talks")
        heard: list[dict[str, Any]] = []
        while message := pubsub.get_message(timeout=1):
            heard.append(json.loads(message["data"]))
    log = (worker.results_dir / "talks" / "logs" / "stdout.log").read_bytes()
    assert "".join(chunk["data"] for chunk in heard).encode() == log
    assert [chunk["offset"] for chunk in heard] == sorted({chunk["offset"] for chunk in heard})
    assert {chunk["stream"] for chunk in heard} == {"stdout"}
    assert log.count(b"\n") == 20_000


def test_the_small_task_goes_ahead_of_the_one_that_must_wait(
    host: StandInOrchestrator, flowmesh_redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    total = psutil.virtual_memory().total
    most = {"hardware": {"memory": str(int(total * 0.3))}}
    with WorkerProcess(
        flowmesh_redis_url,
        tmp_path / "results",
        environ={"MAX_CONCURRENT_TASKS": "2", "FLOWMESH_CANCEL_GRACE_S": "0.5"},
        arguments=("--plugin", str(ROUGH)),
    ):
        host.wait_workers(1)
        two_thirds = {"hardware": {"memory": str(int(total * 0.6))}}
        publish(client, "first", do="wait", timeoutSec=3, resources=two_thirds)
        wait_event(host, "first", "TASK_STARTED")
        publish(client, "large", do="write", resources=two_thirds)
        publish(client, "small", do="write", resources=most)
        publish(client, "never", do="write", resources={"hardware": {"memory": "900Ti"}})
        assert wait_outcome(host, "never")["payload"]["code"] == "resource"
        assert wait_outcome(host, "small")["type"] == "TASK_SUCCEEDED"
        assert not any(e.get("task_id") == "large" for e in host.events)
        assert wait_outcome(host, "large")["type"] == "TASK_SUCCEEDED"


def test_the_memory_of_an_engine_is_back_when_it_was_unloaded(
    host: StandInOrchestrator, flowmesh_redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    with WorkerProcess(
        flowmesh_redis_url,
        tmp_path / "results",
        environ={"FLOWMESH_WARM_IDLE_S": "1"},
        arguments=("--plugin", str(ROUGH)),
    ) as worker:
        host.wait_workers(1)
        publish(client, "holds", do="hold", size=200 << 20)
        assert wait_outcome(host, "holds")["type"] == "TASK_SUCCEEDED"

        def used() -> int:
            return sum(p.memory_info().rss for p in family(worker) if p.is_running())

        assert used() > 200 << 20
        host.wait_for(lambda: used() < 50 << 20, 10)
        assert worker.alive
