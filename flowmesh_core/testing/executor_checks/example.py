"""Whether an executor runs its example, and what it answers with."""

from __future__ import annotations

from flowmesh_core.checking import check_result
from flowmesh_core.errors import ExecutorUnavailableError
from flowmesh_core.registry import missing_packages
from flowmesh_core.testing.executor_checks.gates import first_of, info_of, with_example
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import is_there, tell
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse, skip

__all__ = ["ExampleChecks"]


class ExampleChecks(Given):
    """Of one run of its example, and a second attempt."""

    @clause("example")
    def test_its_example_succeeds(self, flowmesh_subject: Subject) -> None:
        """The example runs to its end as it would on a worker."""
        info_of(flowmesh_subject)
        if flowmesh_subject.spec is None and flowmesh_subject.problem:
            if flowmesh_subject.plugin:
                skip("not before its example can be imported: see clause light")
            refuse([flowmesh_subject.problem])
        if flowmesh_subject.spec is None:
            lacking = missing_packages(flowmesh_subject.declared)
            if lacking and flowmesh_subject.declared.example:  # to be made with the engine, perhaps
                skip(f"its example cannot be made without {', '.join(lacking)}")
            refuse([f"there is no example: {flowmesh_subject.no_example}"])
        with_example(flowmesh_subject)
        error = flowmesh_subject.first.outcome.error
        if error and error.code == ExecutorUnavailableError.code:
            skip(f"it cannot run here: {error}")
        ends = flowmesh_subject.first.noted("run", "end")
        answered = any(note.get("faults") for note in ends)  # then that is judged by `result`
        refuse([f"the example failed with {tell(error)}"] if error and not answered else [])

    @clause("result")
    def test_its_result_is_json_of_the_declared_model(self, flowmesh_subject: Subject) -> None:
        """Readers get what was promised, and every number arrives."""
        with_example(flowmesh_subject)
        notes = flowmesh_subject.first.noted("run", "end")
        faults = list(dict.fromkeys(fault for note in notes for fault in note.get("faults", ())))
        result = flowmesh_subject.first.outcome.result
        if not faults:
            first_of(flowmesh_subject)
            problems = check_result(info_of(flowmesh_subject), result)
            faults = [f"not the result that it declares: {problem}" for problem in problems]
        refuse(faults)

    @clause("artifacts")
    def test_the_artifacts_that_it_names_are_there(self, flowmesh_subject: Subject) -> None:
        """Whatever an outcome names can be shipped."""
        first = first_of(flowmesh_subject)
        if not first.outcome.artifacts:
            skip("its example names no artifact")
        missing = [file.path for file in first.outcome.artifacts if not is_there(first, file)]
        refuse(f"its outcome names {path!r}, which is not in ctx.folder" for path in missing)

    @clause("retry")
    def test_another_attempt_succeeds(self, flowmesh_subject: Subject) -> None:
        """A task that is tried again finds what the attempt before it left, and does not mind."""
        first_of(flowmesh_subject)
        error = flowmesh_subject.story[1].outcome.error
        refuse([f"a second attempt at its example failed with {tell(error)}"] if error else [])
