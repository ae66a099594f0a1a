"""What an executor does with a loaded engine, and with GPUs."""

from __future__ import annotations

from flowmesh_core.executor import Capability
from flowmesh_core.testing.executor_checks.gates import first_of, info_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["EngineChecks"]


class EngineChecks(Given):
    """Of a warm engine."""

    @clause("warm")
    def test_a_second_run_does_not_load_again(self, flowmesh_subject: Subject) -> None:
        """Tasks that agree on ``engine_key`` share what was loaded for the first."""
        first = first_of(flowmesh_subject)
        if Capability.SERVICE in info_of(flowmesh_subject).capabilities:
            skip("a service's engine ends with it")
        last = flowmesh_subject.story[2]
        if {note["pid"] for note in last.journal} != {note["pid"] for note in first.journal}:
            refuse(["its process did not outlive its first tasks"])
        loads = [*last.noted("load", "begin"), *flowmesh_subject.story[1].noted("load", "begin")]
        refuse(
            [f"load was called {len(loads)} times for three tasks of one engine"] * (len(loads) > 1)
        )

    @clause("devices")
    def test_it_uses_no_other_devices(self, flowmesh_subject: Subject) -> None:
        """What its process, and what that starts, may see is what the worker lent it."""
        first_of(flowmesh_subject)
        if flowmesh_subject.inline:
            skip("it runs in the worker's own process; declare the place 'process' for GPUs")
        pairs = [note["devices"] for note in flowmesh_subject.bench.read_journal()]
        changed = {
            f"{name} became {now.get(name)!r}, it was lent {lent.get(name)!r}"
            for lent, now in pairs
            for name in {*lent, *now}
            if lent.get(name) != now.get(name)
        }
        refuse(sorted(changed))
