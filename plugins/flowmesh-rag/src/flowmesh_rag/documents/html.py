"""HTML: the text that a reader of the page sees; nothing is run, followed or fetched."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmesh_rag.documents.base import (
    Document,
    ReadOptions,
    Section,
    limit_text,
    need,
    read_bytes,
)

__all__ = ["read_html"]

_DROPPED = frozenset(
    {"canvas", "embed", "head", "iframe", "math", "noscript", "object", "script", "select"}
    | {"style", "svg", "template", "textarea"}
)
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_PARAGRAPHS = _HEADINGS | frozenset(
    {"address", "article", "aside", "blockquote", "details", "div", "dl", "fieldset", "figure"}
    | {"footer", "form", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table"}
    | {"ul"}
)
_LINES = frozenset({"br", "caption", "dd", "dt", "figcaption", "li", "option", "summary", "tr"})
_CELLS = frozenset({"td", "th"})
_CHARSET = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# Of Python's names, those that pages have; a byte that says so in ASCII is not UTF-16.
# Source: WHATWG Encoding Standard, section 4.2.
_ENCODINGS = frozenset(
    {"ascii", "big5", "big5hkscs", "cp866", "cp874", "cp932", "cp949", "euc_jp", "euc_kr"}
    | {"gb18030", "gb2312", "gbk", "iso2022_jp", "koi8-r", "koi8-u", "mac-cyrillic", "mac-roman"}
    | {"shift_jis", "tis-620", "utf-8"}
    | {f"cp{number}" for number in range(1250, 1259)}
    | {f"iso8859-{number}" for number in range(1, 17)}
)
_BREAKS = ("", " ", "\t", "\n", "\n\n")  # a stronger one takes the place of those before it
_BLANK = re.compile(r"[ \t\n\r\f]+")


def read_html(path: Path, source: str, options: ReadOptions) -> Iterator[Document]:
    """Read a page; headings, paragraphs, list items and rows of tables stay apart."""
    try:
        from selectolax.lexbor import LexborHTMLParser  # noqa: PLC0415 - comes with the engine
    except ImportError as exc:
        raise need("selectolax", "HTML") from exc
    page = LexborHTMLParser(_decode(read_bytes(path, options)))
    title = page.css_first("title")
    text = _PageText()
    if page.body is not None:
        text.walk(page.body)
    name = _BLANK.sub(" ", title.text()).strip() if title else ""
    section = Section(text=limit_text(text.joined(), options), headings=tuple(text.headings))
    yield Document(source=source, title=name or path.name, sections=(section,))


def _decode(content: bytes) -> str:
    """Decode as the page says, else as UTF-8; what does not fit becomes a mark, as in browsers."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace")
    found = _CHARSET.search(content, 0, 1024)
    text = content.decode(_known_encoding(found[1]) if found else "utf-8", "replace")
    return text.removeprefix(codecs.BOM_UTF8.decode())


def _known_encoding(label: bytes) -> str:
    try:
        name = codecs.lookup(label.decode()).name
    except (LookupError, UnicodeError):
        return "utf-8"
    return name if name in _ENCODINGS else "utf-8"


class _PageText:
    """The text of a page as it grows; a break is written once there is text after it."""

    def __init__(self) -> None:
        self.headings: list[tuple[int, str]] = []
        self._parts: list[str] = []
        self._length = 0
        self._break = ""
        self._last_heading = -1

    def joined(self) -> str:
        return "".join(self._parts)

    def walk(self, root: Any) -> None:
        """Take a tree, however deep it is."""
        # A node, whether blanks count in it, and, when it comes to its end, where it began.
        waiting: list[tuple[Any, bool, tuple[int, int] | None]] = [(root, False, None)]
        while waiting:
            node, keeps, begun = waiting.pop()
            if begun is not None:
                self._end(node.tag, *begun)
            elif node.is_text_node:
                self._add(node.text_content or "", keeps=keeps)
            elif node.is_element_node and node.tag not in _DROPPED:
                self._split(node.tag)
                waiting.append((node, keeps, (len(self._parts), self._length)))
                inner = keeps or node.tag == "pre"
                children = list(node.iter(include_text=True))
                waiting += [(child, inner, None) for child in reversed(children)]

    def _end(self, tag: str, part: int, start: int) -> None:
        if tag in _HEADINGS and part > self._last_heading:  # not around another one
            self._last_heading = part
            written = "".join(self._parts[part:])
            if heading := written.strip():
                self.headings.append((start + written.index(heading), heading))
        self._split(tag)

    def _split(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._ask_break("\n\n")
        elif tag in _LINES:
            self._ask_break("\n")
        elif tag in _CELLS:
            self._ask_break("\t")

    def _ask_break(self, wanted: str) -> None:
        self._break = max(self._break, wanted, key=_BREAKS.index)

    def _add(self, text: str, *, keeps: bool) -> None:
        shown = text if keeps else _BLANK.sub(" ", text)
        if not keeps:
            if shown.startswith(" "):
                self._ask_break(" ")
            ends, shown = shown.endswith(" "), shown.strip(" ")
        if not shown:
            return
        if self._parts:
            self._write(self._break)
        self._write(shown)
        self._break = " " if not keeps and ends else ""

    def _write(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
