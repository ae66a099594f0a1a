"""From documents to chunks: pieces of text with the place where each stands."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from flowmesh_core import InputError
from flowmesh_rag.documents.base import Document, Section, need
from flowmesh_rag.spec import Chunking

__all__ = ["Chunk", "Splitter"]

# The library takes time by a text's length times its chunks, 200 s for 5 million characters.
_WINDOW = 50_000
_WINDOW_STEPS = 200


@attrs.frozen(kw_only=True)
class Chunk:
    """A piece of one section.

    Attributes:
        ordinal: From 0 through the whole document.
        text: ``section.text[start:end]``.
        heading: The nearest one above its beginning.
    """

    ordinal: int
    text: str
    start: int
    end: int
    page: int | None = None
    heading: str | None = None


class Splitter:
    """Splits at the largest borders that fit: headings, paragraphs, sentences, words.

    Args:
        block: What the document says.
        count_tokens: Counts a text's tokens uncut; None when that cannot be told.
    """

    def __init__(
        self, block: Chunking, count_tokens: Callable[[str], int | None] = lambda _text: None
    ) -> None:
        if block.unit == "tokens" and count_tokens("word") is None:
            raise InputError(
                "spec.chunk.unit tokens needs a model on this worker, an endpoint does not tell"
                " them; use chars"
            )
        self._block = block
        self._count = count_tokens if block.unit == "tokens" else None

    def split(self, document: Document, stop: Callable[[], None] = lambda: None) -> Iterator[Chunk]:
        """Yield the chunks of a document in order; blank stretches give none.

        Args:
            document: Any.
            stop: Called now and then; raises when the task must end.
        """
        wanted = self._block.format
        splitter = self._open(document.format if wanted == "auto" else wanted)
        ordinals = itertools.count()
        for section in document.sections:
            for start, text in self._split_text(splitter, section.text, stop):
                yield Chunk(
                    ordinal=next(ordinals),
                    text=text,
                    start=start,
                    end=start + len(text),
                    page=section.page,
                    heading=_find_heading(section, start),
                )

    def _split_text(
        self, splitter: Any, text: str, stop: Callable[[], None]
    ) -> Iterator[tuple[int, str]]:
        size, step = self._block.size, self._block.size - self._block.overlap
        for start, end in _windows(text, min(_WINDOW, max(step * _WINDOW_STEPS, size * 4))):
            stop()
            found = [piece for piece in splitter.chunk_indices(text[start:end]) if piece[1].strip()]
            for index, (offset, chunk) in enumerate(found):
                # With an overlap, the library may give a piece and then one that begins with it.
                if index + 1 == len(found) or found[index + 1][0] != offset:
                    yield start + offset, chunk

    def _open(self, text_format: str) -> Any:
        try:
            import semantic_text_splitter  # noqa: PLC0415 - comes with the engine
        except ImportError as exc:
            raise need("semantic_text_splitter", "splitting texts") from exc
        markdown = text_format == "markdown"
        kind: Any = semantic_text_splitter
        kind = kind.MarkdownSplitter if markdown else kind.TextSplitter
        if self._count is None:
            return kind(self._block.size, overlap=self._block.overlap)
        return kind.from_callback(self._count, self._block.size, overlap=self._block.overlap)


def _windows(text: str, length: int) -> Iterator[tuple[int, int]]:
    """Cut a long text after a blank line, a line or a word, whichever there is."""
    start = 0
    while len(text) - start > length:
        half, full = start + length // 2, start + length
        found = (text.rfind(border, half, full) + len(border) for border in ("\n\n", "\n", " "))
        end = next((end for end in found if end > half), full)
        yield start, end
        start = end
    yield start, len(text)


def _find_heading(section: Section, start: int) -> str | None:
    above = bisect.bisect_right(section.headings, start, key=lambda heading: heading[0])
    return section.headings[above - 1][1] if above else None
