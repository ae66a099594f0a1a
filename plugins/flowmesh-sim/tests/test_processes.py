"""Failures on demand really happen, in processes of their own and on a real worker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flowmesh_core import load_settings
from flowmesh_core.testing import StandInOrchestrator, TaskRun, WorkerProcess, run_task

FAST = {"time_scale": 0, "epochs": 6, "seed": 5}
SLOTS = 20
README = Path(__file__).parents[1] / "README.md"


def simulate(
    folder: Path, *, failure: dict[str, Any] | None = None, grace_s: float = 600, **fields: Any
) -> TaskRun:
    block = {**FAST, **fields.pop("block", {}), "failure": failure}
    settings = load_settings({}, results_dir=folder, cancel_grace_s=grace_s)
    return run_task("sim", {"simulate": block, **fields}, folder=folder, settings=settings)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_crash_is_that_of_its_signal(tmp_path: Path, name: str) -> None:
    error = simulate(tmp_path, failure={"kind": "crash", "at_epoch": 2, "signal": name}).error
    assert error is not None
    assert (error.code, error.retriable, getattr(error, "signal", "")) == ("crash", True, name)


def test_an_exit_has_its_code(tmp_path: Path) -> None:
    error = simulate(tmp_path, failure={"kind": "exit", "code": 7}).error
    assert error is not None
    assert (error.code, getattr(error, "exit_code", None)) == ("crash", 7)


def test_memory_that_ran_out_is_told_as_that(tmp_path: Path) -> None:
    error = simulate(tmp_path, failure={"kind": "out_of_memory"}).error
    assert error is not None
    assert error.code == "crash.out_of_memory"


def test_memory_is_really_taken_and_a_reservation_holds(tmp_path: Path) -> None:
    def takes(reserved: str, seconds: float) -> TaskRun:
        hardware = {"hardware": {"memory": reserved}}
        block = {"memory_mb": 400, "time_scale": seconds, "epochs": 1, "epoch_seconds": [1, 1]}
        return simulate(tmp_path / reserved, resources=hardware, block=block)

    error = takes("300Mi", 60).error
    assert error is not None
    assert (error.code, error.retriable) == ("crash.out_of_memory", False)
    assert takes("600Mi", 2).ok


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    failure = {"kind": "crash", "at_epoch": 4, "attempts": 1}
    killed = simulate(tmp_path, failure=failure)
    assert killed.error is not None
    assert killed.error.code == "crash"
    second = simulate(tmp_path, failure=failure)
    assert second.result["resume_from_path"] == str(killed.folder / "checkpoints/checkpoint.json")
    assert second.progress[0]["step"] == 40
    assert second.result["history"] == simulate(tmp_path / "whole").result["history"]


def test_a_hang_that_listens_ends_at_its_deadline_by_itself(tmp_path: Path) -> None:
    run = simulate(tmp_path, failure={"kind": "hang", "at_epoch": 1}, timeoutSec=3)
    assert run.error is not None  # long before the 600 s after which it would be killed
    assert run.error.code == "deadline"


def test_a_hang_that_is_deaf_is_killed_after_the_grace(tmp_path: Path) -> None:
    started_s = time.monotonic()
    run = simulate(tmp_path, failure={"kind": "hang", "deaf": True}, grace_s=1, timeoutSec=4)
    assert run.error is not None
    assert run.error.code == "deadline"
    assert time.monotonic() - started_s >= 5


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
    environ = {
        "MAX_CONCURRENT_TASKS": str(SLOTS),
        "FLOWMESH_CANCEL_GRACE_S": "600",
        "FLOWMESH_DRAIN_TIMEOUT_S": "1",
    }
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results", environ=environ) as process:
        host.wait_workers(1)
        yield process


def publish(client: redis.Redis, task_id: str, executor: str, **block: Any) -> None:
    spec = {"taskType": "simulate", "executor": executor, "simulate": {**FAST, **block}}
    message = {"task_id": task_id, "task": {"spec": spec}, "assigned_worker": "w1"}
    client.publish("tasks", json.dumps(message))


def outcomes(host: StandInOrchestrator) -> dict[str, dict[str, Any]]:
    ends = ("TASK_SUCCEEDED", "TASK_FAILED")
    return {event["task_id"]: event for event in host.events if event.get("type") in ends}


def test_twenty_run_at_once_and_a_cancel_ends_each_at_once(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis
) -> None:
    names = [f"hangs-{number}" for number in range(SLOTS)]
    for name in names:
        publish(client, name, "sim.shared", failure={"kind": "hang", "at_epoch": 3})

    def hanging() -> bool:
        logs = [path.read_text() for path in worker.results_dir.glob(".hangs-*/logs/task.log")]
        return sum("hang on demand" in log for log in logs) == SLOTS

    host.wait_for(hanging, 60)  # all twenty have begun, and none can end
    for name in names:
        order = {"type": "CANCEL", "task_id": name, "reason": "enough"}
        client.publish("workers.control:w1", json.dumps(order))
    host.wait_for(lambda: len(outcomes(host)) == SLOTS, 60)
    assert {event["payload"]["code"] for event in outcomes(host).values()} == {"cancelled"}


def test_a_crash_is_everybodys_in_a_shared_process_and_nobody_elses_in_one_of_its_own(
    host: StandInOrchestrator, worker: WorkerProcess, client: redis.Redis
) -> None:
    for executor in ("sim", "sim.shared"):
        hang = {"kind": "hang"}
        publish(client, f"{executor}-beside", executor, failure=hang)
        log = f".{executor}-beside.attempt-1/logs/task.log"
        host.wait_for(lambda: "hang on" in _read(worker.results_dir / log), 60)  # noqa: B023
        publish(client, f"{executor}-crashes", executor, failure={"kind": "crash"})
        host.wait_for(lambda: f"{executor}-crashes" in outcomes(host), 60)  # noqa: B023
    host.wait_for(lambda: "sim.shared-beside" in outcomes(host), 60)
    codes = {name: event["payload"]["code"] for name, event in outcomes(host).items()}
    assert codes == dict.fromkeys(
        ("sim-crashes", "sim.shared-crashes", "sim.shared-beside"), "crash"
    )


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_the_load_test_of_the_readme_runs(tmp_path: Path) -> None:
    (script,) = re.findall(
        r'```python title="load_test.py"\n(.*?)```', README.read_text(), re.DOTALL
    )
    (tmp_path / "load_test.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "load_test.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "100 tasks in " in done.stdout
    assert "status: Counter({'DONE': 100})" in done.stdout
