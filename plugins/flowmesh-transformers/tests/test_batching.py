from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flowmesh_transformers.batching import Budget, interleave, plan_batches
from flowmesh_transformers.prompts import Request
from hypothesis import given
from hypothesis import strategies as st

REQUESTS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=40)


def requests(sizes: Any) -> list[Request]:
    return [Request(tokens=[0] * tokens, limit=limit) for tokens, limit in sizes]


@given(REQUESTS, st.integers(1, 9), st.integers(0, 2000), st.integers(0, 40))
def test_every_request_is_in_one_batch_and_every_batch_fits(
    sizes: Any, rows: int, memory: int, row_bytes: int
) -> None:
    budget = Budget(rows=rows, memory_bytes=memory, row_bytes=row_bytes, token_bytes=2)
    batches = plan_batches(requests(sizes), budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        longest = max(sizes[index][0] for index in batch)
        limit = max(sizes[index][1] for index in batch)
        taken = len(batch) * (row_bytes + 2 * (longest + limit))
        assert len(batch) == 1 or (len(batch) <= rows and taken <= memory)


@given(REQUESTS, st.integers(1, 9))
def test_prompts_come_longest_first_so_that_neighbours_are_alike(sizes: Any, rows: int) -> None:
    order = [
        sizes[i][0] for batch in plan_batches(requests(sizes), Budget(rows=rows)) for i in batch
    ]
    assert order == sorted(order, reverse=True)


def test_batches_are_as_full_as_the_budget_allows() -> None:
    same = requests([(10, 10)] * 10)
    assert [len(b) for b in plan_batches(same, Budget(rows=4))] == [4, 4, 2]
    tight = Budget(rows=9, memory_bytes=305, row_bytes=1, token_bytes=5)  # 101 for each
    assert [len(b) for b in plan_batches(same, tight)] == [3, 3, 3, 1]


def test_a_smaller_budget_never_falls_below_one_row() -> None:
    budget = Budget(rows=3, memory_bytes=100)
    assert budget.scaled(0.5) == Budget(rows=1, memory_bytes=50)
    assert budget.scaled(0.1).rows == 1
    assert Budget(rows=8).scaled(0.5) == Budget(rows=4)


def test_sources_are_read_in_turn_and_no_faster_than_asked() -> None:
    read: list[str] = []

    def source(name: str, total: int) -> Iterator[str]:
        for number in range(total):
            read.append(name)
            yield f"{name}{number}"

    items = interleave([source("a", 3), source("b", 1), source("c", 0), source("d", 2)])
    assert [next(items), next(items)] == ["a0", "b0"]
    assert read == ["a", "b"]
    assert list(items) == ["d0", "a1", "d1", "a2"]
