"""A real worker process on a real Redis, driven by the stand-in for the earlier orchestrator."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flowmesh_core.testing.orchestrator import StandInOrchestrator
from flowmesh_core.testing.redis_server import RedisServer
from flowmesh_core.testing.worker_process import WorkerProcess

StartWorker = Callable[..., WorkerProcess]


def echo(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "mloc/v1",
        "kind": "EchoTask",
        "metadata": {"name": "echo"},
        "spec": {"taskType": "echo", "message": "hi", **spec},
    }


@pytest.fixture
def start_worker(flowmesh_redis_url: str, tmp_path: Path) -> Iterator[StartWorker]:
    started: list[WorkerProcess] = []

    def start(worker_id: str = "w1", **environ: str) -> WorkerProcess:
        worker = WorkerProcess(
            flowmesh_redis_url, tmp_path / "results", worker_id=worker_id, environ=environ
        )
        worker.start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        if worker.alive:
            worker.stop()


@pytest.fixture
def host(flowmesh_orchestrator: StandInOrchestrator) -> StandInOrchestrator:
    return flowmesh_orchestrator


@pytest.fixture
def client(flowmesh_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(flowmesh_redis_url, decode_responses=True) as client:
        yield client


def types_of(host: StandInOrchestrator, worker_id: str = "w1") -> list[tuple[str, str | None]]:
    return [
        (e.get("type"), e.get("status")) for e in host.events if e.get("worker_id") == worker_id
    ]


def publish(client: redis.Redis, **message: Any) -> None:
    client.publish("tasks", json.dumps({"assigned_worker": "w1", **message}))


def test_one_task_shows_the_event_sequence_of_the_contract(
    host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    start_worker(WORKER_TAGS="gpu,blue", WORKER_COST_PER_HOUR="2.5")
    host.wait_workers(1)
    task_id = host.submit(echo())
    assert host.wait_task(task_id).status == "DONE"
    host.wait_for(lambda: types_of(host).count(("STATUS", "IDLE")) >= 2)
    ours = [e for e in host.events if e.get("worker_id") == "w1"]
    order = [
        (e.get("type"), e["status"], tuple(sorted(e["payload"])))
        for e in ours
        if (e.get("type") != "HEARTBEAT" and "tags" in e) or str(e.get("type")).startswith("TASK")
    ]
    assert [step[:2] for step in order][:5] == [
        ("REGISTER", "STARTING"),
        ("STATUS", "IDLE"),
        ("STATUS", "RUNNING"),
        ("TASK_STARTED", None),
        ("TASK_SUCCEEDED", None),
    ]
    register = next(e for e in ours if e.get("type") == "REGISTER")
    assert register["tags"] == ["gpu", "blue"]
    assert register["metrics"] == {}
    assert register["payload"]["cost_per_hour"] == 2.5
    assert register["payload"]["hardware"]["cpu"]["logical_cores"] >= 1
    succeeded = next(e for e in ours if e.get("type") == "TASK_SUCCEEDED")
    assert {"taskType", "runtime_sec", "started_at", "finished_at", "dispatched_at"} <= set(
        succeeded["payload"]
    )
    assert set(succeeded) >= {"type", "ts", "worker_id", "task_id", "status", "error", "payload"}


def test_the_worker_hash_and_keys_are_those_of_the_contract(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    start_worker()
    host.wait_workers(1)
    task_id = host.submit(echo())
    host.wait_task(task_id)
    host.wait_for(lambda: client.hget("worker:w1", "extra_last_task") == task_id)
    fields = client.hgetall("worker:w1")
    assert client.sismember("workers:ids", "w1")
    assert fields["worker_id"] == "w1"
    assert fields["status"] == "IDLE"
    assert fields["env_json"] == "{}"
    assert fields["extra_task_id"] == task_id
    assert int(fields["pid"]) > 0
    assert json.loads(fields["tags_json"]) == []
    assert {"started_at", "last_seen", "cost_per_hour", "hardware_json"} <= set(fields)
    assert 100 < client.ttl("worker:w1:hb") <= 120


def test_heartbeats_carry_the_metrics_of_the_contract(
    host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    start_worker()
    host.wait_workers(1)
    beats = host.wait_for(lambda: [e for e in host.events if e.get("type") == "HEARTBEAT"][1:])
    metrics = beats[0]["metrics"]
    assert {"uptime_sec", "accrued_cost_usd", "loadavg", "power", "power_summary"} <= set(metrics)
    assert set(metrics["loadavg"]) == {"1m", "5m", "15m"}


def test_results_lie_in_the_tasks_folder_without_a_wrapper(
    host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    task_id = host.submit(echo())
    host.wait_task(task_id)
    folder = worker.results_dir / task_id
    assert json.loads((folder / "responses.json").read_text())["echo"]["message"] == "hi"
    names = {
        entry["name"] for entry in json.loads((folder / "manifest.json").read_text())["entries"]
    }
    assert names == {"artifacts", "logs", "responses.json"}
    assert not [path for path in worker.results_dir.iterdir() if ".attempt" in path.name]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"null",
        b"7",
        b'"w1"',
        b"garbage w1",
        b"\xff\xfe w1",
        b'{"assigned_worker": "w1"}',
        b'{"assigned_worker": "w1", "task_id": "../../etc", "task": {}}',
        b'{"assigned_worker": "w1", "task_id": "x1", "task": []}',
        b'{"assigned_worker": "w1", "task_id": "x2", "task": {"spec": []}}',
        b'{"assigned_worker": "w1", "task_id": "x3", "task": {"spec": {"output": 5}}}',
        b'{"assigned_worker": "w1", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"assigned_worker": "w1", "task_id": ' + b"9" * 5000 + b', "task": {}}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_nothing_that_arrives_ends_the_worker(
    body: bytes, host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    client.publish("tasks", body)
    task_id = host.submit(echo())
    assert host.wait_task(task_id).status == "DONE"
    assert worker.alive


def test_a_message_that_names_a_task_is_refused_by_event(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    start_worker()
    host.wait_workers(1)
    publish(
        client, task_id="bad", task={"spec": {"taskType": "echo", "output": {"artifacts": [1]}}}
    )
    event = host.wait_for(lambda: next((e for e in host.events if e.get("task_id") == "bad"), None))
    assert event["type"] == "TASK_FAILED"
    assert "spec.output.artifacts" in event["error"]
    assert event["payload"]["code"] == "contract"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"taskType": "no-such-type"}, "known are echo"),
        ({"output": {"destination": {"type": "local", "path": "/dev/null/x"}}}, "RESULTS_DIR"),
        ({"output": {"destination": {"type": "local", "path": "../up"}}}, "RESULTS_DIR"),
        ({"output": {"destination": {"type": "nfs"}}}, "known are fsspec, http, local"),
        ({"message": "${env.HOME}"}, "FLOWMESH_ENV_ALLOW"),
    ],
    ids=["type", "absolute", "parent", "store", "env"],
)
def test_a_bad_document_fails_its_task_only(
    spec: dict[str, Any], says: str, host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    bad = host.submit(echo(**spec))
    failed = host.wait_for(
        lambda: next(
            (e for e in host.events if e.get("type") == "TASK_FAILED" and e["task_id"] == bad), None
        )
    )
    assert says in failed["error"]
    assert worker.alive


def test_a_secret_reaches_the_executor_and_nothing_else(
    host: StandInOrchestrator, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(FLOWMESH_ENV_ALLOW="DB_PASSWORD", DB_PASSWORD="hunter2-hunter2")
    host.wait_workers(1)
    task_id = host.submit(echo(message="${env.DB_PASSWORD}"))
    host.wait_task(task_id)
    written = (worker.results_dir / task_id / "responses.json").read_text()
    assert "${env.DB_PASSWORD}" in written
    assert "hunter2" not in written + json.dumps(host.events) + worker.stderr


def test_a_task_that_comes_twice_is_run_once_and_acknowledged_twice(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    message = {"task_id": "twice", "task": echo(), "dispatched_at": "2026-01-01T00:00:00+00:00"}
    publish(client, **message)

    def successes() -> list[Any]:
        events = [e for e in host.events if e.get("task_id") == "twice"]
        return [e for e in events if e.get("type") == "TASK_SUCCEEDED"]

    host.wait_for(successes)
    written = (worker.results_dir / "twice" / "responses.json").stat().st_mtime_ns
    publish(client, **message)
    host.wait_for(lambda: len(successes()) == 2)
    assert (worker.results_dir / "twice" / "responses.json").stat().st_mtime_ns == written
    started = [e for e in host.events if e.get("type") == "TASK_STARTED"]
    assert len([e for e in started if e["task_id"] == "twice"]) == 1


def test_a_flushed_database_is_healed(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    start_worker()
    host.wait_workers(1)
    client.flushdb()
    host.wait_for(lambda: client.sismember("workers:ids", "w1"), timeout_s=15)
    assert client.hget("worker:w1", "status") == "IDLE"
    assert json.loads(client.hget("worker:w1", "hardware_json"))["cpu"]
    task_id = host.submit(echo())
    assert host.wait_task(task_id).status == "DONE"


def test_a_killed_connection_is_opened_again(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    for entry in client.client_list():
        if int(entry["id"]) != client.client_id():
            client.client_kill_filter(_id=entry["id"])
    deadline = time.monotonic() + 15
    while client.pubsub_numsub("tasks")[0][1] < 1:
        assert time.monotonic() < deadline, worker.stderr
        time.sleep(0.05)
    host.wait_for(lambda: client.pubsub_numsub("tasks.events")[0][1] >= 1)
    publish(client, task_id="after", task=echo())
    host.wait_for(lambda: [e for e in host.events if e.get("task_id") == "after"][1:])
    assert worker.alive


def test_a_status_that_the_orchestrator_overwrote_is_mended(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    start_worker()
    host.wait_workers(1)
    client.hset("worker:w1", "status", "RUNNING")
    host.wait_for(lambda: client.hget("worker:w1", "status") == "IDLE", timeout_s=20)


@pytest.mark.parametrize("outage_s", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_redis_stopped_for_a_while_loses_no_outcome(outage_s: float, tmp_path: Path) -> None:
    with RedisServer() as server:
        url = server.url
        with (
            StandInOrchestrator(url, tmp_path / "host") as host,
            WorkerProcess(url, tmp_path / "results", arguments=_sleeper(tmp_path)) as worker,
        ):
            host.wait_workers(1)
            task_id = host.submit(echo(taskType="sleep", seconds=2))
            host.wait_for(lambda: ("TASK_STARTED", None) in types_of(host))
            server.stop()
            time.sleep(outage_s)
            assert worker.alive
            server.start(empty=True)
            host.wait_for(lambda: ("TASK_SUCCEEDED", None) in types_of(host), timeout_s=30)
            with redis.Redis.from_url(url, decode_responses=True) as client:
                host.wait_for(lambda: client.sismember("workers:ids", "w1"), timeout_s=15)
            assert (worker.results_dir / task_id / "responses.json").exists()


SLEEPER = """
import asyncio
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="sleep", task_types={"sleep"}, target=f"{__name__}:Sleep")]

