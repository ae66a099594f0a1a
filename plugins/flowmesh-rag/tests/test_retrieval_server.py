"""Searches of collections that other programs made, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from word_models import TEXTS, WordExecutor, count_words

from flowmesh_core import ExecutionError, FlowmeshError, InputError, RowSource

pytest.importorskip("numpy", reason="vectors are arrays")
pytest.importorskip("qdrant_client", reason="the client is what is tested")
pytest.importorskip("qdrant_edge", reason="it counts the words")
from qdrant_client import models
from qdrant_server import Fault, QdrantServer, serve_qdrant

KEY = "sekrit-of-the-operator"
DOCUMENT = Path(__file__).parents[3] / "tests" / "unit" / "documents" / "rag.yaml"


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with serve_qdrant(embed=count_words) as running:
        make_collection(running)
        yield running


def make_collection(server: QdrantServer, name: str = "docs", vector: str = "") -> None:
    """Make a collection as other programs do, points numbered."""
    params = models.VectorParams(size=4, distance=models.Distance.COSINE)
    server.client.create_collection(name, vectors_config={vector: params} if vector else params)
    points = [
        models.PointStruct(
            id=number,
            vector={vector: count_words(text)} if vector else count_words(text),
            payload={"document": text},
        )
        for number, text in enumerate(TEXTS)
    ]
    server.client.upsert(name, points)


def document(server: QdrantServer) -> dict[str, Any]:
    """The contract's document, for this server."""
    spec: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())["spec"]
    place = {**spec["qdrant"], "url": server.url, "api_key": KEY}
    return {**spec, "qdrant": place}


def requests(server: QdrantServer) -> list[str]:
    return [seen.path.rpartition("/points/")[2] for seen in server.seen if "/points" in seen.path]


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the document lies in the repository alone")
def test_the_contracts_document_runs_and_its_result_has_the_contracts_keys(
    server: QdrantServer, make_context: Any
) -> None:
    spec = {**document(server), "query": "ship lamp"}
    result = WordExecutor().run(make_context(spec)).result
    assert result["ok"] is True
    assert result["executor"] == "rag"
    assert result["qdrant"] == {"collection": "docs", "url": server.url}
    assert result["embedding"].keys() == {"model"}
    assert result["search"] == {"top_k": 5}
    (query,) = result["queries"]
    assert (query["index"], query["query"]) == (0, "ship lamp")
    assert len(query["items"]) == 5
    assert all(item.keys() == {"id", "score", "payload"} for item in query["items"])
    best = query["items"][0]
    assert (best["id"], best["payload"]) == (2, {"document": "ship ship ship lamp"})
    assert best["score"] == pytest.approx(4 / 20**0.5, abs=1e-5)
    assert result["usage"].keys() >= {"latency_sec", "num_queries", "total_results"}
    assert KEY not in str(result)
    assert {seen.headers.get("api-key") for seen in server.seen} == {KEY}


@pytest.mark.parametrize("vector", ["", "fast-all-minilm-l6-v2", "dense"])
def test_the_vector_of_an_old_collection_is_found_out(
    server: QdrantServer, make_context: Any, vector: str
) -> None:
    make_collection(server, "old", vector)
    spec = {"taskType": "rag", "qdrant": {"url": server.url, "collection": "old"}, "query": "tower"}
    (query,) = WordExecutor().run(make_context(spec)).result["queries"]
    assert query["items"][0]["id"] == 3
    assert query["items"][0]["score"] == pytest.approx(1.0)


def test_a_group_is_one_request(server: QdrantServer, make_context: Any) -> None:
    spec = {"taskType": "rag", "qdrant": {"url": server.url, "collection": "docs"}}
    executor = WordExecutor()
    ctxs = [
        make_context(
            {**spec, "data": {"type": "list"}},
            task_id=f"t{number}",
            rows=RowSource.from_prompts([text, "lamp"]),
        )
        for number, text in enumerate(TEXTS)
    ]
    got = [outcome.result for _, outcome in executor.run_group(ctxs)]
    assert requests(server) == ["query/batch"]
    assert len(executor.words.calls) == 1
    assert len(server.seen[-1].body["searches"]) == len(TEXTS) + 1
    for number, result in enumerate(got):
        own, shared = result["queries"]
        assert own["items"][0]["id"] == number
        assert shared["items"] == got[0]["queries"][1]["items"]


def test_the_server_itself_may_embed(server: QdrantServer, make_context: Any) -> None:
    spec = {
        "taskType": "rag",
        "qdrant": {"url": server.url, "collection": "docs"},
        "embedding": {"server": True, "remote_model": "acme/words"},
        "query": ["tower", "sea ship"],
    }
    executor = WordExecutor()
    executor.load(make_context(spec))
    result = executor.run(make_context(spec)).result
    assert executor.opened == 0
    assert [one["items"][0]["id"] for one in result["queries"]] == [3, 1]
    assert result["embedding"] == {"model": "acme/words"}
    assert "embed_sec" not in result["usage"]


def fail(server: QdrantServer, make_context: Any, **fault: Any) -> FlowmeshError:
    server.fault = Fault(**fault)
    spec = {**document(server), "query": "ship"}
    with pytest.raises(FlowmeshError, match=r"127\.0\.0\.1") as caught:
        WordExecutor().run(make_context(spec))
    return caught.value


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the document lies in the repository alone")
def test_faults_that_pass_are_tried_again_and_others_are_final(
    server: QdrantServer, make_context: Any
) -> None:
    busy = fail(server, make_context, status=503, text="busy")
    assert isinstance(busy, ExecutionError)
    assert busy.retriable
    refused = fail(server, make_context, status=401, text=f"Invalid key {KEY}")
    assert isinstance(refused, InputError)
    assert not refused.retriable
    assert KEY not in str(refused)
    gone = fail(server, make_context, status=404, text="Not found")
    assert "has no collection 'docs'" in str(gone)
    assert not gone.retriable
