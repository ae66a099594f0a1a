"""What an executor refuses, and what it must take."""

from __future__ import annotations

from flowmesh_core.testing.executor_checks.gates import first_of, refusals_of
from flowmesh_core.testing.executor_checks.given import Given
from flowmesh_core.testing.findings import REFUSALS, judge_rows, tell
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.verdicts import clause, refuse

__all__ = ["RefusalChecks"]

_UNICODE = "Zoë 漢字 🎉 e\u0301 \u202eabc\u202c \x07\t line\nbreak"
_LARGE = "word " * 2_000_000


class RefusalChecks(Given):
    """Of specs and rows that are wrong or strange."""

    @clause("refused")
    def test_what_it_cannot_do_is_refused_by_its_name(self, flowmesh_subject: Subject) -> None:
        """A wrong document is a contract or an input error, which says what to change."""
        refuse(
            f"refused[{number}] must fail with one of {', '.join(REFUSALS)}, got {tell(error)}; "
            "let the spec model refuse it, or raise InputError"
            for number, error in enumerate(refusals_of(flowmesh_subject))
            if error is None or error.code not in REFUSALS
        )

    @clause("final")
    def test_what_it_refuses_is_not_tried_again(self, flowmesh_subject: Subject) -> None:
        """A document that is wrong here is wrong everywhere."""
        refuse(
            f"refused[{number}] is retriable, and would fail the same again: {tell(error)}"
            for number, error in enumerate(refusals_of(flowmesh_subject))
            if error is not None and error.retriable
        )

    @clause("unicode")
    def test_texts_of_every_script_are_answered(self, flowmesh_subject: Subject) -> None:
        """Rows hold what people write."""
        first_of(flowmesh_subject)
        refuse(judge_rows(flowmesh_subject, "unicode", [_UNICODE]))

    @clause("empty")
    def test_empty_texts_are_answered_or_refused(self, flowmesh_subject: Subject) -> None:
        """A row without text, and no row at all."""
        first_of(flowmesh_subject)
        faults = judge_rows(flowmesh_subject, "empty", [""])
        refuse([*faults, *judge_rows(flowmesh_subject, "none", [])])

    @clause("large")
    def test_ten_megabytes_are_answered_or_refused(self, flowmesh_subject: Subject) -> None:
        """One row of 10 MB ends nobody's process."""
        first_of(flowmesh_subject)
        refuse(judge_rows(flowmesh_subject, "large", [_LARGE]))
