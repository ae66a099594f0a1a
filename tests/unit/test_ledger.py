from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flowmesh_core.contract import Envelope, parse_envelope
from flowmesh_core.errors import UploadError
from flowmesh_core.events import TASK_SUCCEEDED, TaskEvent
from flowmesh_core.ledger import Finished, TaskLedger, Verdict


def dispatch(
    task_id: str = "t1",
    at: str | None = "10:00",
    *,
    spec: Mapping[str, Any] | None = None,
    children: tuple[str, ...] = (),
    bad: tuple[str, ...] = (),
) -> Envelope:
    body = {"taskType": "echo", **(spec or {})}
    merged = [{"task_id": name, "spec": body} for name in children]
    merged += [{"task_id": name, "spec": "no object"} for name in bad]
    return parse_envelope(
        {
            "task_id": task_id,
            "task": {"spec": body},
            "dispatched_at": at,
            "merged_children": merged,
        }
    )


def ended(
    envelope: Envelope, *, ok: bool = True, undelivered: Mapping[str, Any] | None = None
) -> Finished:
    task_id = envelope.task.task_id
    event = TaskEvent(type=TASK_SUCCEEDED, task_id=task_id)
    if not ok:
        event = TaskEvent.failed(task_id, UploadError("no answer"))
    return Finished(
        event=event,
        dispatched_at=envelope.dispatched_at,
        spec=envelope.task.spec,
        ok=ok,
        undelivered=undelivered,
    )


@pytest.fixture
def ledger() -> TaskLedger:
    return TaskLedger()


def finish(ledger: TaskLedger, envelope: Envelope, **how: Any) -> Finished:
    assert ledger.accept(envelope)[0] is Verdict.RUN
    finished = ended(envelope, **how)
    ledger.finish(envelope.task.task_id, finished)
    return finished


def test_a_new_task_runs_and_is_held_until_it_ends(ledger: TaskLedger) -> None:
    assert ledger.accept(dispatch()) == (Verdict.RUN, None)
    assert ledger.held == {"t1"}
    ledger.finish("t1", ended(dispatch()))
    assert ledger.held == set()


@pytest.mark.parametrize("at", ["10:00", "11:00", None])
def test_a_held_task_is_not_run_twice_whenever_it_comes_again(
    ledger: TaskLedger, at: str | None
) -> None:
    ledger.accept(dispatch())
    assert ledger.accept(dispatch(at=at)) == (Verdict.HELD, None)


@pytest.mark.parametrize("at", ["10:00", "11:00", None])
def test_a_task_that_succeeded_is_never_run_again(ledger: TaskLedger, at: str | None) -> None:
    finished = finish(ledger, dispatch())
    assert ledger.accept(dispatch(at=at)) == (Verdict.FINISHED, finished)
    assert ledger.held == set()


def test_a_failed_task_runs_again_only_for_a_new_dispatch(ledger: TaskLedger) -> None:
    finished = finish(ledger, dispatch(), ok=False)
    assert ledger.accept(dispatch()) == (Verdict.FINISHED, finished)
    assert ledger.accept(dispatch(at="11:00")) == (Verdict.RUN, finished)


def test_without_a_time_of_dispatch_a_failed_task_runs_again(ledger: TaskLedger) -> None:
    finished = finish(ledger, dispatch(at=None), ok=False)
    assert ledger.accept(dispatch(at=None)) == (Verdict.RUN, finished)


def test_a_task_that_failed_and_then_succeeded_has_succeeded(ledger: TaskLedger) -> None:
    finish(ledger, dispatch(), ok=False)
    second = finish(ledger, dispatch(at="11:00"))
    for at in ("10:00", "11:00", "12:00"):
        assert ledger.accept(dispatch(at=at)) == (Verdict.FINISHED, second)


def test_a_leader_that_succeeded_runs_again_for_members_that_were_never_answered(
    ledger: TaskLedger,
) -> None:
    finish(ledger, dispatch(children=("c1", "c2"), bad=("c3",)))
    for known in ((), ("c1",), ("c2", "c1")):
        assert ledger.accept(dispatch(at="11:00", children=known))[0] is Verdict.FINISHED
    assert ledger.accept(dispatch(bad=("c3",)))[0] is Verdict.FINISHED
    assert ledger.accept(dispatch(at="11:00", children=("c1", "new")))[0] is Verdict.RUN