class Sleep(Executor):
    async def run(self, ctx):
        for step in range(int(ctx.raw_spec["seconds"] * 20)):
            ctx.check()
            await asyncio.sleep(0.05)
        return {"ok": True}
"""


def _sleeper(folder: Path) -> tuple[str, ...]:
    path = folder / "sleeper.py"
    path.write_text(SLEEPER)
    return ("--plugin", str(path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_task_end_and_unregisters(
    number: signal.Signals,
    host: StandInOrchestrator,
    flowmesh_redis_url: str,
    client: redis.Redis,
    tmp_path: Path,
) -> None:
    sleeper = _sleeper(tmp_path)
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results", arguments=sleeper) as worker:
        host.wait_workers(1)
        host.submit(echo(taskType="sleep", seconds=1))
        host.wait_for(lambda: ("TASK_STARTED", None) in types_of(host))
        worker.signal(number)
        assert worker.wait() == 0
    host.wait_for(lambda: ("UNREGISTER", None) in types_of(host))
    kinds = [kind for kind, _status in types_of(host)]
    assert kinds.index("TASK_SUCCEEDED") < kinds.index("UNREGISTER")
    assert not client.sismember("workers:ids", "w1")
    assert not client.exists("worker:w1:hb")
    farewell = next(e for e in host.events if e.get("type") == "UNREGISTER")
    assert {"cost_per_hour", "uptime_sec", "accrued_cost_usd"} <= set(farewell["payload"])


def test_an_idle_worker_leaves_no_key_behind(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    host.wait_for(lambda: client.exists("worker:w1", "worker:w1:hb") == 2)
    assert worker.stop() == 0
    assert not client.exists("worker:w1", "worker:w1:hb", "workers:ids")


def test_a_task_that_outlasts_the_drain_is_given_back_as_retriable(
    host: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    environ = {"FLOWMESH_DRAIN_TIMEOUT_S": "0.5"}
    with WorkerProcess(
        flowmesh_redis_url, tmp_path / "results", environ=environ, arguments=_sleeper(tmp_path)
    ) as worker:
        host.wait_workers(1)
        host.submit(echo(taskType="sleep", seconds=60))
        host.wait_for(lambda: ("TASK_STARTED", None) in types_of(host))
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    failed = host.wait_for(
        lambda: next((e for e in host.events if e.get("type") == "TASK_FAILED"), None)
    )
    assert failed["payload"]["retriable"] is True
    assert "stopping" in failed["error"]


STUBBORN = """
import time
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [
        ExecutorInfo(
            name="stubborn",
            task_types={"stubborn"},
            target=f"{__name__}:Stubborn",
            places=["PLACE"],
        )
    ]

