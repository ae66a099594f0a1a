"""Plain text: one document per file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowmesh_rag.documents.base import Document, ReadOptions, Section, read_text

__all__ = ["read_plain_text"]


def read_plain_text(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a text file; its name is its title."""
    text = read_text(path, options)
    yield Document(source=source, title=path.name, sections=(Section(text=text),))
