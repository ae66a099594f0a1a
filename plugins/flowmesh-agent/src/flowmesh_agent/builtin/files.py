"""``files``: read, write, change, list and search the files of the item's folder, and no others.

Every part of a path is opened from the folder above it and never through a link, so that nothing
that a program does in the meantime leads out of the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from flowmesh_agent.sandbox import FOLDER_FILES
from flowmesh_agent.tools import Tool, ToolContext, ToolError

__all__ = [
    "EditFileTool",
    "ListFilesTool",
    "ReadFileTool",
    "SearchFilesTool",
    "WriteFileTool",
    "file_tools",
]

T = TypeVar("T")
ArgumentsT = TypeVar("ArgumentsT", bound=BaseModel)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would make it wait
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEXT_BYTES = 8 * 2**20  # of a file that is read whole, or of the part of one that is
_SEARCHED_BYTES = 64 * 2**20
_DEPTH, _ENTRIES, _LISTED, _FOUND, _LINE_CHARS = 32, 10_000, 1000, 200, 300
_REASONS = {
    errno.ELOOP: "is a link, and links are not followed",
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "leads through what is no folder, or through a link",
    errno.EISDIR: "is a folder",
}

_changing = threading.Lock()  # one change at a time: an edit reads first


@contextlib.contextmanager
def _open_folder(root: Path, parts: tuple[str, ...], *, create: bool = False) -> Iterator[int]:
    fd = os.open(root, _FOLDER)
    try:
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
            inner = os.open(part, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _parts(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise ToolError(f"path must lead from the working folder into it, got {path!r}")
    return parts


def _file_parts(path: str) -> tuple[tuple[str, ...], str]:
    parts = _parts(path)
    if not parts:
        raise ToolError("path must name a file, got the working folder")
    return parts[:-1], parts[-1]


def _read(root: Path, path: str) -> bytes:
    """Return what a file holds, as far as ``_TEXT_BYTES`` and one byte more."""
    folder, name = _file_parts(path)
    with _open_folder(root, folder) as fd:
        return _read_entry(fd, name, path)


def _read_entry(folder: int, name: str, path: str) -> bytes:
    with open(os.open(name, _FILE, dir_fd=folder), "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ToolError(f"{path}: is no file")
        return file.read(_TEXT_BYTES + 1)


def _write(root: Path, path: str, content: bytes, limit: int) -> None:
    """Put a whole file in the place of what was there, which counts until then."""
    if len(content) > limit:
        raise ToolError(f"{path}: {len(content)} bytes are more than the {limit} of one file")
    folder, name = _file_parts(path)
    with _open_folder(root, ()) as fd:
        taken = sum(size for _, size in _sizes(fd, "", hidden=True))
    if taken + len(content) > FOLDER_FILES * limit:
        raise ToolError(
            f"{path}: the working folder holds no more than {FOLDER_FILES * limit} bytes"
        )
    with _open_folder(root, folder, create=True) as fd:
        draft = f".{secrets.token_hex(8)}"
        try:
            with open(os.open(draft, _NEW_FILE, 0o666, dir_fd=fd), "wb") as file:  # noqa: PTH123
                file.write(content)
            os.replace(draft, name, src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=fd)


def _walk(folder: int, prefix: str = "", *, hidden: bool = False) -> Iterator[tuple[str, int, str]]:
    """Give each file below, in order: its path, and its folder and name to open it by."""
    with os.scandir(folder) as entries:
        found = sorted(itertools.islice(entries, _ENTRIES), key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith(".") and not hidden:
            continue
        path = f"{prefix}{entry.name}"
        if entry.is_file(follow_symlinks=False):
            yield path, folder, entry.name
        elif entry.is_dir(follow_symlinks=False) and path.count("/") < _DEPTH:
            with contextlib.suppress(OSError):  # gone, or another thing by now
                inner = os.open(entry.name, _FOLDER, dir_fd=folder)
                try:
                    yield from _walk(inner, f"{path}/", hidden=hidden)
                finally:
                    os.close(inner)


def _text(content: bytes, path: str) -> str:
    if b"\0" in content:
        raise ToolError(f"{path}: is no text")
    return content.decode(errors="replace")


async def _do(path: str, work: Callable[[], T]) -> T:
    """Do it beside the loop; what the system refuses is told without paths of this machine."""
    try:
        return await asyncio.to_thread(work)
    except OSError as exc:
        reason = _REASONS.get(exc.errno or 0, exc.strerror)
        raise ToolError(f"{path or 'the working folder'}: {reason}") from exc


class ReadFileArguments(BaseModel):
    """What ``read_file`` is called with."""

    path: str = Field(description="From the working folder, such as notes/a.txt.")
    # A small model that is held to a schema writes digits until there are no more to write.
    first_line: int = Field(default=1, ge=1, le=10**8)
    lines: int = Field(default=2000, ge=1, le=10**5)


class ReadFileTool(Tool[ReadFileArguments]):
    """Reads text."""

    name = "read_file"
    description = "Read a text file of the working folder, or some lines of it."
    parameters = ReadFileArguments

    async def call(self, ctx: ToolContext, arguments: ReadFileArguments) -> str:
        """Return the lines as they are."""
        content = await _do(arguments.path, lambda: _read(ctx.folder, arguments.path))
        lines = _text(content[:_TEXT_BYTES], arguments.path).splitlines(keepends=True)
        first = arguments.first_line - 1
        chosen = "".join(lines[first : first + arguments.lines])
        left = len(lines) - first - arguments.lines
        if left > 0:
            return f"{chosen}\n[{left} more lines]"
        if len(content) > _TEXT_BYTES:
            return f"{chosen}\n[the file goes on; only its first {_TEXT_BYTES} bytes can be read]"
        return chosen


class WriteFileArguments(BaseModel):
    """What ``write_file`` is called with."""

    path: str = Field(description="From the working folder; folders are made as needed.")
    content: str


class WriteFileTool(Tool[WriteFileArguments]):
    """Writes text."""

    name = "write_file"
    description = "Write a text file in the working folder; what was there is replaced."
    parameters = WriteFileArguments

    async def call(self, ctx: ToolContext, arguments: WriteFileArguments) -> str:
        """Write it and say how much."""
        content = arguments.content.encode()

        def work() -> None:
            with _changing:
                _write(ctx.folder, arguments.path, content, ctx.settings.files_max_bytes)

        await _do(arguments.path, work)
        return f"wrote {len(content)} bytes to {arguments.path}"


class EditFileArguments(BaseModel):
    """What ``edit_file`` is called with."""

    path: str
    old: str = Field(min_length=1, description="Exactly as it stands in the file.")
    new: str
    all: bool = Field(default=False, description="Replace it everywhere, not just once.")


class EditFileTool(Tool[EditFileArguments]):
    """Replaces text within a file."""

    name = "edit_file"
    description = "Replace a piece of text in a file of the working folder, which has it just once."
    parameters = EditFileArguments

    async def call(self, ctx: ToolContext, arguments: EditFileArguments) -> str:
        """Change it and say how often."""

        def work() -> int:
            with _changing:
                changed, count = _replace(_read(ctx.folder, arguments.path), arguments)
                _write(ctx.folder, arguments.path, changed, ctx.settings.files_max_bytes)
            return count

        count = await _do(arguments.path, work)
        return f"replaced {count} in {arguments.path}"


def _replace(content: bytes, arguments: EditFileArguments) -> tuple[bytes, int]:
    """Return the changed content, and how often it had the old text; the rest stays as it is."""
    if len(content) > _TEXT_BYTES:
        raise ToolError(f"{arguments.path}: is too long to be edited")
    old, new = arguments.old.encode(), arguments.new.encode()
    count = content.count(old)
    if count == 0:
        raise ToolError(f"{arguments.path}: does not have the old text")
    if count > 1 and not arguments.all:
        raise ToolError(f"{arguments.path}: has the old text {count} times; give more of it")
    return content.replace(old, new), count


class ListFilesArguments(BaseModel):
    """What ``list_files`` is called with."""

    path: str = Field(default="", description="A folder in the working folder; all without it.")


class ListFilesTool(Tool[ListFilesArguments]):
    """Lists files with their sizes."""

    name = "list_files"
    description = "List the files of the working folder, or of a folder in it, with their sizes."
    parameters = ListFilesArguments

    async def call(self, ctx: ToolContext, arguments: ListFilesArguments) -> dict[str, Any]:
        """Return size by path, and whether there are ``more``."""

        def work() -> dict[str, Any]:
            parts = _parts(arguments.path)
            with _open_folder(ctx.folder, parts) as fd:
                found = list(itertools.islice(_sizes(fd, "/".join(parts)), _LISTED + 1))
            return {"files": dict(found[:_LISTED]), "more": len(found) > _LISTED}

        return await _do(arguments.path, work)


def _sizes(folder: int, path: str, *, hidden: bool = False) -> Iterator[tuple[str, int]]:
    for name, inner, leaf in _walk(folder, f"{path}/" if path else "", hidden=hidden):
        with contextlib.suppress(FileNotFoundError):
            yield name, os.stat(leaf, dir_fd=inner, follow_symlinks=False).st_size


class SearchFilesArguments(BaseModel):
    """What ``search_files`` is called with."""

    text: str = Field(min_length=1, description="To be found as it stands, no pattern.")
    path: str = Field(default="", description="A folder in the working folder; all without it.")
    ignore_case: bool = False


class SearchFilesTool(Tool[SearchFilesArguments]):
    """Finds lines of text files."""

    name = "search_files"
    description = "Find the lines that hold a text, in all text files of the working folder."
    parameters = SearchFilesArguments

    async def call(self, ctx: ToolContext, arguments: SearchFilesArguments) -> dict[str, Any]:
        """Return ``path``, ``line`` and ``text`` of each, and whether there may be ``more``."""

        def work() -> dict[str, Any]:
            parts = _parts(arguments.path)
            with _open_folder(ctx.folder, parts) as fd:
                files = _walk(fd, "".join(f"{part}/" for part in parts))
                found = list(itertools.islice(_search(files, arguments), _FOUND + 1))
            return {
                "found": [hit for hit in found[:_FOUND] if hit],
                "more": len(found) > _FOUND or {} in found,
            }

        return await _do(arguments.path, work)


def _search(
    files: Iterator[tuple[str, int, str]], arguments: SearchFilesArguments
) -> Iterator[dict[str, Any]]:
    """Give each line that has the text, and ``{}`` where it stops before the end."""

    def fold(text: str) -> str:
        return text.lower() if arguments.ignore_case else text

    wanted, left = fold(arguments.text), _SEARCHED_BYTES
    for path, folder, name in files:
        try:
            content = _read_entry(folder, name, path)
            text = _text(content, path)
        except (OSError, ToolError):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if wanted in fold(line):
                yield {"path": path, "line": number, "text": line[:_LINE_CHARS]}
        left -= len(content)
        if left < 0:
            yield {}
            return


def file_tools(options: Mapping[str, Any]) -> list[Tool[Any]]:
    """Return the tools of ``files``; a document can say nothing more of them."""
    tools = (ReadFileTool, WriteFileTool, EditFileTool, ListFilesTool, SearchFilesTool)
    return [tool(options) for tool in tools]
