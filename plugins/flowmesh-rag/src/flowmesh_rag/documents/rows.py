"""Rows: a document per JSON object, of a file or of a task's ``data``."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import InputError, RowSource
from flowmesh_rag.documents.base import Document, ReadOptions, Section, limit_text

__all__ = ["read_jsonl", "read_row", "read_rows"]

# Every chunk of a row carries both.
_MAX_FIELD_BYTES = 64 << 10
_MAX_NAME_CHARS = 1000


def read_jsonl(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a file of JSON lines, however long; ``max_bytes`` does not count."""

    def failed(problem: InputError) -> None:  # without the place where the file lies here
        options.failed(InputError(str(problem).replace(f"{path}, ", "").replace(f"{path} ", "")))

    rows = RowSource(kind="jsonl", params={"path": str(path)}).records()
    yield from read_rows(rows, f"{source}#", attrs.evolve(options, failed=failed))


def read_rows(
    rows: Iterable[Mapping[str, Any]], prefix: str, options: ReadOptions
) -> Iterator[Document]:
    """Read rows in their order; each source is ``prefix`` and what names the row.

    What cannot be read, or lacks the text or the name it should have, goes to ``options.failed``,
    and the next row follows.
    """
    left = iter(rows)
    for index in itertools.count():
        options.stop()
        try:
            yield read_row(next(left), prefix, options)
        except StopIteration:
            return
        except InputError as exc:
            options.failed(InputError(f"row {index}: {exc}"))


def read_row(row: Mapping[str, Any], prefix: str, options: ReadOptions) -> Document:
    """Return one row's document; without ``id_column`` it is named by what it says."""
    text = row.get(options.text_column)
    if not isinstance(text, str):
        raise InputError(
            f"column {options.text_column!r} must hold text, got {type(text).__name__}; columns:"
            f" {', '.join(map(str, row)) or 'none'}; name it in spec.text_column"
        )
    columns = row.keys() if options.metadata_columns is None else options.metadata_columns
    names = [name for name in columns if name in row and name != options.text_column]
    plain = _plain({name: row[name] for name in names})
    anonymous = options.id_column is None
    name = _digest([text, plain]) if anonymous else _name(row, options.id_column)
    return Document(
        source=f"{prefix}{name}",
        sections=(Section(text=limit_text(text, options)),),
        metadata=plain,
        named_by_content=anonymous,
    )


def _plain(fields: Mapping[str, Any]) -> Any:
    """Return fields as JSON has them; dates and the like of data sets become text."""
    try:
        encoded = json.dumps(fields, default=str, allow_nan=False, ensure_ascii=False).encode()
    except (RecursionError, TypeError, ValueError) as exc:
        raise InputError(f"columns that its chunks carry must be JSON data: {exc}") from exc
    if len(encoded) > _MAX_FIELD_BYTES:
        raise InputError(
            f"columns that its chunks carry have more than {_MAX_FIELD_BYTES:,} bytes; name fewer"
            " in spec.metadata_columns"
        )
    return json.loads(encoded)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _name(row: Mapping[str, Any], column: str | None) -> str:
    value = row.get(column or "")
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"column {column!r} must name the row by text or a whole number")
    if len(name := str(value)) > _MAX_NAME_CHARS:
        raise InputError(f"column {column!r} names the row by more than {_MAX_NAME_CHARS} letters")
    return name
