"""Models that can be reckoned by hand, and an executor with them in place of loaded ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from flowmesh_rag.blocks import Rerank
from flowmesh_rag.embedder import Embedder, Reranker, Role
from flowmesh_rag.retrieval import RagExecutor
from flowmesh_rag.stores.base import BOOKKEEPING, Point

from flowmesh_core import InputError

__all__ = [
    "TEXTS",
    "WORDS",
    "LengthReranker",
    "WordEmbedder",
    "WordExecutor",
    "count_words",
    "make_point",
]

WORDS = ["lamp", "sea", "ship", "tower"]
TEXTS = [
    "lamp lamp tower",
    "sea ship",
    "ship ship ship lamp",
    "tower",
    "sea sea tower",
    "lamp sea ship tower",
]


def count_words(text: str) -> list[float]:
    return [float(text.split().count(word)) for word in WORDS]


class WordEmbedder(Embedder):
    """Counts four words; "poison" has no vector. Keeps what it was asked."""

    model = "words@1"

    def __init__(self, size: int = 4, *, tells_size: bool = True) -> None:
        self.dimensions = size if tells_size else None
        self.size = size
        self.calls: list[list[str]] = []
        self.on_call: Callable[[], None] = lambda: None
        self.closed = self.finished = 0

    def close(self) -> None:
        self.closed += 1

    def _embed(
        self, texts: Sequence[str], *, role: Role, stop: Callable[[], None], normalize: bool
    ) -> Any:
        assert role == "query"
        self.calls.append(list(texts))
        self.on_call()
        stop()
        if "poison" in texts:
            raise InputError("poison has no vector")
        self.finished += 1
        import numpy as np

        numbers = [[*count_words(text), 0.0][: self.size] for text in texts]
        return np.asarray(numbers, dtype=np.float32)


class LengthReranker(Reranker):
    """Likes short texts; keeps what it was asked."""

    model = "short@1"

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []

    def score(self, pairs: Sequence[tuple[str, str]], *, stop: Callable[[], None]) -> list[float]:
        stop()
        self.calls.append(list(pairs))
        return [-float(len(text)) for _, text in pairs]


class WordExecutor(RagExecutor):
    """The executor with these models in place of loaded ones."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.words, self.short, self.opened = WordEmbedder(), LengthReranker(), 0

    def open_embedder(self, ctx: Any) -> Embedder:
        self.opened += 1
        return self.words

    def open_reranker(self, ctx: Any, block: Rerank) -> Reranker:
        return self.short


def make_point(number: int, text: str) -> Point:
    ours = {"source_id": f"{number}.md", "digest": "d", "model": "words@1", "chunks": 1}
    return Point(
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))),
        vector=count_words(text),
        text=text,
        payload={"text": text, "source": f"{number}.md", BOOKKEEPING: ours},
    )
