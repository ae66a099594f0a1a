"""Events: every field, in the contract's spelling, and back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.contract import parse_task
from flowmesh_core.errors import (
    ContractError,
    CrashError,
    ExecutionError,
    FlowmeshError,
    UploadError,
)
from flowmesh_core.events import (
    HEARTBEAT,
    REGISTER,
    STATUS,
    TASK_FAILED,
    TASK_LOG,
    TASK_STARTED,
    TASK_SUCCEEDED,
    UNREGISTER,
    LogChunk,
    TaskEvent,
    WorkerEvent,
    parse_event,
    task_payload,
    whole_characters,
)

TS = "2026-11-21T01:30:48.745627+00:00"
TASK_KEYS = {"type", "ts", "worker_id", "task_id", "status", "error", "payload"}
WORKER_KEYS = {"type", "ts", "worker_id", "status", "tags", "metrics", "payload"}
POWER: dict[str, Any] = {
    "timestamp": TS,
    "cpu_watts": None,
    "gpu_watts": {"total": None, "per_gpu": []},
}

# One of each kind that the contract lists, as the earlier worker or orchestrator writes it.
WORKER_EVENTS: list[dict[str, Any]] = [
    {"type": REGISTER, "ts": TS, "worker_id": "w1", "status": "STARTING", "tags": ["gpu"],
     "metrics": {},
     "payload": {"env": {}, "hardware": {"cpu": {"logical_cores": 2, "model": "x"}},
                 "cost_per_hour": 1.0, "power_metrics": POWER}},
    {"type": STATUS, "ts": TS, "worker_id": "w1", "status": "RUNNING", "tags": None,
     "metrics": {}, "payload": {"task_id": "a"}},
    {"type": STATUS, "ts": TS, "worker_id": "w1", "status": "IDLE", "tags": None,
     "metrics": {}, "payload": {"last_task": "a"}},
    {"type": HEARTBEAT, "ts": TS, "worker_id": "w1", "status": None, "tags": None,
     "metrics": {"uptime_sec": 1.5, "loadavg": {"1m": 0.1, "5m": 0.2, "15m": 0.3},
                 "power": POWER, "estimated_energy_kwh": 0.1}, "payload": {}},
    {"type": UNREGISTER, "ts": TS, "worker_id": "w1", "status": None, "tags": None,
     "metrics": {}, "payload": {"cost_per_hour": 1.0, "uptime_sec": 3.0}},
]  # fmt: skip
TASK_EVENTS: list[dict[str, Any]] = [
    {"type": TASK_STARTED, "ts": TS, "worker_id": "w1", "task_id": "a", "status": None,
     "error": None, "payload": {"taskType": "echo", "dispatched_at": TS, "started_at": TS}},
    {"type": TASK_SUCCEEDED, "ts": TS, "worker_id": "w1", "task_id": "a", "status": None,
     "error": None, "payload": {"taskType": "echo", "runtime_sec": 0.1, "started_at": TS,
                                "finished_at": TS, "dispatched_at": TS}},
    {"type": TASK_FAILED, "ts": TS, "worker_id": "w1", "task_id": "a", "status": None,
     "error": "no", "payload": {"started_at": TS}},
    {"type": TASK_FAILED, "ts": TS, "worker_id": "w1", "task_id": "a", "status": None,
     "error": "worker_heartbeat_expired",
     "payload": {"reason": "worker_heartbeat_expired", "worker": "w1", "synthetic": True,
                 "attempt": 1}},
]  # fmt: skip


def by_type(event: dict[str, Any]) -> str:
    return str(event["type"])


@pytest.mark.parametrize("raw", WORKER_EVENTS, ids=by_type)
def test_worker_event_is_written_as_it_was_read(raw: dict[str, Any]) -> None:
    event = parse_event(json.dumps(raw).encode())
    assert isinstance(event, WorkerEvent)
    assert json.loads(event.to_json()) == raw
    assert set(raw) == WORKER_KEYS


@pytest.mark.parametrize("raw", TASK_EVENTS, ids=by_type)
def test_task_event_is_written_as_it_was_read(raw: dict[str, Any]) -> None:
    event = parse_event(raw)
    assert isinstance(event, TaskEvent)
    assert json.loads(event.to_json()) == raw
    assert set(raw) == TASK_KEYS


def test_every_key_is_written_even_when_nothing_was_said() -> None:
    task = json.loads(TaskEvent(type=TASK_STARTED, task_id="a").to_json())
    worker = json.loads(WorkerEvent(type=STATUS).to_json())
    assert task.pop("ts").endswith("+00:00")
    assert worker.pop("ts").endswith("+00:00")
    assert task == {"type": "TASK_STARTED", "task_id": "a", "worker_id": None, "status": None,
                    "error": None, "payload": {}}  # fmt: skip
    assert worker == {"type": "STATUS", "worker_id": None, "status": None, "tags": None,
                      "metrics": {}, "payload": {}}  # fmt: skip


def test_status_of_the_orchestrator_with_missing_keys_is_read() -> None:
    event = parse_event({"type": "STATUS", "worker_id": "w1", "status": "IDLE", "ts": TS})
    assert isinstance(event, WorkerEvent)
    assert (event.status, event.tags, event.metrics, event.payload) == ("IDLE", None, {}, {})


def test_unknown_fields_stay_in_the_event() -> None:
    raw = {**TASK_EVENTS[0], "lease": 7, "x": {"y": None}}
    assert json.loads(parse_event(raw).to_json()) == raw


def test_null_payload_and_metrics_count_as_empty() -> None:
    event = parse_event({"type": "HEARTBEAT", "payload": None, "metrics": None})
    assert isinstance(event, WorkerEvent)
    assert (event.payload, event.metrics) == ({}, {})


def test_type_and_task_id_are_trimmed_and_the_type_is_upper_case() -> None:
    event = parse_event({"type": "  task_started\n", "task_id": " a "})
    assert isinstance(event, TaskEvent)
    assert (event.type, event.task_id) == ("TASK_STARTED", "a")
    assert parse_event({"type": " heartbeat "}).type == "HEARTBEAT"


@pytest.mark.parametrize("kind", ["TASK_STARTED", "task", "Task_of_tomorrow", " TASKS"])
def test_whatever_begins_with_task_is_a_task_event(kind: str) -> None:
    assert isinstance(parse_event({"type": kind, "task_id": "a"}), TaskEvent)


@pytest.mark.parametrize("kind", ["HEARTBEAT", "MY_TASK", "x"])
def test_everything_else_is_a_worker_event(kind: str) -> None:
    assert isinstance(parse_event({"type": kind, "task_id": "a"}), WorkerEvent)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "message must be JSON in UTF-8: "),
        (b"\xff", "message must be JSON in UTF-8: "),
        (b"[" * 100_000, "message nests deeper"),
        (b"[]", "event must be a JSON object with a type$"),
        (b"{}", "event must be a JSON object with a type$"),
        ({"type": 7}, "event must be a JSON object with a type$"),
        ({"type": None}, "event must be a JSON object with a type$"),
        ({"type": "  "}, "event: type must not be empty$"),
        ({"type": "TASK_X"}, "event: task_id is required$"),
        ({"type": "TASK_X", "task_id": " "}, "event: task_id must not be empty$"),
        ({"type": "TASK_X", "task_id": None}, "event: task_id must be a string, got None$"),
        ({"type": "TASK_X", "task_id": 7, "error": 8, "payload": []},
         "event: payload must be an object, got list; task_id must be a string, got 7; "
         "error must be a string, got 8$"),
        ({"type": "STATUS", "tags": ["a", 1], "metrics": 3},
         r"event: tags\[1\] must be a string, got 1; metrics must be an object, got 3$"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_event_that_cannot_be_read_says_every_reason(body: Any, problem: str) -> None:
    with pytest.raises(ContractError, match=f"^{problem}"):
        parse_event(body)


@pytest.mark.parametrize(
    ("error", "code", "retriable"),
    [
        (ContractError(["spec.x must be a number", "y is required"], where="task a"),
         "contract", False),
        (ExecutionError("out of luck"), "executor.failed", False),
        (ExecutionError("flaky", retriable=True), "executor.failed", True),
        (CrashError("gone", signal="SIGKILL"), "crash", True),
        (UploadError("refused", retriable=False), "artifact.upload", False),
    ],
)  # fmt: skip
def test_failure_carries_text_code_and_class(
    error: FlowmeshError, code: str, retriable: bool
) -> None:
    event = TaskEvent.failed("a", error, worker_id="w1", payload={"started_at": TS})
    written = json.loads(event.to_json())
    assert written["type"] == "TASK_FAILED"
    assert (written["task_id"], written["worker_id"]) == ("a", "w1")
    assert written["error"] == str(error)
    assert written["payload"] == {"started_at": TS, "code": code, "retriable": retriable}


def test_failure_leaves_the_callers_payload_alone() -> None:
    payload = {"started_at": TS}
    TaskEvent.failed("a", ExecutionError("no"), payload=payload)
    assert payload == {"started_at": TS}


def test_number_that_json_lacks_is_sent_as_null() -> None:
    event = WorkerEvent(type=HEARTBEAT, metrics={"power": {"cpu_watts": float("nan")}})
    assert json.loads(event.to_json())["metrics"] == {"power": {"cpu_watts": None}}


def test_payload_of_a_run_names_type_and_dispatch_only_when_known() -> None:
    typed = parse_task({"spec": {"taskType": "echo"}}, task_id="a")
    bare = parse_task({}, task_id="a")
    assert task_payload(bare, started_at=TS) == {"started_at": TS}
    assert task_payload(typed, started_at=TS, dispatched_at="earlier") == {
        "taskType": "echo",
        "started_at": TS,
        "dispatched_at": "earlier",
    }


def test_a_piece_of_a_log_says_where_it_stands_in_bytes() -> None:
    chunk = LogChunk(
        task_id="a", worker_id="w1", ts=TS, stream="stderr", offset=7, data=b"h\xc3\xa9 \xff\x1b\n"
    )
    assert json.loads(chunk.to_json()) == {
        "type": "TASK_LOG",
        "task_id": "a",
        "worker_id": "w1",
        "ts": TS,
        "stream": "stderr",
        "offset": 7,
        "size": 7,
        "data": "hé \ufffd\x1b\n",
    }
    assert chunk.type == TASK_LOG
    assert isinstance(parse_event(chunk.to_json()), TaskEvent)


@given(st.text(max_size=20), st.integers(0, 3))
def test_of_a_cut_text_only_the_cut_character_is_left_out(text: str, cut: int) -> None:
    data = text.encode(errors="replace")
    data = data[: len(data) - cut]
    assert data[: whole_characters(data)] == data.decode(errors="ignore").encode()


@given(st.binary(max_size=12))
def test_of_bytes_that_are_no_text_at_most_three_are_left_out(data: bytes) -> None:
    left_out = data[whole_characters(data) :]
    assert len(left_out) <= 3
    assert not left_out or left_out[0] >= 0xC0


any_text = st.text(st.characters(exclude_categories=()), max_size=8)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.just(10**4000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
any_event = st.dictionaries(
    st.sampled_from(sorted(TASK_KEYS | WORKER_KEYS)) | any_text, any_json, max_size=8
)
quick = settings(max_examples=150, deadline=None, database=None)


def check_event(body: bytes) -> None:
    try:
        event = parse_event(body)
    except ContractError:
        return
    assert event.type == event.type.strip().upper() != ""
    assert isinstance(event, TaskEvent) == event.type.startswith("TASK")
    written = parse_event(event.to_json())
    assert written.to_json() == event.to_json()


@quick
@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_no_event_and_nothing_worse(body: bytes) -> None:
    with pytest.raises(ContractError, match="JSON"):
        parse_event(body)


@quick
@given(any_json | any_event)
def test_arbitrary_json_is_an_event_or_a_contract_error(value: Any) -> None:
    check_event(json.dumps(value).encode())


@quick
@given(st.sampled_from([*TASK_EVENTS, *WORKER_EVENTS]), any_event)
def test_mutated_event_is_an_event_or_a_contract_error(raw: Any, changes: Any) -> None:
    check_event(json.dumps({**copy.deepcopy(raw), **changes}).encode())
