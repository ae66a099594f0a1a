"""What all workers of a results folder hold and have reported, read from their journals."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import secrets
import stat
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
        self._said: dict[Path, dict[str, Word]] = {}

    @property
    def folders(self) -> set[str]:
        """Every folder of which something was said, as ``folder_key`` has it."""
        return {key for words in self._said.values() for key in words}

    def refresh(self) -> None:
        """Read what has been said until now.

        Raises:
            OSError: A journal cannot be read.
        """
        self._said = {worker: _read(worker / JOURNAL_NAME) for worker in self._list_folders()}

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no worker that lives say more for a moment, and read what was said until then.

        Raises:
            OSError: A journal cannot be read, or its writer not be kept from writing.
        """
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

    @property
    def has_living(self) -> bool:
        """Whether any worker of this folder lives."""
        return any(begun_at < math.inf for _, begun_at in self.list_workers())

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
        for worker, words in self._said.items():
            if (word := words.get(folder)) is not None:
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


def _read(path: Path) -> dict[str, Word]:
    """Return what a journal says, by folder; all of it, as another may have taken its place."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.ELOOP):
            raise  # somebody may hold something
        return {}  # none, or a link, in which nothing counts
    with os.fdopen(handle, "rb") as file:
        return dict(parse_words(file.read()))


def _compact(path: Path, is_there: Callable[[str], bool]) -> None:
    """Rewrite a journal, for which its writers wait; in place of it by one rename.

    Raises:
        OSError: It cannot be written, or not be left to the user to whom it belongs.
    """
    with locked(path.parent, required=True):
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            data, status = file.read(), os.fstat(file.fileno())
        kept = {
            folder: word
            for folder, word in dict(parse_words(data)).items()
            if is_there(folder) or (word.held and is_alive(path.with_name(f"{word.held}.alive")))
        }
        if sum(map(bool, data.splitlines())) == len(kept):
            return
        part = path.with_name(f".{JOURNAL_NAME}.{secrets.token_hex(4)}")
        try:
            with part.open("x") as rewritten:
                _hand_over(rewritten.fileno(), status)
                rewritten.writelines(format_word(*said) for said in kept.items())
                rewritten.flush()
                os.fsync(rewritten.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _hand_over(handle: int, old: os.stat_result) -> None:
    """Give a file the owner and mode of the one it replaces: its worker must go on writing it."""
    new = os.fstat(handle)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))
