from __future__ import annotations

from typing import Any

import pytest
from flowmesh_vllm.streaming import PartialAnswers


class Told:
    """What was reported, on a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.reports: list[list[dict[str, Any]]] = []
        self.answers = PartialAnswers(self.report, clock=lambda: self.now_s)

    def report(self, message: str, *, partial: list[dict[str, Any]]) -> None:
        assert message == "writing"
        self.reports.append(partial)


@pytest.fixture
def told() -> Told:
    return Told()


def part(index: int, choice: int, output: str) -> dict[str, Any]:
    return {"index": index, "choice": choice, "output": output}


def test_the_first_words_are_told_at_once(told: Told) -> None:
    told.answers.listener(3, 1)("On")
    assert told.reports == [[part(3, 1, "On")]]


def test_further_words_are_told_together_a_few_times_a_second(told: Told) -> None:
    take = told.answers.listener(0, 0)
    for text in ("a", "ab", "abc"):
        take(text)
    told.now_s += 0.24
    take("abcd")
    assert told.reports == [[part(0, 0, "a")]]
    told.now_s += 0.01
    take("abcde")
    assert told.reports[1:] == [[part(0, 0, "abcde")]]


def test_the_next_report_waits_its_time_again(told: Told) -> None:
    take = told.answers.listener(0, 0)
    take("a")
    told.now_s += 10
    take("ab")
    take("abc")
    assert [report[0]["output"] for report in told.reports] == ["a", "ab"]


def test_only_answers_that_have_grown_are_told_in_order_of_their_rows(told: Told) -> None:
    takes = {key: told.answers.listener(*key) for key in [(10, 0), (2, 1), (2, 0), (1, 0)]}
    takes[1, 0]("first")
    for key in [(10, 0), (2, 1)]:
        takes[key](f"from {key}")
    told.now_s += 1
    takes[2, 0]("last")
    assert told.reports[1] == [
        part(2, 0, "last"),
        part(2, 1, "from (2, 1)"),
        part(10, 0, "from (10, 0)"),
    ]


def test_it_goes_by_a_real_clock_by_itself() -> None:
    reports: list[Any] = []
    take = PartialAnswers(lambda _message, partial: reports.append(partial)).listener(0, 0)
    take("a")
    take("ab")
    assert reports == [[part(0, 0, "a")]]
