from __future__ import annotations

from typing import Any

import pytest
from flowmesh_rag.queries import Query
from flowmesh_rag.results import Found, build_result, payload_fields
from flowmesh_rag.spec import RagSpec
from flowmesh_rag.stores.base import BOOKKEEPING, Hit

PAYLOAD = {"text": "A lamp", "source": "a.md", "page": 3, "deep": {"n": 1}, BOOKKEEPING: {"x": 1}}
HITS = [Found(hit=Hit(id="u-1", score=0.75, payload=PAYLOAD)), Found(hit=Hit(id=7, score=0.5))]
QUERIES = [Query(index=4, text="lamp?", metadata={"lang": "en"}), Query(index=5, text="sea?")]
GENERATE = {"task": {"model": {"source": {"identifier": "acme/small"}}}}


def read(**changes: Any) -> RagSpec:
    base = {"store": {"type": "sqlite", "collection": "docs"}, "query": "x"}
    return RagSpec.model_validate({"taskType": "rag", **base, **changes})


def build(spec: RagSpec, **changes: Any) -> dict[str, Any]:
    known = {"model": "acme/small", "usage": {"latency_sec": 1.5, "embed_sec": 0.5}, **changes}
    return build_result(spec, QUERIES, [HITS, []], **known)


def test_a_qdrant_result_has_all_that_the_earlier_one_had_and_only_adds() -> None:
    place = {"url": "http://qdrant:6333", "collection": "docs"}
    result = build(read(store=None, qdrant=place, search={"top_k": 7}))
    assert result == {
        "ok": True,
        "executor": "rag",
        "qdrant": place,
        "store": {"type": "qdrant", **place},
        "embedding": {"model": "acme/small"},
        "search": {"top_k": 7},
        "queries": [
            {
                "index": 4,
                "query": "lamp?",
                "metadata": {"lang": "en"},
                "items": [
                    {
                        "id": "u-1",
                        "score": 0.75,
                        "payload": {
                            "text": "A lamp",
                            "source": "a.md",
                            "page": 3,
                            "deep": {"n": 1},
                        },
                    },
                    {"id": 7, "score": 0.5, "payload": None},
                ],
            },
            {"index": 5, "query": "sea?", "items": []},
        ],
        "usage": {"latency_sec": 1.5, "embed_sec": 0.5, "num_queries": 2, "total_results": 2},
    }


def test_an_embedded_store_has_no_address() -> None:
    result = build(read())
    assert result["store"] == {"type": "sqlite", "collection": "docs"}
    assert "qdrant" not in result


def test_no_key_is_in_a_result() -> None:
    secret = {"url": "https://q", "collection": "docs", "api_key": "sekrit"}
    assert "sekrit" not in str(build(read(store=None, qdrant=secret)))


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        (False, None),
        (["page"], {"page": 3}),
        (["deep.n", "missing"], {"deep": {"n": 1}}),
        (["deep[].n"], {"deep": {"n": 1}}),
        ([BOOKKEEPING], {BOOKKEEPING: {"x": 1}}),
    ],
)
def test_a_payload_shows_what_was_asked_for(wanted: Any, shown: Any) -> None:
    result = build(read(search={"with_payload": wanted}))
    assert result["queries"][0]["items"][0]["payload"] == shown


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, True),
        ({"search": {"with_payload": False}}, False),
        ({"search": {"with_payload": ["a"]}}, ["a"]),
        ({"rerank": {"model": "m", "text_field": "body"}}, True),
        (
            {"search": {"with_payload": False}, "rerank": {"model": "m", "text_field": "body"}},
            ["body"],
        ),
        (
            {"search": {"with_payload": ["page", "a"]}, "generate": GENERATE},
            ["page", "a", "text", "source", "title", "start", "end"],
        ),
    ],
)
def test_the_store_also_brings_what_is_read_here(changes: Any, fields: Any) -> None:
    assert payload_fields(read(**changes)) == fields


def test_scores_of_a_cross_encoder_stand_beside_those_of_the_store() -> None:
    found = [[Found(hit=Hit(id=1, score=0.5), rerank_score=0.0)], []]
    result = build_result(read(), QUERIES, found, model="", usage={})
    assert result["queries"][0]["items"] == [
        {"id": 1, "score": 0.5, "payload": None, "rerank_score": 0.0}
    ]


def test_each_query_has_its_answer() -> None:
    said = [{"text": "yes"}, {"text": None}]
    result = build(read(generate=GENERATE), answers=said)
    assert [entry["answer"] for entry in result["queries"]] == said
    with pytest.raises(ValueError, match="shorter"):
        build(read(generate=GENERATE), answers=said[:1])
