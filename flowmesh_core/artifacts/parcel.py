"""A file on its way to a store, which may be read while it is still being written."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

__all__ = ["Parcel", "Receipt"]

_READ_BYTES = 1 << 20


@attrs.frozen(kw_only=True)
class Receipt:
    """What a store says about a file that it took.

    Attributes:
        told: What the result tells about it: ``url`` and ``download_url`` at least.
        verified: The store was asked for the file and gave back the very same bytes.
    """

    told: Mapping[str, Any]
    verified: bool = False


def _ignore(_sent_bytes: int) -> None:
    """Stand in for a callback that nobody listens to."""


class Parcel:
    """One file for one store. Made and read on the event loop; grown from any thread.

    Args:
        task_id: Whose file it is.
        path: Where the file lies now.
        final: Where it will lie once the task is committed.
        growing: It is still being written: readers wait until ``seal``.
        on_sent: Told how many bytes have been sent, from the start again at each new try.

    Attributes:
        sha256: Of the whole file; empty until it is known: when a growing file is sealed, and for
            any other when it has been read once.
    """

    def __init__(
        self,
        task_id: str,
        path: Path,
        final: Path,
        *,
        growing: bool = False,
        on_sent: Callable[[int], None] = _ignore,
    ) -> None:
        self.task_id = task_id
        self.path = path
        self.final = final
        self.on_sent = on_sent
        self.sha256 = ""
        self._growing = growing
        self._there_bytes = 0 if growing else path.stat().st_size
        self._failure: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    @property
    def size_bytes(self) -> int | None:
        """Size of the whole file; None while it grows."""
        return None if self._growing else self._there_bytes

    def grow(self, size_bytes: int) -> None:
        """Let readers read this far.

        Raises:
            RuntimeError: The event loop has ended, or the file was given up.
        """
        if self._failure is not None:
            raise RuntimeError(f"{self.path} was given up") from self._failure
        self._loop.call_soon_threadsafe(self._set_size, size_bytes)

    def _set_size(self, size_bytes: int) -> None:
        self._there_bytes = size_bytes
        self._news.set()

    def seal(self, size_bytes: int, sha256: str) -> None:
        """Say that a growing file is whole."""
        self.sha256 = sha256
        self._growing = False
        self._set_size(size_bytes)

    def give_up(self, failure: BaseException) -> None:
        """Say that a growing file will never be whole; readers get the failure."""
        if self._growing:
            self._failure = failure
            self._news.set()

    async def whole(self) -> None:
        """Wait until the file is whole."""
        while self._growing:
            await self._hear()

    async def _hear(self) -> None:
        """Wait for news, or raise what ended the file."""
        if self._failure is not None:
            raise self._failure
        await self._news.wait()
        self._news.clear()

    async def blocks(self, most_bytes: int = 1 << 18) -> AsyncIterator[bytes]:
        """Read the file from its start to its end, in blocks of ``most_bytes`` or less.

        Raises:
            OSError: It cannot be read.
        """
        digest = None if self._growing or self.sha256 else hashlib.sha256()
        read_bytes = 0
        while self._growing and not self._there_bytes:
            await self._hear()  # the file is made with its first bytes
        with self.path.open("rb", buffering=0) as file:
            while not (read_bytes == self._there_bytes and not self._growing):
                if read_bytes == self._there_bytes:
                    await self._hear()
                    continue
                wanted = min(_READ_BYTES, self._there_bytes - read_bytes)
                data = await asyncio.to_thread(file.read, wanted)
                if not data:
                    raise OSError(f"{self.path} was cut short while it was read")
                read_bytes += len(data)
                if digest:
                    digest.update(data)
                for start in range(0, len(data), most_bytes):
                    yield data[start : start + most_bytes]
        if digest:
            self.sha256 = digest.hexdigest()
