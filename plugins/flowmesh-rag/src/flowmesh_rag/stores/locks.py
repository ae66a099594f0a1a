"""One user at a time for an embedded collection."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from flowmesh_core import ExecutionError

__all__ = ["FolderLock"]

_LOOK_S = 0.05


class FolderLock:
    """Held by every process that has its descriptor, so also by a helper that outlives us.

    Args:
        file: Made when it is missing; its folder must be there.
        timeout_s: How long to wait.

    Raises:
        ExecutionError: Somebody else holds it that long; retriable.
    """

    def __init__(self, file: Path, timeout_s: float) -> None:
        self._file = file.open("ab")
        until = time.monotonic() + timeout_s
        while not self._try():
            if time.monotonic() > until:
                self.close()
                raise ExecutionError(
                    f"collection {file.parent.name!r} is in use by another task for more than"
                    f" {timeout_s:g} s; try again, or raise timeout_s",
                    retriable=True,
                )
            time.sleep(_LOOK_S)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def fileno(self) -> int:
        """Return the descriptor, to be handed to a helper."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go; may come twice."""
        self._file.close()
