"""What an executor promises of single tasks."""

from __future__ import annotations

from collections.abc import Mapping

from flowmesh_core.executor import Capability
from flowmesh_core.testing.executor_checks.gates import first_of, promises
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import find_stuck, repeated, same, short, tell
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["PromiseChecks"]

_TOLERANCE = 1e-3


class PromiseChecks(Given):
    """Of ``service`` and ``shrink``."""

    @clause("ready")
    def test_a_service_says_that_it_is_up(self, flowmesh_subject: Subject) -> None:
        """``service``: ``ctx.ready`` is called, and ``run`` goes on."""
        promises(flowmesh_subject, Capability.SERVICE)
        up = first_of(flowmesh_subject).served
        refuse([] if up else ["its run ended without a call of ctx.ready"])

    @clause("service-end")
    def test_a_service_ends_when_it_is_cancelled(self, flowmesh_subject: Subject) -> None:
        """``service``: it takes down what it put up."""
        promises(flowmesh_subject, Capability.SERVICE)
        first = first_of(flowmesh_subject)
        if not first.served:
            skip("not before it is up: see clause ready")
        refuse(find_stuck(first, f"its cancel (grace_s {self.grace_s:g})"))

    @clause("shrink")
    def test_a_smaller_batch_answers_the_same(self, flowmesh_subject: Subject) -> None:
        """``shrink``: half the batch gives the same answers."""
        promises(flowmesh_subject, Capability.SHRINK)
        first_of(flowmesh_subject)
        # One that keeps things has met the same ones before each of these.
        _, *runs = flowmesh_subject.story
        one, other = (self.answer(ran.outcome.result) for ran in runs)
        if not (whole := repeated(one, other, _TOLERANCE)):
            skip("two runs answer differently: override answer, the part that should be equal")
        half = flowmesh_subject.bench.run(flowmesh_subject.example, "kit-half", do="half")
        if half.outcome.error:
            refuse([f"with half the batch its example failed with {tell(half.outcome.error)}"])
        less = self.answer(half.outcome.result)
        if isinstance(whole, Mapping) and isinstance(less, Mapping):
            less = {key: less[key] for key in whole if key in less}
        equal = same(whole, less, _TOLERANCE)
        refuse([] if equal else [f"half the batch answers {short(less)}, the whole {short(whole)}"])
