"""Tries again what may pass, with growing pauses: one loop for every store."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flowmesh_core.errors import UploadError

__all__ = ["PassingError", "persist"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class PassingError(Exception):
    """This try failed in a way that another may mend."""


async def persist(work: Callable[[], Awaitable[T]], what: str, *, retries: int) -> T:
    """Do something until it works.

    Args:
        work: One try; raises ``PassingError`` when another may do better.
        what: Named in logs and errors, secrets masked.
        retries: Tries after the first.

    Raises:
        UploadError: The last try failed too. What else ``work`` raises ends this at once.
    """
    tried = 1
    while True:
        try:
            return await work()
        except PassingError as exc:
            _log.warning("%s failed, try %d of %d: %s", what, tried, retries + 1, exc)
            if tried > retries:
                raise UploadError(f"{what} failed {tried} times, last: {exc}") from exc
        await asyncio.sleep(_pause_s(tried))
        tried += 1


def _pause_s(tried: int) -> float:
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(tried, 20))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
