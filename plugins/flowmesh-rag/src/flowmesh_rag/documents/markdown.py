"""Markdown: split along its structure, each chunk under its heading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flowmesh_rag.documents.base import Document, ReadOptions, Section, read_text

__all__ = ["read_markdown"]

# A fence of code or a heading; what stands within a fence is no heading.
# Source: CommonMark 0.31.2, sections 4.2 and 4.5.
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*)")


def read_markdown(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a Markdown file; its first heading is its title."""
    text = read_text(path, options)
    headings = tuple(_find_headings(text))
    yield Document(
        source=source,
        title=headings[0][1] if headings else path.name,
        format="markdown",
        sections=(Section(text=text, headings=headings),),
    )


def _find_headings(text: str) -> Iterator[tuple[int, str]]:
    fence, offset = "", 0
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if found := _FENCE.fullmatch(bare):
            mark, rest = found.groups()
            if not fence:
                fence = mark
            elif mark.startswith(fence) and not rest.strip():
                fence = ""
        elif not fence and (started := _HEADING.match(bare)) and (heading := _unclose(started[1])):
            yield offset, heading
        offset += len(line)


def _unclose(heading: str) -> str:
    """Drop the marks that may close a heading, if a blank stands before them."""
    text = heading.rstrip(" \t")
    bare = text.rstrip("#")
    return bare.rstrip(" \t") if not bare or bare[-1] in " \t" else text
