"""Words as sparse vectors, the same for every store that keeps such vectors."""

from __future__ import annotations

import functools
from typing import Any

import qdrant_edge as edge

from flowmesh_core import InputError

__all__ = ["open_bm25"]


@functools.lru_cache(maxsize=8)
def open_bm25(language: str) -> Any:
    """Return the counter of a language's stems; for ``none``, of whole words.

    Its ``embed_document`` and ``embed_query`` give ``indices`` and ``values``; the frequency of a
    word among all documents is the store's to know.

    Raises:
        InputError: It does not know the language.
    """
    if language == "none":
        plain = {"stopwords": edge.StopwordsSet(), "stemmer": edge.DisabledStemmer()}
        return edge.Bm25(edge.Bm25Config(**plain))
    try:
        return edge.Bm25(edge.Bm25Config(language=language))
    except ValueError as exc:
        raise InputError(
            f"spec.language: {exc}; name one in English, such as german, or none"
        ) from exc
