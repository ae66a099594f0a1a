from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.contract import Envelope, parse_envelope
from flowmesh_core.errors import ContractError, ExecutionError, MergeError
from flowmesh_core.executor import Outcome
from flowmesh_core.merge import failure_document, share_out

IDS = st.lists(st.sampled_from([f"c{n}" for n in range(8)]), unique=True, max_size=8)


def group(children: list[str], bad: frozenset[str] = frozenset()) -> Envelope:
    """Parse a dispatch as it comes over the wire; a bad child's document cannot be read."""
    spec = {"taskType": "inference", "data": {"type": "list", "items": ["x"]}}
    return parse_envelope(
        {
            "task_id": "leader",
            "task": {"spec": spec},
            "merged_children": [
                {"task_id": name, "spec": "no object" if name in bad else spec} for name in children
            ],
        }
    )


@st.composite
def runs(draw: st.DrawFn) -> tuple[Envelope, dict[str, Outcome]]:
    """A group of which some members are refused and others fail, answered in any order."""
    children = draw(IDS)
    bad = frozenset(draw(st.sets(st.sampled_from(children)))) if children else frozenset()
    failed = draw(st.sets(st.sampled_from(children))) if children else set()
    ran = draw(st.permutations([name for name in children if name not in bad]))
    outcomes = {
        name: Outcome(error=ExecutionError(name))
        if name in failed
        else Outcome(result={"items": [name]})
        for name in ran
    }
    return group(children, bad), outcomes


@given(run=runs())
def test_every_member_is_answered_exactly_once_and_the_leader_is_none_of_them(
    run: tuple[Envelope, dict[str, Outcome]],
) -> None:
    envelope, outcomes = run
    shared = share_out(envelope, outcomes)
    members = [task.task_id for task in envelope.children]
    assert list(shared) == [*members, *envelope.rejected]
    assert "leader" not in shared


@given(run=runs())
def test_every_answer_is_the_members_own_and_a_failure_spoils_no_neighbour(
    run: tuple[Envelope, dict[str, Outcome]],
) -> None:
    envelope, outcomes = run
    for name, outcome in share_out(envelope, outcomes).items():
        if name in envelope.rejected:
            assert outcome.error is envelope.rejected[name]
            assert not outcome.result
        else:
            assert outcome is outcomes[name]


@given(run=runs(), data=st.data())
def test_a_member_without_an_outcome_is_an_error_that_names_it(
    run: tuple[Envelope, dict[str, Outcome]], data: st.DataObject
) -> None:
    envelope, outcomes = run
    if not outcomes:
        return
    lost = data.draw(st.sampled_from(sorted(outcomes)))
    del outcomes[lost]
    with pytest.raises(MergeError, match=f"^no outcome for {lost}$"):
        share_out(envelope, outcomes)


@given(run=runs(), stranger=st.sampled_from(["leader", "stranger"]), refused=st.booleans())
def test_an_outcome_that_names_no_member_is_an_error(
    run: tuple[Envelope, dict[str, Outcome]], stranger: str, refused: bool
) -> None:
    envelope, outcomes = run
    name = next(iter(envelope.rejected), stranger) if refused else stranger
    with pytest.raises(MergeError, match=f"outcome for {name}, which is no member of the group"):
        share_out(envelope, {**outcomes, name: Outcome()})


def test_a_dispatch_without_children_shares_nothing() -> None:
    assert share_out(group([]), {}) == {}


@pytest.mark.parametrize(
    ("error", "document"),
    [
        (
            ExecutionError("out of memory", retriable=True),
            {"code": "executor.failed", "message": "out of memory", "retriable": True},
        ),
        (
            ContractError(["a is required", "b is required"], where="task c1"),
            {
                "code": "contract",
                "message": "task c1: a is required; b is required",
                "retriable": False,
            },
        ),
    ],
)
def test_a_failed_member_gets_a_document_that_says_so(error: Any, document: Any) -> None:
    assert failure_document(error) == {"ok": False, "error": document}
