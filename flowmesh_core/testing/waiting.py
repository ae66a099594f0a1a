"""Waiting for what another thread or process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["wait_for"]

_LOOK_S = 0.01


def wait_for(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """Return what a condition gives as soon as that is true.

    Raises:
        AssertionError: It was not within ``timeout_s``.
    """
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > until:
            raise AssertionError(f"it did not come about within {timeout_s:g} s")
        time.sleep(_LOOK_S)
    return found
