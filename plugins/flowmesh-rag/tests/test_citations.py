"""Which sources an answer refers to."""

from __future__ import annotations

import pytest
from flowmesh_rag.citations import cite
from flowmesh_rag.stores.base import Hit

SHOWN = [
    Hit(id="p1", score=1.0, payload={"source": "a.md", "start": 0, "end": 9, "title": "A"}),
    Hit(id=2, score=0.5, payload={"source": "b.pdf", "page": 3, "lang": "de"}),
    Hit(id="p3", score=0.1),
]


@pytest.mark.parametrize(
    ("text", "numbers", "unknown"),
    [
        ("It is [1].", [1], 0),
        ("It is [2][1], and [2] again.", [2, 1], 0),
        ("It is [1, 3; 2].", [1, 3, 2], 0),
        ("It is [ 3 ].", [3], 0),
        ("It is [4], [0] or [9][9].", [], 3),
        ("It is [1] or [7].", [1], 1),
        ("It is (1), 1, [a], [], [-1], [1.5] or [12345].", [], 0),
        ("", [], 0),
    ],
)
def test_marks_become_citations_of_what_was_shown(
    text: str, numbers: list[int], unknown: int
) -> None:
    citations, missed = cite(text, SHOWN)
    assert ([one["number"] for one in citations], missed) == (numbers, unknown)


def test_a_citation_tells_where_its_text_stands() -> None:
    assert cite("[1][2][3]", SHOWN)[0] == [
        {"number": 1, "id": "p1", "source": "a.md", "title": "A", "start": 0, "end": 9},
        {"number": 2, "id": 2, "source": "b.pdf", "page": 3},
        {"number": 3, "id": "p3"},
    ]
