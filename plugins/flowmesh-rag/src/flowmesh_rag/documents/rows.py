"""Rows: a document per JSON object, of a file or of a task's ``data``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowmesh_core import InputError, RowSource
from flowmesh_rag.documents.base import Document, ReadOptions, Section, limit_text

__all__ = ["read_jsonl", "read_row", "read_rows"]


def read_jsonl(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a file of JSON lines, however long; ``max_bytes`` does not count."""
    rows = RowSource(kind="jsonl", params={"path": str(path)}).records()
    yield from read_rows(rows, f"{source}#", options)


def read_rows(
    rows: Iterable[Mapping[str, Any]], prefix: str, options: ReadOptions
) -> Iterator[Document]:
    """Read rows in their order; each source is ``prefix`` and what names the row.

    A row without text, or without a name where it should have one, goes to ``options.failed``.
    """
    for index, row in enumerate(rows):
        options.stop()
        try:
            document = read_row(row, prefix, options)
        except InputError as exc:
            options.failed(InputError(f"row {index}: {exc}"))
        else:
            yield document


def read_row(row: Mapping[str, Any], prefix: str, options: ReadOptions) -> Document:
    """Return one row's document; without ``id_column`` it is named by what it says."""
    text = row.get(options.text_column)
    if not isinstance(text, str):
        raise InputError(
            f"column {options.text_column!r} must hold text, got {type(text).__name__}; columns:"
            f" {', '.join(map(str, row)) or 'none'}; name it in spec.text_column"
        )
    columns = options.metadata_columns
    kept = row if columns is None else {name: row[name] for name in columns if name in row}
    # Dates and the like of data sets become text; a payload is JSON.
    plain = json.loads(json.dumps(dict(kept), default=str))
    plain.pop(options.text_column, None)
    anonymous = options.id_column is None
    name = _digest([text, plain]) if anonymous else _name(row, options.id_column)
    return Document(
        source=f"{prefix}{name}",
        sections=(Section(text=limit_text(text, options)),),
        metadata=plain,
        named_by_content=anonymous,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _name(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column or "")
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"column {column!r} must name the row by text or a whole number")
    return str(value)
