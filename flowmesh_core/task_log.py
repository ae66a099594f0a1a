"""A task's ``logs/``: what its process prints and what is said of it, on disk and on the bus.

Whatever the disk does, nothing raises into the task: a log that cannot be written is lost, once
with a warning, and the job goes on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from flowmesh_core.events import LOG_CHUNK_BYTES, whole_characters
from flowmesh_core.masking import SecretMask
from flowmesh_core.wire import utc_now

__all__ = ["OpenFolder", "TaskLog"]

_log = logging.getLogger(__name__)
_ENDED = b"\n[flowmesh] the log ends here, at FLOWMESH_TASK_LOG_MAX_BYTES; the job goes on\n"

# Stream (``stdout``, ``stderr``, ``task``), offset in its file, bytes as written there.
Publish = Callable[[str, int, bytes], None]


class OpenFolder:
    """Appends to files of one folder, also after it was renamed; one thread at a time.

    Args:
        folder: Must exist by now. Files appear with their first byte.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, int] = {}
        self._complained = False
        self._handle = -1
        try:
            self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as exc:
            self._complain(exc)

    def append(self, name: str, data: bytes) -> int:
        """Return how many of the bytes were written; all of them unless the disk refused."""
        left = memoryview(data)
        try:
            handle = self._handles.get(name)
            if handle is None:
                handle = self._handles[name] = self._open(name)
            while left:
                left = left[os.write(handle, left) :]
        except OSError as exc:
            self._complain(exc)
        return len(data) - len(left)

    def size(self, name: str) -> int:
        """Return the size in bytes of what is there already."""
        try:
            return os.stat(name, dir_fd=self._handle, follow_symlinks=False).st_size
        except OSError:
            return 0

    def close(self) -> None:
        """Close every file; may come twice, and nothing is appended afterwards."""
        handles = [handle for handle in (self._handle, *self._handles.values()) if handle >= 0]
        self._handle = -1
        self._handles.clear()
        for handle in handles:
            os.close(handle)

    def _open(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        return os.open(name, flags, 0o644, dir_fd=self._handle)

    def _complain(self, exc: OSError) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("%s: cannot be written, what follows may be lost: %s", self._folder, exc)


class _LogFile:
    """One file of ``logs/`` and how much of it was published."""

    def __init__(self, stream: str, folder: OpenFolder, publish: Publish, max_bytes: int) -> None:
        self.held = b""
        self.dropped = 0
        self._stream = stream
        self._name = f"{stream}.log"
        self._folder = folder
        self._publish = publish
        self._offset = folder.size(self._name)
        self._room = max(0, max_bytes - len(_ENDED) - self._offset)
        self._full = False
        self._unsaid = b""

    def add(self, data: bytes) -> None:
        """Append and publish; what does not fit is counted."""
        if self._full:
            self.dropped += len(data)
            return
        if len(data) > self._room:
            kept = data[: self._room]
            self.dropped += len(data) - len(kept)
            self._full = True
            data = kept + _ENDED
        written = self._folder.append(self._name, data)
        self.dropped += len(data) - written
        self._room -= written
        self._say(data[:written])

    def _say(self, data: bytes) -> None:
        """Publish whole characters; the first bytes of one wait for the others."""
        data = self._unsaid + data
        start = 0
        while size := whole_characters(piece := data[start : start + LOG_CHUNK_BYTES]):
            self._publish(self._stream, self._offset, piece[:size])
            self._offset += size
            start += size
        self._unsaid = data[start:]

    def finish(self) -> None:
        """Publish what waited."""
        if self._unsaid:
            self._publish(self._stream, self._offset, self._unsaid)
            self._unsaid = b""


class TaskLog:
    """The files of a task's ``logs/`` and what is published of them; for any thread.

    Args:
        folder: The attempt's folder, in which ``logs/`` exists. It may be renamed later.
        mask: Returns the secrets that are known by now; their values never reach a file.
        publish: Gets stream, offset and at most 64 KiB, in order; must neither block nor raise.
        max_bytes: Size at which each file ends.
    """

    def __init__(
        self, folder: Path, *, mask: Callable[[], SecretMask], publish: Publish, max_bytes: int
    ) -> None:
        self._mask = mask
        self._publish = publish
        self._max_bytes = max_bytes
        self._path = folder
        self._folder = OpenFolder(folder / "logs")
        self._files: dict[str, _LogFile] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def dropped(self) -> int:
        """Bytes that found no room in a file."""
        with self._lock:
            return sum(file.dropped for file in self._files.values())

    def write(self, stream: str, data: bytes) -> None:
        """Append to ``logs/<stream>.log`` what a process printed, however it was cut.

        The end of the data waits for the next call, or for ``close``, when a secret may begin
        there.

        Args:
            stream: ``stdout`` or ``stderr``.
            data: Raw bytes.
        """
        with self._lock:
            if self._closed:
                return
            file = self._file(stream)
            masked, file.held = self._mask().split(file.held + data)
            if masked:
                file.add(masked)

    def masked(self, text: str) -> str:
        """Return a text without the secrets that are known by now."""
        return self._mask().text(text)

    def line(self, level: str, message: str) -> None:
        """Append one line with time and level to ``logs/task.log``."""
        text = f"{utc_now()} {level.upper()} {self._mask().text(message)}\n"
        with self._lock:
            if not self._closed:
                self._file("task").add(text.encode(errors="backslashreplace"))

    def _file(self, stream: str) -> _LogFile:
        file = self._files.get(stream)
        if file is None:
            if stream not in ("stdout", "stderr", "task"):
                raise ValueError(f"stream must be stdout or stderr, got {stream!r}")
            file = _LogFile(stream, self._folder, self._publish, self._max_bytes)
            self._files[stream] = file
        return file

    def close(self) -> None:
        """Write what waited and free the files; what comes later is dropped without a word."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for file in self._files.values():
                if file.held:
                    file.add(self._mask().data(file.held))
                file.finish()
            self._folder.close()
        if self.dropped:
            _log.info("%s: %d bytes of logs were dropped", self._path, self.dropped)
