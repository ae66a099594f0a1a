"""Reads what the written pages hold: text, code, sections, tables, links."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("plugins/*/*.md")])
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@cache
def text_of(path: Path) -> str:
    """Return the text of a page."""
    return path.read_text(encoding="utf-8")


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """Return title and content of each block of these languages."""
    return [
        (title, code) for lang, title, code in FENCE.findall(text_of(path)) if lang in languages
    ]


def sections(path: Path, level: int = 2) -> dict[str, str]:
    """Return what stands below each heading of a level, without the headings of other levels."""
    # Text and code by turns, so that a comment within code is no heading.
    parts = re.split(r"^(```.*?^```$)", text_of(path), flags=re.MULTILINE | re.DOTALL)
    marked = "".join(
        part if index % 2 else re.sub(r"^(#+) (.+)$", "\0\\1 \\2\0", part, flags=re.MULTILINE)
        for index, part in enumerate(parts)
    )
    _, *found = marked.split("\0")
    titles, contents = found[::2], found[1::2]
    prefix = "#" * level + " "
    return {
        title.removeprefix(prefix): content.strip()
        for title, content in zip(titles, contents, strict=True)
        if title.startswith(prefix)
    }


def table(text: str) -> list[list[str]]:
    """Return the cells of every table row in a text, headings included."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def rows_by_name(text: str) -> dict[str, list[str]]:
    """Return the other cells of every row, by the name in its first cell."""
    return {row[0].strip("`"): row[1:] for row in table(text) if row[0].startswith("`")}


def links(text: str) -> Iterator[re.Match[str]]:
    """Yield each relative link, its target in group 1."""
    return re.finditer(r"(?<=\]\()(?![a-z]+:)([^)\s]+)(?=\))", FENCE.sub(_blank, text))


def _blank(code: re.Match[str]) -> str:
    return " " * len(code[0])


def relink(text: str, page: str, moved: str = "reference/any/page.md") -> str:
    """Return a text of one page for another place.

    Args:
        text: Markdown.
        page: Where it comes from, below the root of the repository.
        moved: Where it goes to, below the root of the site, where docs/ lies.
    """
    parts, end = [], 0
    for link in links(text):
        file, _, anchor = link[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page
        place = target.removeprefix("docs/")
        if file or place != moved:
            file = posixpath.relpath(place, posixpath.dirname(moved) or ".")
        parts += [text[end : link.start()], file, f"#{anchor}" if anchor else ""]
        end = link.end()
    return "".join([*parts, text[end:]])
