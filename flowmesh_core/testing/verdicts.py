"""What the suites share: how a check says what is wrong, and how it looks around."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import pytest

from flowmesh_core.testing.watching import find_leftovers

__all__ = ["attempt", "clause", "drive", "find_left", "listening", "refuse", "skip"]

T = TypeVar("T")
_PATIENCE_S = 2.0
clause = pytest.mark.flowmesh_clause


def refuse(faults: Iterable[str]) -> None:
    """Fail the check with its faults, if there are any."""
    told = list(faults)
    if told:
        pytest.fail("\n".join(told), pytrace=False)


def skip(reason: str) -> NoReturn:
    """Leave the check out, and say what to give so that it can be made."""
    pytest.skip(reason)


def drive(work: Coroutine[Any, Any, T], limit_s: float) -> T:
    """Run on an event loop of its own, for so long at most."""

    async def main() -> T:
        try:
            return await asyncio.wait_for(work, limit_s)
        except asyncio.TimeoutError:
            pytest.fail(f"it has not ended within {limit_s:g} s (limit_s)", pytrace=False)

    return asyncio.run(main())


async def attempt(work: Awaitable[T]) -> T | BaseException:
    """Return what it gives, or what it raises."""
    (answer,) = await asyncio.gather(work, return_exceptions=True)
    return answer


def find_left(work: Callable[[], Any]) -> list[str]:
    """Say what a second call leaves behind; the first may import and set up what stays.

    The far side, when it runs in this process too, gets a moment to hang up.
    """
    work()
    before = find_leftovers()
    work()
    until = time.monotonic() + _PATIENCE_S
    while (left := [*_growth(before)]) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def _growth(before: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for kind, now in find_leftovers().items():
        more: Mapping[str, int] = Counter(now) - Counter(before[kind])
        yield from (f"left among {kind}: {name} ({count})" for name, count in more.items())


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what is logged from ``INFO`` on, as text."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    root, listener = logging.getLogger(), Listener(logging.INFO)
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.setLevel(level)
        root.removeHandler(listener)
