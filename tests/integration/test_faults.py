"""Faults of the earlier systems that only a real worker on a real Redis can show to be absent."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from flowmesh_core.testing import RedisServer, StandInOrchestrator, WorkerProcess

SLOW = """
import time
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="nap", task_types={"nap"}, target=f"{__name__}:Nap")]

class Nap(Executor):
    def run(self, ctx):
        time.sleep(ctx.raw_spec["seconds"])
        return {"ok": True}
"""


def dispatch(task_id: str, worker_id: str = "w1", **spec: Any) -> str:
    document = {"spec": {"taskType": "echo", **spec}}
    return json.dumps({"task_id": task_id, "task": document, "assigned_worker": worker_id})


def test_a_worker_listens_before_it_says_that_it_is_there(
    flowmesh_redis_server: RedisServer, tmp_path: Path
) -> None:
    commands: list[str] = []
    registered = threading.Event()

    def watch(client: Any) -> None:
        with client.monitor() as monitor:
            watching.set()
            for entry in monitor.listen():
                commands.append(entry["command"])
                if entry["command"].startswith("PUBLISH workers.events"):
                    registered.set()
                    return

    watching = threading.Event()
    with redis.Redis.from_url(flowmesh_redis_server.url) as client:
        thread = threading.Thread(target=watch, args=(client,))
        thread.start()
        assert watching.wait(10)
        with WorkerProcess(flowmesh_redis_server.url, tmp_path / "results"):
            assert registered.wait(20), commands
        thread.join(10)
    order = [command.split()[0] for command in commands]
    assert commands[order.index("SUBSCRIBE")] == "SUBSCRIBE tasks workers.control:w1"
    assert order.index("SUBSCRIBE") < order.index("SADD") < order.index("PUBLISH")


@pytest.mark.slow
def test_messages_for_others_do_not_pile_up_while_a_task_runs(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    worker = WorkerProcess(
        flowmesh_redis_url, tmp_path / "results", arguments=("--plugin", str(plugin))
    )
    with worker, redis.Redis.from_url(flowmesh_redis_url, decode_responses=True) as client:
        flowmesh_orchestrator.wait_workers(1)
        client.publish("tasks", dispatch("long", taskType="nap", seconds=6))
        flowmesh_orchestrator.wait_for(lambda: _types(flowmesh_orchestrator, "long"))
        padding = dispatch("theirs", "w2", message="x" * 200_000)
        for _ in range(10):  # 40 MB in all; Redis hangs up on who leaves 32 MB unread
            for _ in range(20):
                client.publish("tasks", padding)
            _wait_until_read(client)
        assert _types(flowmesh_orchestrator, "long") == ["TASK_STARTED"]
        assert "trying again" not in worker.stderr
        client.publish("tasks", dispatch("next"))
        flowmesh_orchestrator.wait_for(
            lambda: "TASK_SUCCEEDED" in _types(flowmesh_orchestrator, "next")
        )


def _wait_until_read(client: Any) -> None:
    deadline = time.monotonic() + 5
    while any(int(entry["omem"]) for entry in client.client_list(_type="pubsub")):
        assert time.monotonic() < deadline, client.client_list(_type="pubsub")
        time.sleep(0.02)


def _types(host: StandInOrchestrator, task_id: str) -> list[str]:
    return [event["type"] for event in host.events if event.get("task_id") == task_id]


def test_a_worker_opens_no_port(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results") as worker:
        flowmesh_orchestrator.wait_workers(1)
        states = [connection.status for connection in worker.process.net_connections("inet")]
    assert psutil.CONN_ESTABLISHED in states
    assert psutil.CONN_LISTEN not in states
