"""Train here, ask there: what one worker trained, another one loads from the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.testing import (
    StandInOrchestrator,
    WorkerProcess,
    build_tiny_llama,
    run_task,
)

pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("flowmesh_transformers")

ROWS = [
    {"question": "who keeps the light?", "answer": "old marta keeps it"},
    {"question": "what colour is it?", "answer": "the light is green"},
]
ASK: dict[str, Any] = {
    "taskType": "inference",
    "executor": "transformers",
    "data": {"type": "list", "items": [row["question"] for row in ROWS]},
    "inference": {"temperature": 0, "max_tokens": 24},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers that has learned nothing."""
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.02)


def test_what_one_worker_learned_another_one_answers(
    tiny: Path,
    flowmesh_orchestrator: StandInOrchestrator,
    flowmesh_redis_url: str,
    tmp_path: Path,
) -> None:
    host = flowmesh_orchestrator
    base = {
        "metadata": {"name": "lighthouse"},
        "spec": {
            "model": {"source": {"type": "folder", "path": str(tiny)}},
            "output": {"destination": {"type": "http", "url": host.results_url}},
        },
    }
    teach = {
        "taskType": "lora_sft",
        "data": {"examples": ROWS, "prompt_field": "question", "response_field": "answer"},
        "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        "training": {
            "max_steps": 300,
            "batch_size": 2,
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "completion_only_loss": True,
            "logging_steps": 50,
        },
    }
    adapter = {"name": "lighthouse", "url": "${teach.result.final_lora_archive_url}"}
    ask = {**ASK, "model": {"adapters": [adapter]}}
    stages = [{"name": "teach", "spec": teach}, {"name": "ask", "spec": ask}]
    ids = host.submit_pipeline(stages, base)
    with WorkerProcess(flowmesh_redis_url, tmp_path / "here", worker_id="here"):
        assert host.wait_task(ids["teach"], 120).status == "DONE", host.task(ids["teach"]).error
    with WorkerProcess(flowmesh_redis_url, tmp_path / "there", worker_id="there"):
        assert host.wait_task(ids["ask"], 120).status == "DONE", host.task(ids["ask"]).error
    learned = host.result(ids["teach"])["result"]
    assert learned["final_lora_archive_uploaded"] is True
    (archive,) = host.folder(ids["teach"]).rglob("final_lora.tar.gz")
    assert archive.stat().st_size == learned["final_lora_archive_bytes"]
    told = [item["output"] for item in host.result(ids["ask"])["result"]["items"]]
    assert told == [row["answer"] for row in ROWS]
    untaught = {**ASK, "model": {"source": {"type": "folder", "path": str(tiny)}}}
    before = run_task("transformers", untaught, folder=tmp_path / "before")
    assert [item["output"] for item in before.result["items"]] != told
