"""All documents of a task, in order, each with how far the reading is then."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from flowmesh_core import FileRef, InputError, NetworkPolicy, RowSource
from flowmesh_rag.documents import Document, ReadOptions, guess_name, read_file, read_rows

__all__ = ["Corpus"]

_ROW_FILES = (".jsonl", ".ndjson")


@attrs.frozen(kw_only=True)
class Corpus:
    """Files first, then rows; read as they are asked for.

    Attributes:
        failed: Told of each document that cannot be read; raises unless the rest is wanted.
    """

    files: Sequence[FileRef]
    rows: RowSource | None
    options: ReadOptions
    failed: Callable[[InputError], None]

    def __iter__(self) -> Iterator[tuple[float, Document]]:
        """Yield documents, each with the part of all files and rows that is read with it."""
        sizes = [_count_rows(file) for file in self.files]
        total = sum(sizes) + (self.rows.count() if self.rows else 0)
        done = 0
        for file, size in zip(self.files, sizes, strict=True):
            self.options.stop()
            for number, document in enumerate(self._read(file), start=1):
                yield (done + min(number, size)) / total, document
            done += size
        if self.rows is not None:
            for number, document in enumerate(self._read_rows(self.rows), start=done + 1):
                yield min(number / total, 1.0), document

    def _read(self, file: FileRef) -> Iterator[Document]:
        source, name = file.name, file.name
        if file.url is not None:
            source, name = _name_page(file.url), guess_name(file.path, name)
        options = attrs.evolve(self.options, failed=lambda exc: self._fail(source, exc))
        try:
            yield from read_file(file.path, name, source, options)
        except InputError as exc:
            self.failed(exc)

    def _fail(self, source: str, problem: InputError) -> None:
        self.failed(InputError(f"{source}: {problem}"))

    def _read_rows(self, rows: RowSource) -> Iterator[Document]:
        column = "prompt" if rows.kind == "list" else self.options.text_column
        options = attrs.evolve(self.options, text_column=column, failed=self.failed)
        try:
            yield from read_rows(rows.records(), "", options)
        except InputError as exc:
            self.failed(exc)


def _name_page(url: str) -> str:
    """Return a URL without what may be secrets, that is still not another one's."""
    shown = NetworkPolicy().mask_url(url)
    if "?" not in shown:
        return shown
    return f"{shown} ({hashlib.sha256(url.encode()).hexdigest()[:12]})"


def _count_rows(file: FileRef) -> int:
    if Path(file.name).suffix.lower() not in _ROW_FILES:
        return 1
    try:
        return RowSource(kind="jsonl", params={"path": str(file.path)}).count()
    except InputError:
        return 1  # its reader says what is wrong
