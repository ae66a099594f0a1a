"""Agents keep what the kit checks, with the real engine and an endpoint with a script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine")

from endpoint import Hang, ScriptedEndpoint, Step, call

from flowmesh_core.testing import ExecutorSuite

ENDLESS = "Wait for ever."


def answer(body: Any) -> Step:
    """Write the task to a file, then answer with it."""
    _system, task, *told = body["messages"]
    text = str(task["content"])[:1000]
    if text == ENDLESS:
        return Hang()
    return text if told else call("write_file", path="task.txt", content=text)


class TestAgent(ExecutorSuite):
    executor = "agent"


@pytest.fixture(scope="module", autouse=True)
def endpoint() -> Iterator[ScriptedEndpoint]:
    """The model's, whose port the specs name."""
    with ScriptedEndpoint(always=answer) as endpoint:
        model = {"base_url": endpoint.url, "name": "scripted"}

        def spec(*tasks: str, **agent: Any) -> dict[str, Any]:
            data = {"type": "list", "items": [*tasks]}
            return {"data": data, "agent": {"model": model, "tools": ["files"], **agent}}

        TestAgent.spec = spec("Name a colour.", "Name another one.")
        TestAgent.long_spec = spec(ENDLESS)
        TestAgent.refused = [
            {**TestAgent.spec, "task": "Name a third one."},
            {**TestAgent.spec, "configName": "nobody"},
            spec("x", tools=["shell"]),
            spec("x", tools=[{"name": "files", "root": "/"}]),
            spec("x", mcp={"docs": {"url": "http://docs.example/mcp"}}),
            spec("x", form="workforce"),
        ]
        yield endpoint
