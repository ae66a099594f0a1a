"""gzip in blocks: each is compressed on its own, several at once, and joined in order.

The bytes depend on content and level alone, not on the number of threads. Blocks that would not
shrink are stored as they are. Source: RFC 1951 (blocks may be joined where they end on a byte),
RFC 1952 (header and trailer).
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from isal import isal_zlib

__all__ = ["Compressor", "IsalGzip"]

_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # no name, no time, unknown system
_END = b"\x03\x00"  # an empty last block
_HIGHEST_LEVEL = 3
_LONGEST_STORED = 0xFFFF
_SAMPLES, _SAMPLE_BYTES = 3, 8192
_WORTH_IT = 0.97
_TEXT = 0.5
_MOST_THREADS = 4


class Compressor(Protocol):
    """What turns blocks into a gzip file, handed on piece by piece."""

    def write(self, block: bytearray) -> None:
        """Take the next block; the caller must not touch it again."""

    def finish(self) -> None:
        """Hand on the rest, the end included."""

    def close(self) -> None:
        """Free threads and processes; comes always, also after a failure."""


class IsalGzip:
    """gzip with ISA-L.

    Args:
        sink: Gets the pieces in order, on the caller's thread.
        level: 0 stores, 1 is the fastest; above 3 is as 3, the highest that ISA-L has. None takes 3
            for a block that shrinks by half, which is text and not weights, and 1 for another.
        threads: How many compress; by default one for each core that this process may use, at
            most 4.
    """

    def __init__(
        self, sink: Callable[[bytes], None], *, level: int | None = None, threads: int | None = None
    ) -> None:
        self._sink = sink
        self._level = None if level is None else min(level, _HIGHEST_LEVEL)
        count = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="gzip")
        self._most_waiting = count + 2
        self._waiting: deque[Future[bytes]] = deque()
        self._crc = 0
        self._size_bytes = 0
        sink(_HEADER)

    def write(self, block: bytearray) -> None:
        """Queue a block; waits while too many are on their way."""
        self._crc = isal_zlib.crc32(block, self._crc)
        self._size_bytes += len(block)
        self._waiting.append(self._pool.submit(_deflate, block, self._level))
        while len(self._waiting) > self._most_waiting:
            self._sink(self._waiting.popleft().result())

    def finish(self) -> None:
        """Hand on what is on its way, then the end."""
        while self._waiting:
            self._sink(self._waiting.popleft().result())
        self._sink(_END + struct.pack("<II", self._crc, self._size_bytes & 0xFFFFFFFF))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def _deflate(block: bytearray, level: int | None) -> bytes:
    """Return deflate blocks that end on a byte and are no longer than stored ones."""
    ratio = 1.0 if level == 0 else _guess_ratio(block)
    if ratio < _WORTH_IT:
        if level is None:
            level = _HIGHEST_LEVEL if ratio < _TEXT else 1
        packed = _squeeze(block, level)
        if len(packed) < len(block):
            return packed
    return _store(block)


def _squeeze(block: bytearray | memoryview, level: int) -> bytes:
    squeezer = isal_zlib.compressobj(level, isal_zlib.DEFLATED, -15)
    packed: bytes = squeezer.compress(block) + squeezer.flush(isal_zlib.Z_SYNC_FLUSH)
    return packed


def _guess_ratio(block: bytearray) -> float:
    """Tell from a few samples how far a block will shrink; a short one is worth its time anyway."""
    step = (len(block) - _SAMPLE_BYTES) // (_SAMPLES - 1)
    if step < _SAMPLE_BYTES:
        return 0.0
    view = memoryview(block)
    samples = (view[i * step : i * step + _SAMPLE_BYTES] for i in range(_SAMPLES))
    return sum(len(_squeeze(sample, 1)) for sample in samples) / (_SAMPLES * _SAMPLE_BYTES)


def _store(block: bytearray) -> bytes:
    pieces: list[bytes | memoryview] = []
    for start in range(0, len(block), _LONGEST_STORED):
        piece = memoryview(block)[start : start + _LONGEST_STORED]
        pieces += [struct.pack("<BHH", 0, len(piece), len(piece) ^ 0xFFFF), piece]
    return b"".join(pieces)
