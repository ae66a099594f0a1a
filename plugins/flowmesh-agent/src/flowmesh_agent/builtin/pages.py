"""Turns a web page into the text that a reader of it would see; pure.

Takes time in proportion to the page whatever it holds, which the standard library's parser does
not: a page may be hostile.
"""

from __future__ import annotations

import re
from html import unescape

__all__ = ["page_text"]

_HIDDEN = frozenset({"script", "style", "template", "noscript", "svg", "iframe"})
_BLOCKS = frozenset(
    {
        *("address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "footer"),
        *("form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol"),
        *("option", "p", "pre", "section", "table", "title", "tr", "ul"),
    }
)
_TAG = re.compile(r"</?([a-z][^\s/>]*)", re.IGNORECASE)
_STOP = re.compile(r"=\s*([\"'])|>")


def page_text(html: str) -> str:
    """Return what a page says, a line for each block; scripts and styles are left out."""
    lowered = html.lower() if html.isascii() else _lower(html)
    parts: list[str] = []
    position = 0
    while (start := html.find("<", position)) >= 0:
        parts.append(unescape(html[position:start]))
        position, said = _skip(lowered, start)
        parts.append(said)
    parts.append(unescape(html[position:]))
    lines = (" ".join(line.split()) for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line)


def _lower(text: str) -> str:
    # Of the same length, which a few letters beyond ASCII are not in small.
    return re.sub("[A-Z]+", lambda found: found[0].lower(), text)


def _skip(html: str, start: int) -> tuple[int, str]:
    """Return where the markup ends that begins here, and what stands for it in the text."""
    if html.startswith("<!--", start):
        return _after(html, "-->", start + 4), ""
    if html.startswith(("<!", "<?"), start):
        return _after(html, ">", start), ""
    tag = _TAG.match(html, start)
    if tag is None:
        return start + 1, "<"
    name, end = tag[1], _tag_end(html, tag.end())
    if name in _HIDDEN and html[start + 1] != "/" and html[end - 2 : end] != "/>":
        return _before(html, f"</{name}", end), ""
    if name in _BLOCKS:
        return end, "\n"
    return end, "\t" if name in ("td", "th") else ""


def _after(html: str, mark: str, start: int) -> int:
    return min(_before(html, mark, start) + len(mark), len(html))


def _before(html: str, mark: str, start: int) -> int:
    found = html.find(mark, start)
    return len(html) if found < 0 else found


def _tag_end(html: str, position: int) -> int:
    """Return where a tag ends; a ``>`` within a quoted value does not end it."""
    while (stop := _STOP.search(html, position)) is not None:
        if stop[1] is None:
            return stop.end()
        position = _after(html, stop[1], stop.end())
    return len(html)
