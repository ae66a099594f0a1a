"""Whole tasks of agents in the worker's child, against a scripted endpoint; needs the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from endpoint import Call, ScriptedEndpoint, Step

from flowmesh_core.testing import TaskRun, run_task

__all__ = ["KEY", "Operator", "last_result", "obey", "results_in", "trace_of", "written_in"]

KEY = "sk-operator-9876543210"

FAKE_RAG = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl


class Rag(Executor):
    def run(self, ctx):
        if ctx.spec["query"] == "fail":
            raise ValueError("the index is gone")
        item = {"score": 0.9, "payload": {"text": "about " + ctx.spec["query"], "source": "a.md"}}
        return {"queries": [{"items": [item]}]}


@hookimpl
def flowmesh_register_executors():
    target = f"{__name__}:Rag"
    return [ExecutorInfo(name="fake.rag", task_types={"rag"}, target=target, priority=99)]
"""


class Operator:
    """Sets a worker up and runs tasks on it.

    Args:
        folder: For results.
        monkeypatch: Sets variables, which are gone after the test.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.plugin_files: list[Path] = []
        self._monkeypatch = monkeypatch

    def allow(self, **variables: str) -> None:
        """Set variables of the worker."""
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def run(self, endpoint: ScriptedEndpoint, spec: Mapping[str, Any]) -> TaskRun:
        """Run one task whose models are the endpoint's."""
        self.allow(AGENT_LLM_BASE_URL=endpoint.url, AGENT_LLM_MODEL="scripted")
        self.allow(AGENT_LLM_API_KEY=KEY)
        return run_task("agent", spec, folder=self.folder, plugin_files=self.plugin_files)

    def serve_rag(self) -> None:
        """Give the worker an executor of ``rag`` that finds one passage for anything."""
        file = self.folder.parent / "rag_plugin.py"
        file.write_text(FAKE_RAG)
        self.plugin_files = [file]


def trace_of(run: TaskRun) -> list[dict[str, Any]]:
    """Return the lines of a task's trace."""
    return [json.loads(line) for line in (run.folder / "trace.jsonl").read_bytes().splitlines()]


def results_in(run: TaskRun) -> dict[str, Any]:
    """Return what each tool returned, or the error it ended with, by its name."""
    lines = [line for line in trace_of(run) if line["kind"] == "tool_result"]
    return {line["tool"]: line.get("result", line.get("error")) for line in lines}


def written_in(folder: Path) -> str:
    """Return all that lies in a folder, as one text."""
    files: Iterator[Path] = (path for path in folder.rglob("*") if path.is_file())
    return "\n".join(path.read_bytes().decode(errors="replace") for path in files)


def obey(*orders: Call, then: Step = "I have done all of it") -> list[Step]:
    """Return the steps of a model that follows one order after the other."""
    return [*orders, then]


def last_result(body: Mapping[str, Any]) -> Any:
    """Return what the model saw last of a tool, as it stands in a request."""
    return [message for message in body["messages"] if message["role"] == "tool"][-1]["content"]
