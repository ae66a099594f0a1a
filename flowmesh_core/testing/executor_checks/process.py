"""What tasks share: whether one leaves the process, and what another one sees, as it was."""

from __future__ import annotations

from flowmesh_core.testing.executor_checks.gates import first_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import (
    find_changes,
    find_growth,
    find_piles,
    tell,
    texts_of,
)
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse
from flowmesh_core.testing.watching import LONG_LINE, STATE

__all__ = ["ProcessChecks"]

_TOLD = 5


class ProcessChecks(Given):
    """Of the process, after many tasks."""

    @clause("state")
    def test_the_process_is_as_it_was(self, flowmesh_subject: Subject) -> None:
        """``run`` changes nothing that the next task, or the worker, shares with it."""
        first_of(flowmesh_subject)
        if unknown := self.may_change.keys() - STATE:
            known = ", ".join(STATE)
            refuse([f"may_change: {name!r} must be one of {known}" for name in sorted(unknown)])
        _ = flowmesh_subject.growth  # that refuses, cancels and groups
        calls = ("load", "run", "run_group") if flowmesh_subject.inline else ("run", "run_group")
        changes = find_changes(flowmesh_subject.bench.read_journal(), calls, self.may_change)
        refuse(list(dict.fromkeys(changes))[:_TOLD])

    @clause("threads")
    def test_no_thread_is_left(self, flowmesh_subject: Subject) -> None:
        """A warm task ends with the threads that were there after the one before it."""
        first_of(flowmesh_subject)
        refuse(find_growth(flowmesh_subject, "threads", "thread"))

    @clause("processes")
    def test_no_process_is_left(self, flowmesh_subject: Subject) -> None:
        """The same with processes that it started."""
        first_of(flowmesh_subject)
        refuse(find_growth(flowmesh_subject, "processes", "process"))

    @clause("descriptors")
    def test_no_descriptor_is_left(self, flowmesh_subject: Subject) -> None:
        """The same with open files, sockets and pipes."""
        first_of(flowmesh_subject)
        refuse(find_growth(flowmesh_subject, "descriptors", "open descriptor of"))

    @clause("isolation")
    def test_nothing_of_a_task_reaches_the_next(self, flowmesh_subject: Subject) -> None:
        """What one owner's task held is in no result, file or report of another owner's."""
        first_of(flowmesh_subject)
        *_, (after, _) = flowmesh_subject.marked
        if after.outcome.error:
            refuse([f"its example failed after another task with {tell(after.outcome.error)}"])
        faults = [
            f"{where} holds {mark}, which only an earlier task of another owner had"
            for ran, marks in flowmesh_subject.marked
            for where, text in texts_of(ran).items()
            for mark in marks
            if mark in text
        ]
        refuse(faults or find_piles(flowmesh_subject))

    @clause("log")
    def test_long_lines_arrive_whole(self, flowmesh_subject: Subject) -> None:
        """What is printed and logged beside it still reaches the task's logs."""
        first_of(flowmesh_subject)
        ran = flowmesh_subject.bench.run(flowmesh_subject.example, "kit-prints", do="print")
        names = (
            ["task.log"] if flowmesh_subject.inline else ["task.log", "stdout.log", "stderr.log"]
        )
        logs = {name: ran.folder / "logs" / name for name in names}
        refuse(
            f"a line of 1 MB did not arrive in logs/{name}; leave sys.stdout and sys.stderr alone"
            for name, path in logs.items()
            if not path.exists() or LONG_LINE not in path.read_text("utf-8", "replace")
        )
