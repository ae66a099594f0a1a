"""Packs a folder in one pass: walk, tar, gzip, SHA-256, with the file growing for its readers.

The same folder gives the same bytes. Memory does not grow with the folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import attrs

from flowmesh_core.artifacts.compression import Compressor, IsalGzip
from flowmesh_core.artifacts.pigz import PigzGzip, PigzOptions
from flowmesh_core.artifacts.tar import write_tar
from flowmesh_core.config import Settings
from flowmesh_core.errors import ArchiveError

__all__ = ["PackOptions", "Packed", "pack"]

_log = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class PackOptions:
    """How to compress.

    Attributes:
        level: 0 stores; 1 is the fastest; None chooses for each block.
        threads: How many compress; None takes what the process may use, at most 4.
        pigz: Compress with pigz instead, if it is installed.
        fsync: Write the archive through to the disk.
    """

    level: int | None = None
    threads: int | None = None
    pigz: PigzOptions | None = None
    fsync: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> PackOptions:
        """Read the operator's ``MODEL_ARCHIVE_*``."""
        level = settings.archive_level
        pigz = PigzOptions(
            program=settings.archive_pigz_bin, level=level, threads=settings.archive_pigz_threads
        )
        return cls(
            level=level,
            pigz=pigz if settings.archive_use_pigz else None,
            fsync=settings.fsync,
        )


@attrs.frozen(kw_only=True)
class Packed:
    """An archive that is whole.

    Attributes:
        size_bytes: Of the archive.
        sha256: Of the archive.
        content_bytes: Sum of the files in it.
        files: Their number.
        digests: SHA-256 of the files that were asked for, by path below the folder.
    """

    size_bytes: int
    sha256: str
    content_bytes: int
    files: int
    digests: Mapping[str, str]


def _ignore(_size_bytes: int) -> None:
    """Stand in for a callback that nobody listens to."""


def pack(
    folder: Path,
    archive: Path,
    *,
    options: PackOptions | None = None,
    hashed: Container[str] = (),
    on_growth: Callable[[int], None] = _ignore,
) -> Packed:
    """Write a folder as ``.tar.gz`` with one folder of the same name at its top.

    Args:
        folder: What to pack; see ``write_tar`` for what it may hold.
        archive: Where to; replaced if it is there, gone if this fails.
        options: How to compress.
        hashed: Paths below the folder whose SHA-256 is wanted.
        on_growth: Called with the size in bytes each time that more can be read from the archive,
            on any thread. What it raises ends the packing.

    Raises:
        ArchiveError: The folder cannot be packed, or the archive not written.
    """
    options = options or PackOptions()
    if not folder.is_dir():
        raise ArchiveError(f"{folder} must be a folder to be packed")
    try:
        with archive.open("wb", buffering=0) as file:
            sink = _Sink(file.write, on_growth)
            compressor = _open_compressor(sink.write, options)
            try:
                content = write_tar(folder, compressor.write, top=folder.name, hashed=hashed)
                compressor.finish()
            finally:
                compressor.close()
            if options.fsync:
                os.fsync(file.fileno())
    except BaseException as exc:
        archive.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise ArchiveError(f"{folder} cannot be packed: {exc}", retriable=True) from exc
        raise
    return Packed(
        size_bytes=sink.size_bytes,
        sha256=sink.digest.hexdigest(),
        content_bytes=content.size_bytes,
        files=content.files,
        digests=content.digests,
    )


class _Sink:
    """Writes, hashes and counts."""

    def __init__(
        self, write: Callable[[memoryview], int | None], on_growth: Callable[[int], None]
    ) -> None:
        self._write = write
        self._on_growth = on_growth
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # a disk that is nearly full takes less than it was given
            view = view[self._write(view) or 0 :]
        self.digest.update(data)
        self.size_bytes += len(data)
        self._on_growth(self.size_bytes)


def _open_compressor(sink: Callable[[bytes], None], options: PackOptions) -> Compressor:
    if options.pigz:
        if options.pigz.is_there:
            return PigzGzip(sink, options.pigz)
        _log.warning(
            "MODEL_ARCHIVE_USE_PIGZ is on, but %s is not installed; packing without it",
            options.pigz.program,
        )
    return IsalGzip(sink, level=options.level, threads=options.threads)
