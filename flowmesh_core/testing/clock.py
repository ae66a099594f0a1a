"""A clock that a test moves, for ``RunContext.clock`` and whatever else takes one."""

from __future__ import annotations

import threading

__all__ = ["ManualClock"]


class ManualClock:
    """Monotonic seconds that pass when a test says so; for any thread.

    Args:
        now_s: Where it begins.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the seconds by now."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: It would run backwards.
        """
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot run backwards, got {seconds:g} s")
        with self._lock:
            self._now_s += seconds