def test_only_the_same_work_finds_its_undelivered_result(ledger: TaskLedger) -> None:
    result = {"answer": 42}
    finish(ledger, dispatch(spec={"a": 1}), ok=False, undelivered=result)
    again = dispatch(at="11:00", spec={"a": 1})
    assert ledger.accept(again)[0] is Verdict.RUN
    assert ledger.find_undelivered(again) is result
    assert ledger.find_undelivered(dispatch(at="11:00", spec={"a": 2})) is None
    assert ledger.find_undelivered(dispatch("t2", spec={"a": 1})) is None


def test_an_undelivered_result_does_not_answer_for_new_members(ledger: TaskLedger) -> None:
    result = {"answer": 42, "children": {"c1": {}}}
    finish(ledger, dispatch(children=("c1",)), ok=False, undelivered=result)
    assert ledger.find_undelivered(dispatch(at="11:00", children=("c1",))) is result
    assert ledger.find_undelivered(dispatch(at="11:00")) is result
    assert ledger.find_undelivered(dispatch(at="11:00", children=("c1", "c2"))) is None
    assert ledger.find_undelivered(dispatch(at="11:00", bad=("c2",))) is None


@pytest.mark.parametrize("ok", [True, False])
def test_what_was_delivered_or_never_written_is_not_undelivered(
    ledger: TaskLedger, ok: bool
) -> None:
    finish(ledger, dispatch(), ok=ok)
    assert ledger.find_undelivered(dispatch()) is None


def test_the_ledger_forgets_the_oldest_and_never_what_it_holds() -> None:
    ledger = TaskLedger(kept=2)
    ledger.accept(dispatch("held"))
    for name in ("a", "b"):
        finish(ledger, dispatch(name))
    finish(ledger, dispatch("c"))
    assert ledger.accept(dispatch("a"))[0] is Verdict.RUN
    assert ledger.accept(dispatch("b"))[0] is Verdict.FINISHED
    assert ledger.accept(dispatch("c"))[0] is Verdict.FINISHED
    assert ledger.accept(dispatch("held"))[0] is Verdict.HELD


def test_ending_again_makes_a_task_the_newest() -> None:
    ledger = TaskLedger(kept=2)
    finish(ledger, dispatch("a"), ok=False)
    finish(ledger, dispatch("b"))
    finish(ledger, dispatch("a", "11:00"))
    finish(ledger, dispatch("c"))
    assert ledger.accept(dispatch("a"))[0] is Verdict.FINISHED
    assert ledger.accept(dispatch("b"))[0] is Verdict.RUN


IDS = st.sampled_from(["a", "b", "c"])


class AnyOrder(RuleBasedStateMachine):
    """Dispatches and endings in any order, against what the rules say in one sentence each."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TaskLedger()
        self.running: dict[str, Envelope] = {}
        self.succeeded: set[str] = set()
        self.failed_at: dict[str, str] = {}

    @rule(task_id=IDS, at=st.sampled_from(["10:00", "11:00", "12:00"]))
    def arrive(self, task_id: str, at: str) -> None:
        envelope = dispatch(task_id, at)
        verdict, finished = self.ledger.accept(envelope)
        if task_id in self.running:
            assert verdict is Verdict.HELD
        elif task_id in self.succeeded or self.failed_at.get(task_id) == at:
            assert verdict is Verdict.FINISHED
            assert finished is not None
        else:
            assert verdict is Verdict.RUN
            self.running[task_id] = envelope

    @rule(task_id=IDS, ok=st.booleans())
    def end(self, task_id: str, ok: bool) -> None:
        envelope = self.running.pop(task_id, None)
        if envelope is None:
            return
        self.ledger.finish(task_id, ended(envelope, ok=ok))
        if ok:
            self.succeeded.add(task_id)
        else:
            self.failed_at[task_id] = str(envelope.dispatched_at)

    @invariant()
    def holds_what_runs(self) -> None:
        assert self.ledger.held == self.running.keys()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
