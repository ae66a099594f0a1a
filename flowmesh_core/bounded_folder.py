"""A folder of files within a bound, the longest unused of which go first.

Several processes may share it: a file appears whole, and whoever needs room may remove any.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import attrs

__all__ = ["BoundedFolder"]

# All files are looked at whenever this part of the bound has been written.
_SHARE = 16


@attrs.define
class BoundedFolder:
    """Files directly below ``path``; sub-folders and hidden files are left alone.

    Attributes:
        path: Made when the first file appears.
        max_bytes: What all files together may have.
    """

    path: Path
    max_bytes: int
    _unlooked_bytes: float = math.inf  # written here since all were looked at

    @contextlib.contextmanager
    def appearing(self, target: Path) -> Iterator[Path]:
        """Give a name to write to; what is there at the end becomes ``target`` at once.

        Raises:
            OSError: The folder or the file cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            yield part
            self._unlooked_bytes += part.stat().st_size
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def make_room(self) -> None:
        """Remove the longest unused files until the rest fits.

        Looks only when enough was written to matter, and then leaves room for as much again.
        """
        slack_bytes = self.max_bytes // _SHARE
        if self._unlooked_bytes <= slack_bytes:
            return
        self._unlooked_bytes = 0
        files = sorted(self._files())
        total_bytes = sum(size for _, size, _ in files)
        if total_bytes <= self.max_bytes - slack_bytes:
            return
        for _, size_bytes, path in files:
            Path(path).unlink(missing_ok=True)
            total_bytes -= size_bytes
            if total_bytes <= self.max_bytes - slack_bytes:
                return

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, size and path of each file."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process made room
                    found = entry.stat()
                    yield found.st_mtime_ns, found.st_size, entry.path
