"""What each worker holds and has reported, on disk: the ground on which old folders are removed.

``<results>/.workers/<worker id>/reported.jsonl`` gets a line whenever something is to be said of a
task's folder, whose name is the task's id; the last line about a folder holds::

    {"folder": "t1", "at": 1767225600.5, "held": "5c1f"}   taken by the process with this mark
    {"folder": "t1", "at": 1767225603.1}                   its last event has reached somebody
    {"folder": "t1", "at": 1767225603.1, "held": ""}       let go without that

A process lives as long as its mark, the file ``<mark>.alive`` beside the journal, is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import attrs

from flowmesh_core.errors import ArtifactError

__all__ = [
    "JOURNAL_NAME",
    "Hold",
    "Journal",
    "Word",
    "folder_key",
    "format_word",
    "is_alive",
    "locked",
    "parse_words",
]

JOURNAL_NAME = "reported.jsonl"
_log = logging.getLogger(__name__)
_MARK = re.compile(r"[0-9a-f]*")
_LOCK_NAME = "reported.lock"
_GATHER_S = 0.1
_PAUSE_S = 5.0


@attrs.frozen(eq=False)
class Hold:
    """The tasks of one dispatch, each with its folder."""

    folders: Mapping[str, Path]


@attrs.frozen
class Word:
    """What was last said of a folder; ``held`` is None when it was reported."""

    at: float
    held: str | None = None


class Journal:
    """Writes what one worker process holds and has reported.

    A thread writes, within a tenth of a second and many words at once: a slow disk holds up
    neither tasks nor events. Holding and settling are for any thread.

    Args:
        root: The results folder.
        folder: The worker's own folder, which exists.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._path = folder / JOURNAL_NAME
        self._mark = folder / f"{secrets.token_hex(8)}.alive"
        self._mark_lock = -1
        self._lock = threading.Lock()
        self._held: dict[Path, Hold] = {}
        self._news: dict[Path, Word] = {}
        self._writing = threading.Lock()
        self._waiting = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowmesh-journal", daemon=True)

    def open(self) -> None:
        """Say that this process lives, and begin to write.

        Raises:
            ArtifactError: The worker's folder cannot be written.
        """
        part = self._mark.with_name(f".{self._mark.name}")
        try:
            # The lock first: nobody else makes it, under a user who would lock this one out.
            with locked(self._mark.parent, create=True):
                self._mark_lock = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                with contextlib.suppress(OSError):  # nobody can tell there, so all count as living
                    fcntl.flock(self._mark_lock, fcntl.LOCK_EX)
                part.rename(self._mark)  # so that it is never seen without its lock
        except OSError as exc:
            raise ArtifactError(f"{self._mark.parent} cannot be written: {exc}") from exc
        self._thread.start()

    def hold(self, folders: Mapping[str, Path]) -> Hold:
        """Keep the tasks' folders from being removed while this process lives."""
        hold = Hold(folders)
        word = Word(time.time(), self._mark.stem)
        with self._lock:
            for folder in folders.values():
                self._held[folder] = hold
                self._news[folder] = word
        self._waiting.set()
        return hold

    def settle(self, hold: Hold, reported: Collection[str]) -> None:
        """Let go of a hold.

        A folder that was held again meanwhile stays held: another run has begun in it.

        Args:
            hold: From ``hold``, or one that was never held and of which only reports count.
            reported: Ids of the tasks whose last event has left.
        """
        at = time.time()
        with self._lock:
            for task_id, folder in hold.folders.items():
                if (holding := self._held.get(folder)) not in (hold, None):
                    continue
                if holding or task_id in reported:
                    self._held.pop(folder, None)
                    self._news[folder] = Word(at, None if task_id in reported else "")
        self._waiting.set()

    def flush(self) -> bool:
        """Write what was said so far; return whether that was possible."""
        with self._writing:
            with self._lock:
                news, self._news = self._news, {}
            try:
                if news:
                    _append(self._path, "".join(self._line(*said) for said in news.items()))
            except OSError as exc:
                _log.warning("%s cannot be written, trying again: %s", self._path, exc)
                with self._lock:
                    self._news = {**news, **self._news}
                return False
        return True

    def _line(self, folder: Path, word: Word) -> str:
        simple = folder.parent == self._root
        return format_word(folder.name if simple else folder_key(self._root, folder), word)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._waiting.wait()
            self._closing.wait(_GATHER_S)
            self._waiting.clear()
            if not self.flush():
                self._closing.wait(_PAUSE_S)
                self._waiting.set()

    def close(self) -> None:
        """Write the rest, and say that this process lives no more; may come twice."""
        self._closing.set()
        self._waiting.set()
        if self._thread.is_alive():
            self._thread.join(_PAUSE_S)
        if self._thread.is_alive():
            _log.error("%s takes too long to write; its end is lost", self._path)
        else:
            self.flush()
        if self._mark_lock >= 0:
            self._mark.unlink(missing_ok=True)
            os.close(self._mark_lock)
            self._mark_lock = -1


def folder_key(root: Path, folder: Path) -> str:
    """Return a folder as journals have it: without links, below the root relative to it."""
    real = Path(os.path.realpath(folder.parent), folder.name)
    try:
        return str(real.relative_to(os.path.realpath(root)))
    except ValueError:
        return str(real)


def is_alive(mark: Path) -> bool:
    """Whether the process of a mark lives, as far as can be told."""
    try:
        handle = os.open(mark, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # locked, or a file system that knows no locks
        return True
    else:
        return False
    finally:
        os.close(handle)


def format_word(folder: str, word: Word) -> str:
    """Return the line of a journal."""
    held = {} if word.held is None else {"held": word.held}
    return json.dumps({"folder": folder, "at": round(word.at, 6), **held}) + "\n"


def parse_words(data: bytes) -> Iterator[tuple[str, Word]]:
    """Read whole lines; one that was cut short by a crash says nothing."""
    for line in data.splitlines():
        try:
            said = json.loads(line)
            folder, at, held = said["folder"], float(said["at"]), said.get("held")
            if "\0" not in folder and (held is None or _MARK.fullmatch(held)):
                yield folder, Word(at, held)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            continue


@contextlib.contextmanager
def locked(folder: Path, *, create: bool = False, required: bool = False) -> Iterator[None]:
    """Let nobody else write the journal in a worker's folder.

    Args:
        folder: The worker's.
        create: Make the file to be locked: for the worker alone, to which it must belong.
        required: It is an error if there are no locks.

    Raises:
        OSError: The file to be locked is not there or cannot be written.
    """
    # A file of its own: the journal may be replaced by another one while somebody waits.
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    handle = os.open(folder / _LOCK_NAME, flags, 0o644)
    try:
        with contextlib.nullcontext() if required else contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _append(path: Path, text: str) -> None:
    # A line that a crash cut short must not swallow the first of these.
    view = memoryview(f"\n{text}".encode())
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with locked(path.parent, create=True):
        handle = os.open(path, flags, 0o644)
        try:
            while view:
                view = view[os.write(handle, view) :]
        finally:
            os.close(handle)
