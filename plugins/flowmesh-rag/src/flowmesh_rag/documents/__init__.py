"""Readers: from a file to the documents in it, by its suffix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flowmesh_core import InputError
from flowmesh_rag.documents.base import Document, Reader, ReadOptions, Section
from flowmesh_rag.documents.html import read_html
from flowmesh_rag.documents.markdown import read_markdown
from flowmesh_rag.documents.pdf import read_pdf
from flowmesh_rag.documents.rows import read_jsonl, read_rows
from flowmesh_rag.documents.text import read_plain_text

__all__ = [
    "READERS",
    "Document",
    "ReadOptions",
    "Reader",
    "Section",
    "guess_name",
    "read_file",
    "read_rows",
]

READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".text", ".rst", ".log"), read_plain_text),
    **dict.fromkeys((".md", ".markdown"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    ".pdf": read_pdf,
}
"""Readers by suffix, in lower case."""

# Source: WHATWG MIME Sniffing Standard, section 7.1.
_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?<(?:!--|(?:!doctype\s+html|html|head|body|title"
    rb"|meta|script|style|iframe|h1|div|font|table|a|b|br|p)[\s>])",
    re.IGNORECASE,
)


def read_file(path: Path, name: str, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: Where it lies.
        name: Its suffix says what the file is.
        source: What its documents are called.
        options: What to keep to.

    Raises:
        InputError: Naming the source and what is wrong with it.
    """
    try:
        yield from _find_reader(name)(path, source, options)
    except InputError as exc:
        raise InputError(f"{source}: {exc}") from exc


def guess_name(path: Path, name: str) -> str:
    """Return a page's name; where no reader knows its suffix, with one that says how it begins."""
    if Path(name).suffix.lower() in READERS or not path.is_file():
        return name
    with path.open("rb") as file:
        begins = file.read(1024)
    if begins.startswith(b"%PDF-"):
        return f"{name}.pdf"
    return f"{name}.html" if _HTML.match(begins) else f"{name}.txt"


def _find_reader(name: str) -> Reader:
    suffix = Path(name).suffix.lower()
    if suffix not in READERS:
        what = f"files of suffix {suffix}" if suffix else "names without suffix"
        raise InputError(f"no reader for {what}; there are {', '.join(sorted(READERS))}")
    return READERS[suffix]
