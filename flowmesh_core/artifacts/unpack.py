"""Unpacks tar and zip archives from strangers.

Nothing is written outside the new folder, whatever an archive holds: names that climb, links that
lead out, devices and bombs are refused on every Python alike. The folder appears when it is whole.
"""

from __future__ import annotations

import bz2
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import attrs
from isal import igzip, igzip_lib

from flowmesh_core.errors import ArchiveError

__all__ = ["UnpackLimits", "archive_kind", "unpack"]

_FORMATS = {
    "auto": ("tar", "zip"),
    "zip": ("zip",),
    **dict.fromkeys(("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"), ("tar",)),
}
_UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, NotImplementedError, RuntimeError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    cast("type[Exception]", igzip_lib.IsalError),
)
_OPENERS: Mapping[bytes, Callable[[Path, str], Any]] = {
    b"\x1f\x8b": igzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_BLOCK = 512
_CHUNK = 1 << 20
_LARGEST_READ = 16 << 20


@attrs.frozen(kw_only=True)
class UnpackLimits:
    """What an archive may hold.

    Attributes:
        max_members: Files, folders and links.
        max_bytes: Sum of the sizes of all files.
        max_ratio: That sum over the archive's size, once it passes ``ratio_from_bytes``.
    """

    max_members: int = 100_000
    max_bytes: int = 2 << 40
    max_ratio: int = 200
    ratio_from_bytes: int = 256 << 20


def archive_kind(path: Path) -> str:
    """Return ``tar``, ``zip`` or nothing, by content and not by name.

    Saved PyTorch weights are zip files too, but not archives to be unpacked.
    """
    try:
        with _decompressed(path) as stream:
            tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
        return "tar"
    except _UNREADABLE:
        return "zip" if _is_zip(path) else ""


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return False
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _UNREADABLE:
        return False
    return not any(name.rpartition("/")[2] == "data.pkl" for name in names)


def _decompressed(path: Path) -> IO[bytes]:
    """Open a file, undoing its compression."""
    with path.open("rb") as file:
        magic = file.read(6)
    opener = next((o for start, o in _OPENERS.items() if magic.startswith(start)), Path.open)
    return cast("IO[bytes]", opener(path, "rb"))


def unpack(
    archive: Path, folder: Path, archive_format: str = "auto", *, limits: UnpackLimits
) -> Path:
    """Unpack into a new folder.

    Args:
        archive: A tar, plain or compressed with gzip, bzip2 or xz, or a zip.
        folder: Must not exist, or be empty.
        archive_format: ``auto``, or what the archive must be.
        limits: What it may hold.

    Raises:
        ArchiveError: It is not safe, not whole, or no archive of that format.
    """
    if archive_format not in _FORMATS:
        raise ArchiveError(
            f"archive_format must be one of {', '.join(_FORMATS)}, got {archive_format!r}"
        )
    kind = archive_kind(archive)
    if kind not in _FORMATS[archive_format]:
        raise ArchiveError(
            f"{archive} must be an archive of format {archive_format}, got {kind or 'no archive'}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder.parent)).resolve()
    try:
        sink = _Sink(root=scratch, archive=archive, limits=limits)
        (_unpack_tar if kind == "tar" else _unpack_zip)(archive, sink)
        sink.verify_links()
        scratch.chmod(0o755)
        scratch.replace(folder)
    except _UNREADABLE as exc:
        raise ArchiveError(f"{archive} cannot be unpacked: {exc}") from exc
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@attrs.define(kw_only=True)
class _Sink:
    """Writes members below ``root`` and refuses the others."""

    root: Path
    archive: Path
    limits: UnpackLimits
    members: int = 0
    total_bytes: int = 0
    links: list[Path] = attrs.field(factory=list)

    def folder(self, name: str) -> None:
        path = self._place(name)
        if path != self.root:
            path.mkdir(exist_ok=True)

    def file(self, name: str, size_bytes: int, content: IO[bytes], *, executable: bool) -> None:
        path = self._place(name)
        self._weigh(name, size_bytes)
        written = 0
        # Mode x follows no link and replaces nothing.
        with path.open("xb") as file:
            while chunk := content.read(min(_CHUNK, size_bytes - written + 1)):
                written += file.write(chunk)
                if written > size_bytes:
                    break
        if written != size_bytes:
            raise self._refused(name, f"must have {size_bytes} bytes, has {written}")
        if executable:
            path.chmod(0o755)

    def link(self, name: str, target: str) -> None:
        path = self._place(name)
        path.symlink_to(target)
        self.links.append(path)

    def hard_link(self, name: str, target: str) -> None:
        path = self._place(name)
        source = self._inside(target)
        if not source.is_file() or source.is_symlink():
            raise self._refused(name, f"links to {target!r}, which is no earlier file")
        path.hardlink_to(source)

    def refuse(self, name: str, reason: str) -> None:
        raise self._refused(name, reason)

    def verify_links(self) -> None:
        """Follow every link once all of them exist: a later one may bend where it leads."""
        for link in self.links:
            if not link.resolve().is_relative_to(self.root):
                raise self._refused(str(link.relative_to(self.root)), "links out of the archive")

    def _refused(self, name: str, reason: str) -> ArchiveError:
        return ArchiveError(f"{self.archive}: member {name!r} {reason}")

    def _place(self, name: str) -> Path:
        """Count a member and return its path, with the folders above it made."""
        self.members += 1
        if self.members > self.limits.max_members:
            raise self._refused(name, f"is one more than {self.limits.max_members}, the limit")
        path = self._inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _inside(self, name: str) -> Path:
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or "\0" in name:
            raise self._refused(name, "lies outside the archive")
        path = self.root / plain
        if path != self.root and path.parent.resolve() != path.parent:
            raise self._refused(name, "lies behind a link")
        return path

    def _weigh(self, name: str, size_bytes: int) -> None:
        self.total_bytes += size_bytes
        if self.total_bytes > self.limits.max_bytes:
            raise self._refused(name, f"takes the sum of sizes above {self.limits.max_bytes} bytes")
        packed_bytes = max(self.archive.stat().st_size, 1)
        if (
            self.total_bytes > self.limits.ratio_from_bytes
            and self.total_bytes > self.limits.max_ratio * packed_bytes
        ):
            raise self._refused(
                name, f"unpacks to more than {self.limits.max_ratio} times the archive's size"
            )


@attrs.define
class _Guard:
    """Passes reads on, unless a forged header wants a whole bomb in memory at once."""

    stream: IO[bytes]

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_READ:
            raise ArchiveError(f"a header of {size} bytes is larger than any real one")
        return self.stream.read(size)

    def seek(self, offset: int) -> int:
        return self.stream.seek(offset)

    def tell(self) -> int:
        return self.stream.tell()


def _unpack_tar(path: Path, sink: _Sink) -> None:
    with (
        _decompressed(path) as stream,
        tarfile.open(fileobj=cast("IO[bytes]", _Guard(stream)), mode="r:") as archive,
    ):
        for member in archive:
            _add_tar_member(archive, member, sink)
        # The checksum stands at the very end, behind what tar itself reads.
        if len(stream.read(_LARGEST_READ)) == _LARGEST_READ:
            raise ArchiveError(f"{path}: more than {_LARGEST_READ} bytes follow the end of the tar")


def _add_tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, sink: _Sink) -> None:
    second_opinion = getattr(tarfile, "data_filter", None)  # from 3.10.12, 3.11.4, 3.12 on
    if second_opinion is not None:
        second_opinion(member, str(sink.root))
    if member.isdir():
        sink.folder(member.name)
    elif member.issym():
        sink.link(member.name, member.linkname)
    elif member.islnk():
        sink.hard_link(member.name, member.linkname)
    elif member.isreg():
        content = archive.extractfile(member)
        executable = bool(member.mode & stat.S_IXUSR)
        sink.file(member.name, member.size, cast("IO[bytes]", content), executable=executable)
    else:
        sink.refuse(member.name, "must be a file, a folder or a link")


def _unpack_zip(path: Path, sink: _Sink) -> None:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.filename.endswith("/"):
                sink.folder(info.filename)
            elif kind not in (0, stat.S_IFREG):
                sink.refuse(info.filename, "must be a file or a folder")
            else:
                with archive.open(info) as content:
                    sink.file(info.filename, info.file_size, content, executable=False)
