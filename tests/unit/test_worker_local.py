"""The worker over the local transport: whatever arrives, it answers or drops, and goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh_core.config import load_settings
from flowmesh_core.events import TaskEvent, WorkerEvent
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.worker import Worker

ENDS = ("TASK_SUCCEEDED", "TASK_FAILED")


def dispatch(task_id: str, **spec: Any) -> bytes:
    task = {"spec": {"taskType": "echo", **spec}}
    return json.dumps({"task_id": task_id, "task": task, "assigned_worker": "w1"}).encode()


def feed(
    bodies: Sequence[bytes], results: Path, *, one_by_one: bool = False, **options: Any
) -> list[TaskEvent | WorkerEvent]:
    """Give a worker the messages, then one good task; return all events once that one ended."""
    events: list[TaskEvent | WorkerEvent] = []

    async def work() -> None:
        chosen = load_settings({}, worker_id="w1", results_dir=results, **options)
        transport = LocalTransport(chosen)
        worker = Worker(chosen, transport=transport)
        ended = asyncio.Event()

        def listen(event: TaskEvent | WorkerEvent) -> None:
            events.append(event)
            if isinstance(event, TaskEvent) and event.task_id == "last" and event.type in ENDS:
                ended.set()

        transport.listen(listen)
        working = asyncio.ensure_future(worker.run())
        for body in bodies:
            transport.submit(body)
            if one_by_one:
                before = len(events)
                while not any(event.type in ENDS for event in events[before:]):
                    await asyncio.sleep(0.005)
        transport.submit(dispatch("last"))
        await asyncio.wait_for(ended.wait(), 20)
        worker.stop()
        await working

    asyncio.run(work())
    return events


def ended(events: Sequence[TaskEvent | WorkerEvent], task_id: str) -> list[TaskEvent]:
    return [
        e for e in events if isinstance(e, TaskEvent) and e.task_id == task_id and e.type in ENDS
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["taskType", "output", "resources", "shard", "timeoutSec", "model", "data", "_upstreamResults"]
)
SPECS = st.dictionaries(FIELDS, JSON, max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=64) | JSON.map(lambda v: json.dumps(v).encode()), max_size=8))
def test_no_bytes_end_the_worker(tmp_path_factory: Any, bodies: list[bytes]) -> None:
    events = feed(bodies, tmp_path_factory.mktemp("results"))
    assert [event.type for event in ended(events, "last")] == ["TASK_SUCCEEDED"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SPECS, min_size=1, max_size=4))
def test_every_document_ends_in_a_result_or_a_clear_error(
    tmp_path_factory: Any, specs: list[dict[str, Any]]
) -> None:
    bodies = [dispatch(f"t{number}", **spec) for number, spec in enumerate(specs)]
    events = feed(bodies, tmp_path_factory.mktemp("results"))
    for number in range(len(specs)):
        (event,) = ended(events, f"t{number}")
        if event.type == "TASK_FAILED":
            assert event.error
            assert "Traceback" not in event.error
            assert event.payload["code"] != "executor.failed", event.error
    assert [event.type for event in ended(events, "last")] == ["TASK_SUCCEEDED"]


def test_events_of_one_task_come_in_the_contracts_order(tmp_path: Path) -> None:
    events = feed([], tmp_path)
    order = [(event.type, event.status) for event in events if event.type != "HEARTBEAT"]
    assert order == [
        ("REGISTER", "STARTING"),
        ("STATUS", "IDLE"),
        ("STATUS", "RUNNING"),
        ("TASK_STARTED", None),
        ("TASK_SUCCEEDED", None),
        ("STATUS", "IDLE"),
        ("UNREGISTER", None),
    ]


def test_a_message_for_another_worker_is_left_alone(tmp_path: Path) -> None:
    body = dispatch("theirs").replace(b'"w1"', b'"w2"')
    assert ended(feed([body], tmp_path), "theirs") == []
    assert not (tmp_path / "theirs").exists()


def test_a_failed_task_is_run_again_only_when_it_is_dispatched_anew(tmp_path: Path) -> None:
    bad = json.loads(dispatch("again", message="${env.NOT_ALLOWED}"))
    first, second = ({**bad, "dispatched_at": when} for when in ("1", "2"))
    bodies = [json.dumps(message).encode() for message in (first, first, second)]
    events = feed(bodies, tmp_path, one_by_one=True)
    started = [e for e in events if isinstance(e, TaskEvent) and e.type == "TASK_STARTED"]
    assert [event.task_id for event in started] == ["again", "again", "last"]
    assert len(ended(events, "again")) == 3


def test_a_task_that_failed_leaves_no_result_and_keeps_its_attempt(tmp_path: Path) -> None:
    feed([dispatch("bad", message="${env.NOT_ALLOWED}")], tmp_path)
    assert not (tmp_path / "bad").exists()
    assert (tmp_path / ".bad.attempt-1").is_dir()


def test_a_member_with_an_unknown_destination_fails_alone(tmp_path: Path) -> None:
    message = json.loads(dispatch("lead", message="lead"))
    nowhere = {"output": {"destination": {"type": "nowhere"}}}
    message["merged_children"] = [
        {"task_id": "bad", "spec": {"taskType": "echo", **nowhere}},
        {"task_id": "good", "spec": {"taskType": "echo", "message": "good"}},
    ]
    events = feed([json.dumps(message).encode()], tmp_path)
    assert [event.type for event in ended(events, "lead")] == ["TASK_SUCCEEDED"]
    written = json.loads((tmp_path / "lead" / "responses.json").read_text())
    assert written["children"]["bad"]["ok"] is False
    assert "nowhere" in written["children"]["bad"]["error"]["message"]
    assert written["children"]["good"]["echo"]["message"] == "good"
