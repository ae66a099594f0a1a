"""What an executor promises of tasks that run together."""

from __future__ import annotations

import json
from collections import Counter

from flowmesh_core.executor import Capability
from flowmesh_core.merge import work_key
from flowmesh_core.testing.bench import parse_spec
from flowmesh_core.testing.executor_checks.gates import (
    answered_together,
    long_spec_of,
    promises,
    together_of,
)
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import find_swaps, same, short, tell
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["MemberChecks"]


class MemberChecks(Given):
    """Of ``group`` and ``concurrent``."""

    @clause("answers")
    def test_a_group_answers_every_member_once(self, flowmesh_subject: Subject) -> None:
        """``group``: exactly one answer for each."""
        promises(flowmesh_subject, Capability.GROUP)
        ran = together_of(flowmesh_subject)
        notes = [note for one in ran.values() for note in one.noted("run_group", "end")]
        groups = list({json.dumps(note): note for note in notes}.values())
        faults = []
        # Which of two equal ones is asked for both is chance.
        work = {
            name: json.dumps(spec, default=str) for name, spec in flowmesh_subject.members.items()
        }
        if not any(len({work[name] for name in note["tasks"]}) > 1 for note in groups):
            faults.append("run_group was given no two members that differ; see group_key")
        for note in groups:
            counts = Counter(note["answered"])
            faults += [
                f"run_group answered {task_id} {counts[task_id]} times, not once"
                for task_id in dict.fromkeys([*note["tasks"], *counts])
                if counts[task_id] != 1 or task_id not in note["tasks"]
            ]
        refuse(faults)

    @clause("own")
    def test_a_member_gets_its_own_answer(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: nobody gets what another one asked for."""
        ran = answered_together(flowmesh_subject)
        faults = []
        for name, one in ran.items():
            told = json.dumps(one.outcome.result)
            faults += [
                f"{name} was answered with {mark}, which another member asked for"
                for mark in flowmesh_subject.strangers(name)
                if mark in told
            ]
        refuse(faults or find_swaps(self.answer, flowmesh_subject))

    @clause("neighbours")
    def test_a_bad_member_spoils_no_neighbour(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: a failure is its own task's alone."""
        promises(flowmesh_subject, Capability.GROUP, Capability.CONCURRENT)
        if not self.refused:
            skip("give refused: specs that it must refuse, in one group with spec")
        answered_together(flowmesh_subject)
        bad = {
            f"kit-bad-{n}": flowmesh_subject.resolve(spec) for n, spec in enumerate(self.refused)
        }
        good = {f"kit-good-{n}": spec for n, spec in enumerate(flowmesh_subject.members.values())}
        ran = flowmesh_subject.bench.run_together({**good, **bad})
        refuse(
            f"{name} failed beside a bad member with {tell(ran[name].outcome.error)}"
            for name in good
            if ran[name].outcome.error
        )

    @clause("identical")
    def test_identical_members_get_the_same_answer(self, flowmesh_subject: Subject) -> None:
        """``group`` and ``concurrent``: deterministic work that is equal is done once."""
        ran = answered_together(flowmesh_subject)
        first, *_, last = ran
        if work_key(parse_spec(flowmesh_subject.members[first])) is None:
            skip("chance decides about its answers: give an inference spec with temperature 0")
        equal = [ran[name] for name in (first, last)]
        computed = [
            one for one in equal if one.noted("run", "end") or one.noted("run_group", "end")
        ]
        faults = [f"{last} was computed again, and is {first} once more"] * (len(computed) - 1)
        one, other = (self.answer(ran.outcome.result) for ran in equal)
        refuse(faults if same(one, other, 0.0) else [f"{last} is answered otherwise than {first}"])

    @clause("invariant")
    def test_an_answer_does_not_depend_on_neighbours(self, flowmesh_subject: Subject) -> None:
        """``batch_invariant``: the answer in a group is the answer alone."""
        promises(flowmesh_subject, Capability.BATCH_INVARIANT)
        ran = answered_together(flowmesh_subject)
        faults = []
        for name, alone in flowmesh_subject.alone.items():
            pair = [self.answer(one.outcome.result) for one in (alone, ran[name])]
            if not same(pair[0], pair[1], 0.0):
                faults.append(
                    f"{name} is answered {short(pair[1])} beside others, {short(pair[0])} alone"
                )
        refuse(faults)

    @clause("concurrent")
    def test_two_tasks_run_at_once(self, flowmesh_subject: Subject) -> None:
        """``concurrent``: a task begins while another one runs."""
        promises(flowmesh_subject, Capability.CONCURRENT)
        spec = long_spec_of(flowmesh_subject)
        ran = flowmesh_subject.bench.overlap({"kit-one": spec, "kit-two": spec})
        notes = [
            note
            for note in flowmesh_subject.bench.read_journal()
            if note["call"] == "run" and {*note["tasks"]} & {*ran}
        ]
        both = [note["edge"] for note in notes][:2] == ["begin", "begin"]
        refuse(
            []
            if both
            else [
                "one task began only when the other had ended; let run be a coroutine that does "
                "not block its loop"
            ]
        )