class Stubborn(Executor):
    def run(self, ctx):
        while True:
            time.sleep(0.1)
"""


@pytest.mark.parametrize("place", ["inline", "process"])
def test_an_executor_that_will_not_stop_does_not_keep_the_worker(
    place: str, host: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("PLACE", place))
    with WorkerProcess(
        flowmesh_redis_url,
        tmp_path / "results",
        environ={"FLOWMESH_DRAIN_TIMEOUT_S": "0", "FLOWMESH_CANCEL_GRACE_S": "0.5"},
        arguments=("--plugin", str(tmp_path / "stubborn.py")),
    ) as worker:
        host.wait_workers(1)
        host.submit(echo(taskType="stubborn"))
        host.wait_for(lambda: ("TASK_STARTED", None) in types_of(host))
        worker.signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        # Only a thread of the worker itself cannot be ended.
        assert ("did not stop" in worker.stderr) is (place == "inline")
    host.wait_for(lambda: ("UNREGISTER", None) in types_of(host))
    assert ("TASK_FAILED", None) in types_of(host)


def test_a_deadline_ends_a_task_by_name(
    host: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results", arguments=_sleeper(tmp_path)):
        host.wait_workers(1)
        host.submit(echo(taskType="sleep", seconds=60, timeoutSec=0.3))
        failed = host.wait_for(
            lambda: next((e for e in host.events if e.get("type") == "TASK_FAILED"), None)
        )
    assert failed["payload"]["code"] == "deadline"


def test_several_slots_run_at_once_and_stay_idle_while_one_is_free(
    host: StandInOrchestrator, flowmesh_redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    environ = {"MAX_CONCURRENT_TASKS": "2"}
    with WorkerProcess(
        flowmesh_redis_url, tmp_path / "results", environ=environ, arguments=_concurrent(tmp_path)
    ):
        host.wait_workers(1)
        publish(client, task_id="one", task=echo(taskType="sleep", seconds=1.5))
        host.wait_for(lambda: ("TASK_STARTED", None) in types_of(host))
        publish(client, task_id="two", task=echo(taskType="sleep", seconds=1.5))
        host.wait_for(lambda: types_of(host).count(("TASK_STARTED", None)) == 2)
        kinds = [step for step in types_of(host) if step[0] in ("STATUS", "TASK_STARTED")]
        assert kinds[1:5] == [
            ("STATUS", "IDLE"),
            ("TASK_STARTED", None),
            ("STATUS", "RUNNING"),
            ("TASK_STARTED", None),
        ]
        host.wait_for(lambda: types_of(host).count(("TASK_SUCCEEDED", None)) == 2)


def _concurrent(folder: Path) -> tuple[str, ...]:
    path = folder / "concurrent_sleeper.py"
    text = SLEEPER.replace(
        'target=f"{__name__}:Sleep"',
        'target=f"{__name__}:Sleep", capabilities={"cpu", "concurrent"}',
    )
    path.write_text(text)
    return ("--plugin", str(path))


REPORTER = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="report", task_types={"report"}, target=f"{__name__}:Report")]

@hookimpl
def flowmesh_heartbeat_fields():
    return {"queue": 7, "uptime_sec": "not ours to set"}

class Report(Executor):
    def run(self, ctx):
        for step in range(300):
            ctx.progress((step + 1) / 300, f"step {step}", loss=1.0 / (step + 1))
        return {"ok": True}
"""


