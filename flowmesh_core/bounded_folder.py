"""A folder of files within a bound, the longest unused of which go first.

Several processes may share it: a file appears whole, and whoever needs room may remove any.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import attrs

__all__ = ["BoundedFolder"]


@attrs.frozen(kw_only=True)
class BoundedFolder:
    """Files directly below ``path``; sub-folders and hidden files are left alone.

    Attributes:
        path: Made when the first file appears.
        max_bytes: What all files together may have.
    """

    path: Path
    max_bytes: int

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
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def make_room(self) -> None:
        """Remove the longest unused files until the rest fits."""
        files = sorted(self._files())
        total_bytes = sum(size for _, size, _ in files)
        for _, size_bytes, path in files:
            if total_bytes <= self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total_bytes -= size_bytes

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Yield time of last use, size and path of each file."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process made room
                    found = entry.stat()
                    yield found.st_mtime_ns, found.st_size, entry.path
