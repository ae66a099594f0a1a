"""The ``files`` block: paths, folders, patterns and URLs, into files that lie here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flowmesh_core.checkpoints import Fetcher, existing
from flowmesh_core.errors import ArtifactError, FlowmeshError, InputError

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from flowmesh_core.specs import FilesBlock

__all__ = ["FileRef", "resolve_files"]

# What is left to match of a pattern, name by name.
Pattern = tuple[str, ...]

_EVERYTHING: Pattern = ("**", "*")


@attrs.frozen(kw_only=True)
class FileRef:
    """One of a task's files.

    Attributes:
        path: Where it lies; a task only reads it.
        name: Where it lies below the folder that the document names, or below that part of a
            pattern which has no wildcard; else its file name. Two files may have the same.
        url: Where it came from, as the document has it; ``NetworkPolicy.mask_url`` says what of
            it may be shown. None for what lay here.
    """

    path: Path
    name: str
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON data."""
        return {"path": str(self.path), "name": self.name, "url": self.url}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FileRef:
        """Build a reference from ``to_dict``."""
        return cls(path=Path(data["path"]), name=data["name"], url=data["url"])


def resolve_files(block: FilesBlock, fetcher: Fetcher, *, folder: Path) -> tuple[FileRef, ...]:
    """Find a task's files, each once; those of URLs are brought below ``folder``.

    They come in the document's order. Of a folder its own files come first, sorted by name, then
    those of the folders in it.

    Raises:
        InputError: Naming all that cannot be had, or a limit that is exceeded.
    """
    problems: list[FlowmeshError] = []
    files: dict[Path, FileRef] = {}
    total_bytes = 0
    for file, size_bytes in _each(block, fetcher, folder, problems):
        if file.path in files:
            continue
        files[file.path] = file
        total_bytes += size_bytes
        if len(files) > block.max_files:
            raise InputError(f"max_files allows {block.max_files} files, there are more")
        if total_bytes > block.max_bytes:
            raise InputError(f"max_bytes allows {block.max_bytes} bytes, the files have more")
    if problems:
        raise InputError(
            "; ".join(map(str, problems)), retriable=all(one.retriable for one in problems)
        )
    return tuple(files.values())


def _each(
    block: FilesBlock, fetcher: Fetcher, folder: Path, problems: list[FlowmeshError]
) -> Iterator[tuple[FileRef, int]]:
    """Yield each file and its size; what cannot be had is added to the problems."""
    headers = {name: value.get_secret_value() for name, value in block.headers.items()}
    # An earlier stage may give a path where others give a URL, so that both lists take both.
    for index, address in enumerate((*block.paths, *block.urls)):
        try:
            if address.startswith(("http://", "https://")):
                path = fetcher.download(
                    address, folder / str(index), headers=headers, max_bytes=block.max_bytes
                )
                yield FileRef(path=path, name=path.name, url=address), path.stat().st_size
                continue
            found = False
            for file in _find(address):
                found = True
                yield file, file.path.stat().st_size
            if not found:
                problems.append(InputError(f"{address!r} leads to no file on this worker"))
        except (ArtifactError, InputError) as exc:
            problems.append(exc)
        except OSError as exc:
            problems.append(InputError(f"{address!r} cannot be read: {exc}"))


def _find(text: str) -> Iterator[FileRef]:
    """Yield the files that a path or a pattern leads to."""
    path = existing(text)
    if path is None:
        yield from _match(Path(text).parts)
    elif path.is_dir():
        yield from _walk(path, _EVERYTHING)
    elif path.is_file():
        yield FileRef(path=path, name=path.name)


def _match(parts: Pattern) -> Iterator[FileRef]:
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    base, pattern = Path(*parts[:fixed]).absolute(), parts[fixed:]
    if pattern and base.is_dir():
        yield from _walk(base, _simplified(pattern))


def _simplified(pattern: Pattern) -> Pattern:
    """Return a pattern without ``**`` twice in a row, and for files where it ends with that."""
    once = [part for i, part in enumerate(pattern) if pattern[i - 1 : i + 1] != ("**", "**")]
    return (*once, "*") if once[-1] == "**" else tuple(once)


def _walk(top: Path, pattern: Pattern) -> Iterator[FileRef]:
    """Yield what matches below a folder; links to folders are not entered."""
    real_top = top.resolve()
    folders = [(top, {pattern})]
    while folders:
        folder, patterns = folders.pop()
        below = []
        for entry in _shown(folder):
            path, left = Path(entry.path), _after(patterns, entry.name)
            if entry.is_dir(follow_symlinks=False):
                below.append((path, left - {()}))
            elif () in left and _is_file(entry, real_top):
                yield FileRef(path=path, name=path.relative_to(top).as_posix())
        folders += [each for each in reversed(below) if each[1]]


def _shown(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _is_file(entry: os.DirEntry[str], top: Path) -> bool:
    if not os.path.isfile(entry.path):  # noqa: PTH113 - false for a link into a closed folder
        return False
    return not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(top)


def _after(patterns: set[Pattern], name: str) -> set[Pattern]:
    """Return what is left of the patterns that a name goes on with."""
    left: set[Pattern] = set()
    for first, *rest in filter(None, patterns):
        if first == "**":  # this name is one of those in between, or there are none
            left |= {(first, *rest)} | _after({tuple(rest)}, name)
        elif fnmatchcase(name, first):
            left.add(tuple(rest))
    return left
