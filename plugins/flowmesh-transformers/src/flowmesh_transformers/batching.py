"""Sorts requests into batches that waste little on padding and fit into memory; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import attrs

from flowmesh_transformers.prompts import Request

__all__ = ["Budget", "interleave", "plan_batches"]

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Budget:
    """What one batch may take.

    Attributes:
        rows: Requests at most.
        memory_bytes: Memory at most; None when it cannot be told what a request takes.
        row_bytes: What a request takes whatever its length.
        token_bytes: What each token takes, of prompt, answer and padding alike.
    """

    rows: int
    memory_bytes: int | None = None
    row_bytes: int = 0
    token_bytes: int = 0

    def scaled(self, factor: float) -> Budget:
        """Return the budget for batches of ``factor`` times the size; a row always remains."""
        memory = self.memory_bytes if self.memory_bytes is None else self.memory_bytes * factor
        return attrs.evolve(
            self,
            rows=max(1, int(self.rows * factor)),
            memory_bytes=memory if memory is None else int(memory),
        )

    def fits(self, rows: int, tokens: int) -> bool:
        """Tell whether a batch may hold ``rows`` requests of up to ``tokens`` each."""
        taken = rows * (self.row_bytes + tokens * self.token_bytes)
        return rows <= self.rows and (self.memory_bytes is None or taken <= self.memory_bytes)


def plan_batches(requests: Sequence[Request], budget: Budget) -> list[list[int]]:
    """Return the indices of the requests of each batch, longest prompts first.

    Neighbours in a batch have prompts of similar length. A request that is too large for the
    budget stands alone; what cannot run at all shows at once, before anything else is computed.
    """
    batches: list[list[int]] = []
    longest = limit = 0
    for index in sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens)):
        request = requests[index]
        most = max(limit, request.limit)
        if batches and budget.fits(len(batches[-1]) + 1, longest + most):
            batches[-1].append(index)
            limit = most
        else:
            batches.append([index])
            longest, limit = len(request.tokens), request.limit
    return batches


def interleave(sources: Iterable[Iterator[T]]) -> Iterator[T]:
    """Yield from all sources in turn, so that a short one ends early."""
    waiting = list(sources)
    while waiting:
        for source in [*waiting]:
            for item in source:
                yield item
                break
            else:
                waiting.remove(source)
