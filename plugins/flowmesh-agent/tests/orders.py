"""Runs of one agent to try the engine with; imports the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from endpoint import ScriptedEndpoint
from flowmesh_agent.answer import AgentAnswer
from flowmesh_agent.budget import Budget
from flowmesh_agent.engine import Order, run_agent
from flowmesh_agent.llm import Models, OpenedModel
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentModel, Limits
from pydantic_ai import FunctionToolset
from pydantic_ai.messages import ToolReturnPart
from scripted import ScriptedModel

from flowmesh_core import Outcome, SecretMask

__all__ = ["Notes", "ask", "make_order", "no_task", "returned", "run"]


class Notes:
    """Keeps what a run writes to the trace, which must be JSON."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, kind: str, agent: str, **fields: Any) -> None:
        self.lines.append(json.loads(json.dumps({"kind": kind, "agent": agent, **fields})))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def make_order(
    model: Any, *tools: Any, limits: Mapping[str, Any] | None = None, **fields: Any
) -> Order:
    """Return an order for a model, opened or not; tools are coroutine functions."""
    known: dict[str, Any] = {
        "name": "",
        "prompt": "go",
        "instructions": "Be brief.",
        "opened": model if isinstance(model, OpenedModel) else OpenedModel(model=model, name="m"),
        "toolsets": [FunctionToolset([*tools])] if tools else [],
        "folder": Path("/nowhere"),
        "schema": None,
        "output_mode": "auto",
        "budget": Budget(Limits(**(limits or {}))),
        "trace": Notes(),
        "mask": SecretMask({"KEY": "s3cret"}),
        "seconds": 20,
    }
    return Order(**{**known, **fields})


def run(model: Any, *tools: Any, **fields: Any) -> AgentAnswer:
    """Run an agent to its end."""
    return asyncio.run(run_agent(make_order(model, *tools, **fields)))


def returned(model: ScriptedModel) -> Sequence[tuple[str, Any]]:
    """Return how each call of the run ended and what the model saw of it."""
    parts = [part for message in model.requests[-1][0] for part in message.parts]
    return [
        (part.outcome, part.content if part.outcome == "failed" else part.content["result"])
        for part in parts
        if isinstance(part, ToolReturnPart)
    ]


async def no_task(spec: Mapping[str, Any]) -> Outcome:
    raise AssertionError(f"nobody asked for a task, got {spec}")


def ask(
    endpoint: ScriptedEndpoint | None,
    *tools: Any,
    model: Mapping[str, Any] | None = None,
    settings: AgentSettings | None = None,
    run_task: Any = no_task,
    **fields: Any,
) -> AgentAnswer:
    """Run an agent on the operator's endpoint; ``model`` are fields of ``agent.model``."""
    url = endpoint.url if endpoint else ""
    known = settings or AgentSettings(llm_base_url=url, llm_model="tiny")

    async def main() -> AgentAnswer:
        async with Models(known, run_task) as models:
            opened = await models.open(AgentModel(**(model or {})))
            return await run_agent(make_order(opened, *tools, **fields))

    return asyncio.run(main())
