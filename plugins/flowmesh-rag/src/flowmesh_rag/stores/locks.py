"""One user at a time for an embedded collection."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flowmesh_core import ExecutionError
from flowmesh_rag.stores.base import StoreContext

__all__ = ["FolderLock", "wait_for_turn"]

ResultT = TypeVar("ResultT")
_LOOK_S = 0.05


def wait_for_turn(
    attempt: Callable[[], ResultT | None], name: str, context: StoreContext
) -> ResultT:
    """Try until there is a result, and hear a cancel meanwhile.

    Args:
        attempt: Returns None while somebody else is at it.
        name: Of the collection.
        context: Says how long to wait, and when to stop.

    Raises:
        ExecutionError: It takes too long; retriable.
    """
    until = time.monotonic() + context.timeout_s
    while (result := attempt()) is None:
        context.stop()
        if time.monotonic() > until:
            raise ExecutionError(
                f"collection {name!r} is in use by another task for more than"
                f" {context.timeout_s:g} s; try again, or raise timeout_s",
                retriable=True,
            )
        time.sleep(_LOOK_S)
    return result


class FolderLock:
    """Held by every process that has its descriptor, so also by a helper that outlives us.

    Args:
        file: Made when it is missing; its folder, which has the collection's name, must be there.
        context: As ``wait_for_turn`` takes it, whose errors are raised.
    """

    def __init__(self, file: Path, context: StoreContext) -> None:
        self._file = file.open("ab")
        try:
            wait_for_turn(self._try, file.parent.name, context)
        except BaseException:
            self.close()
            raise

    def _try(self) -> bool | None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return True

    def fileno(self) -> int:
        """Return the descriptor, to be handed to a helper."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go; may come twice."""
        self._file.close()
