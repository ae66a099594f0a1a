"""How fast a store may send: the operator's word on what this worker's link can carry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Pace"]

_SLICE_S = 0.25


class Pace:
    """A token bucket that all transfers of a store share. It holds no more than one slice.

    Args:
        bytes_per_s: What flows in; None lets everything pass.
        clock: Monotonic, in seconds.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0

    def slice_bytes(self, most_bytes: int) -> int:
        """Return how much to send at once, so that a slow link still sees an even flow."""
        if self._bytes_per_s is None:
            return most_bytes
        return max(1, min(most_bytes, int(self._bytes_per_s * _SLICE_S)))

    async def wait(self, size_bytes: int) -> None:
        """Wait until that many bytes have had their time on the link."""
        if self._bytes_per_s is None:
            return
        # Reserved before the wait: whoever comes next queues up behind it.
        self._free_at = max(self._free_at, self._clock()) + size_bytes / self._bytes_per_s
        await self._sleep(self._free_at - self._clock())
