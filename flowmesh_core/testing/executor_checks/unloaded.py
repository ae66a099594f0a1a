"""What an executor leaves behind."""

from __future__ import annotations

from itertools import pairwise

from flowmesh_core.testing.executor_checks.gates import first_of, refusals_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import REFUSALS, is_refusal, tell
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["UnloadedChecks"]

_MEMORY_STEP_BYTES = 16 << 20


class UnloadedChecks(Given):
    """Of what is left once its engines are unloaded."""

    @clause("files")
    def test_it_writes_below_its_folder_alone(self, flowmesh_subject: Subject) -> None:
        """Nothing is left in the home, among temporary files, beside the task's folder."""
        first_of(flowmesh_subject)
        assert flowmesh_subject.closed  # what the engine kept while it was loaded is gone
        strays = flowmesh_subject.stray_files()
        refuse(f"it left {path}; write below ctx.folder" for path in strays[:5])

    @clause("unload")
    def test_unloading_twice_is_harmless(self, flowmesh_subject: Subject) -> None:
        """``unload`` may come twice."""
        first_of(flowmesh_subject)
        journal, _ = flowmesh_subject.closed
        ends = [note for note in journal if note["call"].startswith("unload")]
        if not ends:
            skip("it was never unloaded: its process was ended before")
        times = {"unload": "the first time", "unload_again": "the second time"}
        raised = [note for note in ends if note.get("error")]
        faults = [f"unload raised {times[note['call']]}: {note['error']}" for note in raised]
        begun = {note["pid"] for note in ends} - {note["pid"] for note in ends if "error" in note}
        refuse([*faults, *(f"unload did not end in process {pid}" for pid in begun)])

    @clause("memory")
    def test_unloading_gives_the_memory_back(self, flowmesh_subject: Subject) -> None:
        """Its process ends; what runs inline can be loaded again and again."""
        first_of(flowmesh_subject)
        journal, alive = flowmesh_subject.closed
        notes = [note for note in journal if note["call"] == "memory"]
        steps = [b - a for note in notes for a, b in pairwise(note["resident_bytes"])]
        faults = [f"process {pid} outlived its engine" for pid in alive]
        if steps and min(steps) > _MEMORY_STEP_BYTES:
            faults.append(f"loading and unloading again keeps {min(steps) >> 20} MiB each time")
        refuse(faults)

    @clause("cold")
    def test_it_refuses_the_same_whatever_is_loaded(self, flowmesh_subject: Subject) -> None:
        """What it cannot do is refused as the first task of an engine too, and as its second."""
        if not all(map(is_refusal, refusals_of(flowmesh_subject))):
            skip("not before what it cannot do is refused: see clauses refused and final")
        assert flowmesh_subject.closed  # the clauses above look at what that left
        refuse(
            f"refused[{number}] as the {turn} task of its engine must fail with one of "
            f"{', '.join(REFUSALS)} that is not retriable, got {tell(ran.outcome.error)}"
            for number, turn, ran in flowmesh_subject.refuse_cold()
            if not is_refusal(ran.outcome.error)
        )
