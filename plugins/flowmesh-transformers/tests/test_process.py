"""The installed executor in a process of its own, as a worker runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.testing import StandInOrchestrator, WorkerProcess, run_task

pytest.importorskip("torch")


def test_the_installed_executor_answers_in_its_own_process(tiny: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "taskType": "inference",
        "model": {"source": {"type": "folder", "path": str(tiny)}},
        "data": {"type": "list", "items": ["the quick", "brown fox"]},
        "inference": {"temperature": 0, "max_tokens": 6},
        "postprocess": {"jsonl_export": {"path": "said.jsonl"}},
    }
    run = run_task("transformers", spec, folder=tmp_path)
    assert run.error is None
    assert [item["index"] for item in run.result["items"]] == [0, 1]
    assert run.progress[-1]["fraction"] == 1
    bad = run_task("transformers", {**spec, "inference": {"logprobs": 1}}, folder=tmp_path)
    assert "cannot honour logprobs" in str(bad.error)


def test_a_merged_dispatch_over_the_queue_gives_every_child_the_answer_it_gets_alone(
    tiny: Path,
    flowmesh_orchestrator: StandInOrchestrator,
    flowmesh_redis_url: str,
    tmp_path: Path,
) -> None:
    """A leader and its children as the earlier orchestrator merges them, one batch on a worker."""
    host = flowmesh_orchestrator
    url = f"{host.url}/api/v1/results"
    asked = [("the quick", "Be brief."), ("brown fox", "Sing."), ("the quick", "Be brief.")]
    specs: list[dict[str, Any]] = [
        {
            "taskType": "inference",
            "model": {"source": {"type": "folder", "path": str(tiny)}},
            "data": {"type": "list", "items": [prompt]},
            "inference": {"temperature": 0, "max_tokens": 8, "system_prompt": system},
        }
        for prompt, system in [*asked, ("long " * 400, "Too long.")]
    ]
    delivered = {"output": {"destination": {"type": "http", "url": url}}}
    documents = [{"metadata": {"name": "m"}, "spec": {**spec, **delivered}} for spec in specs]
    with WorkerProcess(flowmesh_redis_url, tmp_path / "worker"):
        ids = host.submit_together(documents)
        host.wait_workers(1, 30)
        ended = [host.wait_task(task_id, 120).status for task_id in ids]
    results = [host.result(task_id)["result"] for task_id in ids]
    assert ended[:3] == ["DONE"] * 3
    assert results[2]["items"] == results[0]["items"]
    for result, spec in zip(results[:2], specs[:2], strict=True):
        alone = run_task("transformers", spec, folder=tmp_path / "alone")
        assert result["items"] == alone.result["items"]
        assert result["usage"]["prompt_tokens"] == alone.result["usage"]["prompt_tokens"]
    assert results[3]["ok"] is False
    assert "the model takes 256; shorten it" in results[3]["error"]["message"]
    (group,) = [result["group"] for result in results if "children" in result]
    assert (group["members"], group["computed"]) == (4, 3), "equal work is done once"
    used = [result["usage"]["completion_tokens"] for result in results[:2]]
    assert group["usage"]["completion_tokens"] == sum(used)
