"""The results of ``rag`` and ``rag_index``, and the former out of what was found; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from pydantic import BaseModel, ConfigDict

from flowmesh_rag.queries import Query
from flowmesh_rag.spec import RagSpec
from flowmesh_rag.stores.base import BOOKKEEPING, Hit

__all__ = ["Found", "IndexResult", "RagResult", "build_result", "payload_fields"]

_CITED = ("source", "title", "page", "start", "end")


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class RagItem(_Open):
    """A hit; ``payload`` is null when the document asked for none."""

    id: int | str
    score: float
    payload: dict[str, Any] | None
    rerank_score: float | None = None


class RagAnswer(_Open):
    """What a model wrote; ``text`` is null without a hit."""

    text: str | None
    citations: list[dict[str, Any]]
    unknown_citations: int
    finish_reason: str | None
    model: str


class RagQuery(_Open):
    """What was found for one text, best first."""

    index: int
    query: str
    metadata: dict[str, Any] | None = None
    items: list[RagItem]
    answer: RagAnswer | None = None


class RagResult(_Open):
    """Result of ``rag``: one entry of ``queries`` per text, in their order."""

    ok: Literal[True] = True
    store: dict[str, str]
    embedding: dict[str, Any]
    search: dict[str, Any]
    queries: list[RagQuery]
    usage: dict[str, float]


class IndexResult(_Open):
    """Result of ``rag_index``: how many documents and chunks came, and what became of them."""

    ok: Literal[True] = True
    store: dict[str, str]
    embedding: dict[str, Any]
    documents: dict[str, int]
    chunks: dict[str, int]
    failures: list[dict[str, str]]
    usage: dict[str, float]


@attrs.frozen(kw_only=True)
class Found:
    """A hit, with what a cross-encoder said of it, if one was asked."""

    hit: Hit
    rerank_score: float | None = None


def payload_fields(spec: RagSpec) -> bool | list[str]:
    """Return what the store is to bring: what the document asks for, and what is read here."""
    wanted = spec.search.with_payload
    needed = _read_here(spec)
    if wanted is True or not needed:
        return wanted
    return list(dict.fromkeys([*(wanted or ()), *needed]))


def build_result(
    spec: RagSpec,
    queries: Sequence[Query],
    found: Sequence[Sequence[Found]],
    *,
    model: str,
    usage: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the result; for a Qdrant server with all fields of the earlier worker's.

    Args:
        spec: The task's.
        queries: What it asked.
        found: For each query, best first.
        model: What the vectors came from; empty where none were needed.
        usage: Seconds and counts beside those of queries and hits.
        answers: To each query, if the task generates them.
    """
    target = spec.target
    where = {"collection": target.collection, "url": target.url}
    store = {"type": target.type, **{key: value for key, value in where.items() if value}}
    entries: list[dict[str, Any]] = [
        _build_query(spec, query, hits) for query, hits in zip(queries, found, strict=True)
    ]
    for entry, answer in zip(entries, answers or (), strict=answers is not None):
        entry["answer"] = dict(answer)
    return {
        "ok": True,
        "executor": "rag",
        **({"qdrant": where} if target.type == "qdrant" else {}),
        "store": store,
        "embedding": {"model": model},
        "search": {"top_k": spec.search.top_k},
        "queries": entries,
        "usage": {
            **usage,
            "num_queries": len(entries),
            "total_results": sum(len(entry["items"]) for entry in entries),
        },
    }


def _read_here(spec: RagSpec) -> list[str]:
    needed = [spec.rerank.text_field] if spec.rerank else []
    return [*needed, spec.generate.text_field, *_CITED] if spec.generate else needed


def _build_query(spec: RagSpec, query: Query, found: Sequence[Found]) -> dict[str, Any]:
    entry = {"index": query.index, "query": query.text}
    if query.metadata:
        entry["metadata"] = dict(query.metadata)
    return {**entry, "items": [_build_item(spec, one) for one in found]}


def _build_item(spec: RagSpec, found: Found) -> dict[str, Any]:
    payload = _shown(found.hit.payload, spec.search.with_payload)
    item: dict[str, Any] = {"id": found.hit.id, "score": found.hit.score, "payload": payload}
    if found.rerank_score is not None:
        item["rerank_score"] = found.rerank_score
    return item


def _shown(payload: Mapping[str, Any] | None, wanted: bool | Sequence[str]) -> Any:
    """Leave out what the document did not ask for, and what the index keeps for itself."""
    if payload is None or wanted is False:
        return None
    if wanted is True:
        return {key: value for key, value in payload.items() if key != BOOKKEEPING}
    names = {name.partition(".")[0].partition("[")[0] for name in wanted}
    return {key: value for key, value in payload.items() if key in names}
