"""What all workers of a results folder hold and have reported, read from their journals."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from flowmesh_core.housekeeping.journal import (
    JOURNAL_NAME,
    Word,
    format_word,
    is_alive,
    locked,
    parse_words,
)

__all__ = ["History"]

_log = logging.getLogger(__name__)
_WORKERS = ".workers"
_MARKS = "[!.]*.alive"


class History:
    """The journals of all workers that share a results folder, read.

    Args:
        root: The results folder, links resolved.
    """

    def __init__(self, root: Path) -> None:
        self._workers = root / _WORKERS
        self._readers: dict[Path, _Reader] = {}

    @property
    def folders(self) -> set[str]:
        """Every folder of which something was said, as ``folder_key`` has it."""
        return {key for reader in self._readers.values() for key in reader.words}

    def refresh(self) -> None:
        """Read what has been said since the last time."""
        for worker in self._list_folders():
            self._readers.setdefault(worker, _Reader(worker / JOURNAL_NAME)).refresh()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no worker that lives say more for a moment, and read what was said until then."""
        with contextlib.ExitStack() as stack:
            for worker, begun_at in self.list_workers():
                if begun_at < math.inf:
                    stack.enter_context(locked(worker))
            self.refresh()
            yield

    def list_workers(self) -> Iterator[tuple[Path, float]]:
        """Yield the folder of each worker and when the oldest of its living processes began."""
        for worker in self._list_folders():
            begun_at = math.inf
            for mark in worker.glob(_MARKS):
                with contextlib.suppress(FileNotFoundError):  # it ended just now
                    begun_at = min(begun_at, mark.lstat().st_mtime if is_alive(mark) else math.inf)
            yield worker, begun_at

    def _list_folders(self) -> list[Path]:
        try:
            with os.scandir(self._workers) as entries:
                found = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:  # there is none, or it is a file
            return []
        return sorted(found)

    def is_held(self, folder: str) -> bool:
        """Whether a process that lives holds the task of a folder."""
        return any(
            is_alive(worker / f"{word.held}.alive")
            for worker, word in self._words(folder)
            if word.held
        )

    def reported_at(self, folder: str) -> float | None:
        """Return when its task was reported, in seconds since the epoch.

        None when it never was, or was taken again by a worker that has not reported since.
        """
        words = [word for _, word in self._words(folder)]
        held_at = max((word.at for word in words if word.held is not None), default=-math.inf)
        at = max((word.at for word in words if word.held is None), default=-math.inf)
        return at if at > held_at else None

    def _words(self, folder: str) -> Iterator[tuple[Path, Word]]:
        for worker, reader in self._readers.items():
            if (word := reader.words.get(folder)) is not None:
                yield worker, word

    def compact(self, is_there: Callable[[str], bool]) -> None:
        """Drop what is said of folders that are gone, and the marks of processes that ended."""
        for worker in self._list_folders():
            try:
                for mark in worker.glob(_MARKS):
                    if not is_alive(mark):
                        mark.unlink(missing_ok=True)
                _compact(worker / JOURNAL_NAME, is_there)
            except FileNotFoundError:
                continue
            except OSError as exc:
                _log.warning("the journal in %s stays as long as it is: %s", worker, exc)


class _Reader:
    """What one journal says, by folder."""

    def __init__(self, path: Path) -> None:
        self.words: dict[str, Word] = {}
        self._path = path
        self._inode = self._offset = 0

    def refresh(self) -> None:
        """Read what was appended, or all of a journal that was compacted."""
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ELOOP):
                raise  # somebody may hold something
            self.words = {}  # none, or a link, in which nothing counts
            return
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if status.st_ino != self._inode or status.st_size < self._offset:
                self.words, self._inode, self._offset = {}, status.st_ino, 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.words.update(parse_words(whole))


def _compact(path: Path, is_there: Callable[[str], bool]) -> None:
    """Rewrite a journal, for which its writers wait; in place of it by one rename."""
    with locked(path.parent, required=True):
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            data = file.read()
        kept = {
            folder: word
            for folder, word in dict(parse_words(data)).items()
            if is_there(folder) or (word.held and is_alive(path.with_name(f"{word.held}.alive")))
        }
        if len(data.splitlines()) == len(kept):
            return
        part = path.with_name(f".{JOURNAL_NAME}.{secrets.token_hex(4)}")
        try:
            with part.open("w") as rewritten:
                rewritten.writelines(format_word(*said) for said in kept.items())
                rewritten.flush()
                os.fsync(rewritten.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