def test_progress_goes_to_the_tasks_own_channel_and_nowhere_else(
    host: StandInOrchestrator, flowmesh_redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "reporter.py").write_text(REPORTER)
    arguments = ("--plugin", str(tmp_path / "reporter.py"))
    with (
        client.pubsub(ignore_subscribe_messages=True) as pubsub,
        WorkerProcess(flowmesh_redis_url, tmp_path / "results", arguments=arguments),
    ):
        pubsub.psubscribe("tasks.progress:*")
        host.wait_workers(1)
        task_id = host.submit(echo(taskType="report"))
        host.wait_task(task_id)
        said: list[dict[str, Any]] = []
        until = time.monotonic() + 10
        while not said or said[-1]["payload"]["fraction"] < 1.0:
            assert time.monotonic() < until, said
            message = pubsub.get_message(timeout=0.2)
            if message:
                assert message["channel"] == f"tasks.progress:{task_id}"
                said.append(json.loads(message["data"]))
        beat = host.wait_for(
            lambda: next((e for e in host.events if e.get("metrics", {}).get("queue")), None)
        )
    assert said[0]["payload"]["message"] == "step 0"
    assert said[-1]["payload"]["message"] == "step 299"
    assert said[-1]["payload"]["loss"] == pytest.approx(1 / 300)
    assert len(said) < 30, "a few a second are enough"
    assert "TASK_PROGRESS" not in [kind for kind, _ in types_of(host)]
    assert isinstance(beat["metrics"]["uptime_sec"], float)


