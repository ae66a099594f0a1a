"""Documents as every reader gives them: plain text in sections, each with its headings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from flowmesh_core import ExecutorUnavailableError, InputError

__all__ = [
    "Document",
    "ReadOptions",
    "Reader",
    "Section",
    "TextFormat",
    "limit_text",
    "need",
    "read_bytes",
    "read_text",
]

TextFormat = Literal["text", "markdown"]

_NAME_CHARS = 300  # of a title or a heading, which every chunk below it carries
# What marks the beginning of text in another encoding than UTF-8.
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


def _clean(text: str) -> str:
    """Put a mark for what no store or splitter takes, so that offsets stay true."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _shorten(name: str) -> str:
    return _clean(name)[:_NAME_CHARS]


def _shorten_all(headings: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    return tuple((start, _shorten(text)) for start, text in headings)


def _fail(problem: InputError) -> None:
    raise problem


@attrs.frozen(kw_only=True)
class Section:
    """A stretch of text that no chunk crosses: a page of a PDF, all of any other document.

    Attributes:
        text: Offsets of chunks count its characters.
        page: Its number from 1, where there are pages.
        headings: Offset and beginning of each heading, in order.
    """

    text: str = attrs.field(converter=_clean)
    page: int | None = None
    headings: tuple[tuple[int, str], ...] = attrs.field(default=(), converter=_shorten_all)


@attrs.frozen(kw_only=True)
class Document:
    """One document.

    Attributes:
        source: What citations call it; a later document of this name replaces it.
        sections: In reading order.
        title: Empty when it has none.
        format: Which borders the splitter looks for.
        metadata: JSON data that its chunks carry.
        named_by_content: The same name again means the same document, which is no fault.
    """

    source: str = attrs.field(converter=_clean)
    sections: tuple[Section, ...]
    title: str = attrs.field(default="", converter=_shorten)
    format: TextFormat = "text"
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    named_by_content: bool = False


@attrs.frozen(kw_only=True)
class ReadOptions:
    """What a reader must keep to.

    Attributes:
        max_bytes: Largest file.
        max_pages: Most pages of one document.
        max_chars: Most characters of text of one document.
        text_column: Column of a row's text.
        id_column: Column that names a row, so that a later one replaces it.
        metadata_columns: Columns that a row's chunks carry; None for all.
        stop: Called between pages and rows; raises when the task must end.
        failed: Told of a row that cannot be read; raises unless the others are wanted.
    """

    max_bytes: int = 64 << 20
    max_pages: int = 5_000
    max_chars: int = 50_000_000
    text_column: str = "text"
    id_column: str | None = None
    metadata_columns: tuple[str, ...] | None = None
    stop: Callable[[], None] = lambda: None
    failed: Callable[[InputError], None] = _fail


# A file and the name of its source to the documents in it; raises InputError.
Reader = Callable[[Path, str, ReadOptions], Iterator[Document]]


def read_bytes(path: Path, options: ReadOptions) -> bytes:
    """Return what a file holds.

    Raises:
        InputError: It cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(options.max_bytes + 1)
    except OSError as exc:
        raise InputError(f"cannot be read: {exc.strerror}") from exc
    if len(content) > options.max_bytes:
        raise InputError(f"is larger than {options.max_bytes:,} bytes; split it")
    return content


def read_text(path: Path, options: ReadOptions) -> str:
    """Return a file's text, line ends as they are in it.

    Raises:
        InputError: As ``read_bytes``, or it is not text in UTF-8 or, with its mark, UTF-16.
    """
    content = read_bytes(path, options)
    mark, encoding = next((pair for pair in _MARKS if content.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as exc:
        raise InputError(f"is not text in {encoding.upper()}: byte {exc.start}") from exc
    if "\0" in text:
        raise InputError("is not text: it holds a zero byte")
    return limit_text(text, options)


def limit_text(text: str, options: ReadOptions) -> str:
    """Return a text that is short enough.

    Raises:
        InputError: It is too long.
    """
    if len(text) > options.max_chars:
        raise InputError(f"has more than {options.max_chars:,} characters of text; split it")
    return text


def need(package: str, purpose: str) -> ExecutorUnavailableError:
    """Return the error that says which package is missing for what."""
    install = "pip install 'flowmesh-rag[engine]'"
    message = f"{purpose} needs the package {package}, not installed here; run: {install}"
    return ExecutorUnavailableError(message, needs=[package], install=install)
