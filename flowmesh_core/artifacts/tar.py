"""Walks a folder and writes it as a tar whose bytes depend on content and names alone.

Source: POSIX.1-2001 pax, for long names, names beyond ASCII and files above 8 GiB.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Container
from pathlib import Path

import attrs

from flowmesh_core.errors import ArchiveError

__all__ = ["BLOCK_BYTES", "TarContent", "write_tar"]

BLOCK_BYTES = 1 << 20
_NO_TIME = b"\0%011o\0" % 0
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@attrs.frozen(kw_only=True)
class TarContent:
    """What went into a tar.

    Attributes:
        files: Number of regular files.
        size_bytes: Sum of their sizes.
        digests: SHA-256 of those that the caller asked for, by path below the folder.
    """

    files: int
    size_bytes: int
    digests: dict[str, str]


def write_tar(
    folder: Path, emit: Callable[[bytearray], None], *, top: str, hashed: Container[str] = ()
) -> TarContent:
    """Read each file of a folder once and hand out the tar in blocks.

    Names are sorted; owners and times are zero; modes are 0755 for folders and for what its owner
    may execute, 0644 for the rest. A link that leads inside the folder stays a link, a relative
    one.

    Args:
        folder: What to pack.
        emit: Gets blocks of ``BLOCK_BYTES``, the last one shorter, and may keep them.
        top: Name of the one folder at the top of the archive.
        hashed: Paths below the folder whose SHA-256 is wanted.

    Raises:
        ArchiveError: A link leads out or nowhere, something is no file, folder or link, or a file
            was cut short meanwhile.
        OSError: Something cannot be read.
    """
    writer = _Writer(folder=str(folder), root=os.path.realpath(folder), emit=emit, hashed=hashed)
    writer.add_folder("", top)
    writer.finish()
    return TarContent(files=writer.files, size_bytes=writer.size_bytes, digests=writer.digests)


@attrs.define(kw_only=True)
class _Writer:
    """Fills one block after the other; each begins as zeros, and so padding is left out."""

    folder: str
    root: str
    emit: Callable[[bytearray], None]
    hashed: Container[str]
    files: int = 0
    size_bytes: int = 0
    digests: dict[str, str] = attrs.field(factory=dict)
    _block: bytearray = attrs.field(factory=lambda: bytearray(BLOCK_BYTES))
    _used: int = 0
    _emitted_bytes: int = 0

    def add_folder(self, below: str, name: str) -> None:
        """Add a folder and all in it; ``below`` is its path on disk, ``name`` that in the tar."""
        self._put_header(name, tarfile.DIRTYPE, 0o755)
        for entry in _sorted_entries(f"{self.folder}/{below}"):
            inner = f"{below}/{entry.name}" if below else entry.name
            if entry.is_file(follow_symlinks=False):
                self._add_file(inner, f"{name}/{entry.name}")
            elif entry.is_symlink():
                self._add_link(inner, f"{name}/{entry.name}")
            elif entry.is_dir(follow_symlinks=False):
                self.add_folder(inner, f"{name}/{entry.name}")
            else:
                raise self._refused(inner, "is no file, folder or link; remove it")

    def _add_link(self, below: str, name: str) -> None:
        path = f"{self.root}/{below}"
        target = os.path.realpath(path)
        if target != self.root and not target.startswith(f"{self.root}/"):
            raise self._refused(below, "is a link that leads out of it; copy what it points to")
        if not os.path.exists(target):  # noqa: PTH110 - text, as the rest here
            raise self._refused(below, "is a link that leads nowhere; remove it")
        # Relative to where the link lies, so that it holds wherever the archive is unpacked.
        where = os.path.realpath(os.path.dirname(path))  # noqa: PTH120 - as above
        self._put_header(name, tarfile.SYMTYPE, 0o777, link=os.path.relpath(target, where))

    def _add_file(self, below: str, name: str) -> None:
        file = os.open(f"{self.folder}/{below}", _FLAGS)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise self._refused(below, "was replaced while it was packed")
            mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
            self._put_header(name, tarfile.REGTYPE, mode, status.st_size)
            self._pull(file, status.st_size, below)
        finally:
            os.close(file)
        self.files += 1
        self.size_bytes += status.st_size

    def _put_header(
        self, name: str, kind: bytes, mode: int, size_bytes: int = 0, link: str = ""
    ) -> None:
        self._put(
            _plain_header(name, kind, mode, size_bytes, link)
            or _header(name, kind, mode, size_bytes, link)
        )

    def _put(self, data: bytes) -> None:
        for start in range(0, len(data), tarfile.BLOCKSIZE):  # always whole ones
            record = data[start : start + tarfile.BLOCKSIZE]
            self._block[self._used : self._used + tarfile.BLOCKSIZE] = record
            self._advance(tarfile.BLOCKSIZE)

    def _pull(self, file: int, size_bytes: int, below: str) -> None:
        """Read a file straight into the block, and hash it if that is wanted."""
        digest = hashlib.sha256() if below in self.hashed else None
        left = size_bytes
        while left:
            end = min(BLOCK_BYTES, self._used + left)
            piece = memoryview(self._block)[self._used : end]
            count = os.readv(file, [piece])
            if not count:
                raise self._refused(below, f"was cut short by {left} bytes while it was packed")
            if digest:
                digest.update(piece[:count])
            left -= count
            self._advance(count if left else count + -size_bytes % tarfile.BLOCKSIZE)
        if digest:
            self.digests[below] = digest.hexdigest()

    def _advance(self, count: int) -> None:
        self._used += count
        if self._used == BLOCK_BYTES:
            self.emit(self._block)
            self._emitted_bytes += BLOCK_BYTES
            self._block, self._used = bytearray(BLOCK_BYTES), 0

    def finish(self) -> None:
        """Write the end of the archive and hand out what is left."""
        ended = self._emitted_bytes + self._used + 2 * tarfile.BLOCKSIZE
        self._put(bytes(2 * tarfile.BLOCKSIZE + -ended % tarfile.RECORDSIZE))
        if self._used:
            self.emit(self._block[: self._used])

    def _refused(self, below: str, reason: str) -> ArchiveError:
        return ArchiveError(f"{self.folder} cannot be packed: {below!r} {reason}")


def _header(name: str, kind: bytes, mode: int, size_bytes: int, link: str) -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.mode, header.size, header.linkname = kind, mode, size_bytes, link
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _plain_header(name: str, kind: bytes, mode: int, size_bytes: int, link: str) -> bytes:
    """Return the same as ``_header``, sooner, or nothing when it takes more than this.

    Folders of many small files spend most of their time here.
    """
    if kind == tarfile.DIRTYPE:
        name += "/"
    if not name.isascii() or len(name) > tarfile.LENGTH_NAME or link or size_bytes >> 33:
        return b""
    start, sum_of_rest, rest = _frame(kind, mode)
    path, size = name.encode(), b"%011o" % size_bytes
    checksum = sum(path) + sum(size) + sum_of_rest
    return b"%b%b%b%b%06o%b" % (path.ljust(100, b"\0"), start, size, _NO_TIME, checksum, rest)


@functools.cache
def _frame(kind: bytes, mode: int) -> tuple[bytes, int, bytes]:
    """Return what headers of a kind and mode share, and the sum of its bytes."""
    start = b"%07o\0%b" % (mode, b"0000000\0" * 2)
    rest = kind + bytes(100) + b"ustar\x0000" + bytes(247)
    # The field of the checksum counts as eight spaces.
    return start, sum(start + _NO_TIME + b" " * 8 + rest), b"\0 " + rest


def _sorted_entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