def test_results_are_delivered_over_http_with_one_repeat_after_a_bad_answer(
    host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    start_worker()
    host.wait_workers(1)
    host.fail_next(2, 503)
    destination = {"type": "http", "url": host.results_url}
    task_id = host.submit(echo(output={"destination": destination}))
    assert host.wait_task(task_id).status == "DONE"
    stored = host.result(task_id)
    assert stored["task_id"] == task_id
    assert stored["worker_id"] == "w1"
    assert stored["result"]["echo"]["message"] == "hi"
    started = [e for e in host.events if e.get("type") == "TASK_STARTED"]
    assert len(started) == 1


def test_a_delivery_that_failed_is_repeated_without_the_work(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker(FLOWMESH_DELIVERY_RETRIES="0")
    host.wait_workers(1)
    host.fail_next(1, 503)
    destination = {"type": "http", "url": host.results_url}
    document = echo(output={"destination": destination})
    publish(client, task_id="again", task=document, dispatched_at="1")
    failed = host.wait_for(
        lambda: next((e for e in host.events if e.get("type") == "TASK_FAILED"), None)
    )
    assert failed["payload"] | {"code": "artifact.upload", "retriable": True} == failed["payload"]
    written = (worker.results_dir / "again" / "responses.json").stat().st_mtime_ns
    publish(client, task_id="again", task=document, dispatched_at="2")
    host.wait_for(lambda: ("TASK_SUCCEEDED", None) in types_of(host))
    assert host.result("again")["result"]["echo"]["message"] == "hi"
    assert (worker.results_dir / "again" / "responses.json").stat().st_mtime_ns == written


def test_merged_children_are_answered_each_with_its_own(
    host: StandInOrchestrator, start_worker: StartWorker, client: redis.Redis
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    destination = {"type": "http", "url": host.results_url}
    output = {"output": {"destination": destination}}
    publish(
        client,
        task_id="lead",
        task=echo(message="lead", **output),
        merged_children=[
            {"task_id": "kid1", "spec": echo(message="kid1", **output)["spec"]},
            {"task_id": "kid2", "spec": {"taskType": "echo", "shard": 3, **output}},
            {"task_id": "kid3", "spec": echo(message="${env.NO}", **output)["spec"]},
        ],
    )
    host.wait_for(lambda: ("TASK_SUCCEEDED", None) in types_of(host))
    assert host.result("kid1")["result"]["echo"]["message"] == "kid1"
    for failed in ("kid2", "kid3"):
        document = json.loads((worker.results_dir / failed / "responses.json").read_text())
        assert document["ok"] is False
    assert host.result("kid3")["result"]["ok"] is False
    lead = host.result("lead")["result"]
    assert lead["echo"]["message"] == "lead"
    assert set(lead["children"]) == {"kid1", "kid2", "kid3"}
    about_children = [e for e in host.events if str(e.get("task_id", "")).startswith("kid")]
    assert about_children == []


def test_the_log_of_a_worker_is_appended_to(
    host: StandInOrchestrator, start_worker: StartWorker
) -> None:
    worker = start_worker()
    host.wait_workers(1)
    host.submit(echo(taskType="nope"))
    host.wait_for(lambda: ("TASK_FAILED", None) in types_of(host))
    worker.stop()
    log = worker.results_dir / ".workers" / "w1" / "worker.log"
    before = log.read_text()
    assert "nope" in before
    start_worker()
    host.wait_workers(1)
    assert log.read_text().startswith(before)


def test_a_worker_without_redis_waits_for_it_and_can_be_stopped(tmp_path: Path) -> None:
    with RedisServer() as server, WorkerProcess(server.url, tmp_path / "results") as worker:
        server.stop()
        impatient = WorkerProcess(server.url, tmp_path / "results", worker_id="w2")
        with impatient:
            deadline = time.monotonic() + 15
            while "trying again" not in impatient.stderr:
                assert time.monotonic() < deadline, impatient.stderr
                time.sleep(0.05)
            assert impatient.stop() == 0
        server.start()
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            while not client.sismember("workers:ids", "w1"):
                assert time.monotonic() < deadline + 15, worker.stderr
                time.sleep(0.05)


def test_a_wrong_password_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    with RedisServer() as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "right")
        try:
            url = server.url.replace("redis://", "redis://:wrong@")
            with WorkerProcess(url, tmp_path / "results") as worker:
                assert worker.wait() == 2
                assert "REDIS_URL" in worker.stderr
        finally:
            with redis.Redis.from_url(server.url, password="right") as client:
                client.config_set("requirepass", "")


def test_an_outcome_that_nobody_heard_is_said_again(
    flowmesh_redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results") as worker:
        until = time.monotonic() + 15
        while not client.sismember("workers:ids", "w1"):
            assert time.monotonic() < until, worker.stderr
            time.sleep(0.05)
        publish(client, task_id="alone", task=echo())
        while not (worker.results_dir / "alone").exists():
            assert time.monotonic() < until, worker.stderr
            time.sleep(0.05)
        time.sleep(0.5)
        with client.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe("tasks.events")
            heard: list[str] = []
            while "TASK_SUCCEEDED" not in heard:
                assert time.monotonic() < until + 10, heard
                message = pubsub.get_message(timeout=0.2)
                heard += [json.loads(message["data"])["type"]] if message else []
            time.sleep(1.5)
            assert pubsub.get_message(timeout=0.2) is None


def test_a_wrong_variable_stops_the_start_with_a_sentence(
    start_worker: StartWorker,
) -> None:
    worker = start_worker(HEARTBEAT_INTERVAL_SEC="soon", WORKER_COST_PER_HOUR="-1")
    assert worker.wait() == 2
    assert "HEARTBEAT_INTERVAL_SEC must be a number above 0, got 'soon'" in worker.stderr
    assert "WORKER_COST_PER_HOUR" in worker.stderr
