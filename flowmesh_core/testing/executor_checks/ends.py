"""Whether an executor ends when it is to, and tells how far it is."""

from __future__ import annotations

import time
from itertools import chain, pairwise

from flowmesh_core.testing.executor_checks.gates import first_of, long_spec_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import find_stuck
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["EndChecks"]


class EndChecks(Given):
    """Of a cancel, a deadline, and the way to the end."""

    @clause("cancel")
    def test_a_cancel_ends_it_within_the_grace(self, flowmesh_subject: Subject) -> None:
        """An executor that stops by itself keeps its engine; one that does not is killed."""
        long_spec_of(flowmesh_subject)
        alone, *group = flowmesh_subject.cancelled
        if alone.outcome.ok:
            refuse(["it ended before it could be cancelled; let long_spec run for seconds"])
        ran = [alone, *(one for one in group if one.journal)]  # the rest had to wait
        faults = [find_stuck(one, f"its cancel (grace_s {self.grace_s:g})") for one in ran]
        refuse(dict.fromkeys(chain.from_iterable(faults)))

    @clause("deadline")
    def test_its_deadline_ends_it(self, flowmesh_subject: Subject) -> None:
        """The same when its time is over."""
        spec, limit_s = long_spec_of(flowmesh_subject), 0.5
        while limit_s < self.limit_s:
            started = time.monotonic()
            ran = flowmesh_subject.bench.run(
                {**spec, "timeoutSec": limit_s}, f"kit-late-{limit_s:g}"
            )
            if ran.noted("run", "begin"):
                break
            limit_s *= 2  # its engine takes so long to load
        if ran.outcome.ok and time.monotonic() - started < limit_s:
            refuse([f"it ended within {limit_s:g} s; let long_spec run for longer"])
        refuse(find_stuck(ran, f"its deadline (grace_s {self.grace_s:g})"))

    @clause("progress")
    def test_progress_never_falls_and_ends_at_one(self, flowmesh_subject: Subject) -> None:
        """Whoever watches sees how far it is."""
        first = first_of(flowmesh_subject)
        fractions = [value for note in first.noted("run", "end") for value in note["fractions"]]
        if not fractions:
            skip("its example reports no fraction: call ctx.progress")
        faults = [f"progress fell from {a:g} to {b:g}" for a, b in pairwise(fractions) if b < a]
        faults += [
            f"progress is {value:g}, not 0 to 1" for value in fractions if not 0 <= value <= 1
        ]
        if not faults and fractions[-1] != 1:
            faults = [f"progress ended at {fractions[-1]:g} of a task that succeeded, not at 1"]
        refuse(faults)
