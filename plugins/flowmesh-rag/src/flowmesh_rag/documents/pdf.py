"""PDF: the text of its pages; no attachment is opened and no script run."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from flowmesh_core import InputError
from flowmesh_rag.documents.base import (
    Document,
    ReadOptions,
    Section,
    limit_text,
    need,
    read_bytes,
)

__all__ = ["read_pdf"]

# What pypdf lets through of a broken file, beside its own errors.
_BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError),
    *(RecursionError, TypeError, ValueError, struct.error, zlib.error),
)


def read_pdf(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a PDF, a section per page that holds text; what is a picture is left out."""
    try:
        from pypdf import PdfReader  # noqa: PLC0415 - comes with the engine
        from pypdf.errors import PyPdfError  # noqa: PLC0415
    except ImportError as exc:
        raise need("pypdf", "PDF") from exc
    content = read_bytes(path, options)
    if b"%PDF-" not in content[:1024]:
        raise InputError("is no PDF, whatever its name says")
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted:
            raise InputError("is encrypted; store a copy without a password")
        if len(reader.pages) > options.max_pages:
            raise InputError(f"has more than {options.max_pages:,} pages; split it")
        title = str((reader.metadata and reader.metadata.title) or path.name)
        sections = _read_pages((page.extract_text() for page in reader.pages), options)
    except (PyPdfError, *_BROKEN) as exc:
        raise InputError(f"is a PDF that cannot be read: {type(exc).__name__}: {exc}") from exc
    if not sections:
        raise InputError("holds no text; pages that are pictures need OCR before")
    yield Document(source=source, title=title, sections=sections)


def _read_pages(texts: Iterator[str], options: ReadOptions) -> tuple[Section, ...]:
    sections, length = [], 0
    for number, text in enumerate(texts, start=1):
        options.stop()
        length += len(limit_text(text, options))
        if length > options.max_chars:
            raise InputError(f"has more than {options.max_chars:,} characters of text; split it")
        if text.strip():
            sections.append(Section(text=text, page=number))
    return tuple(sections)
