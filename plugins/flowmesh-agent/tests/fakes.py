"""Agents that do what a test says, without an engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from flowmesh_agent import plugin
from flowmesh_agent.answer import AgentAnswer, TokenUsage
from flowmesh_agent.budget import Budget
from flowmesh_agent.executor import AgentExecutor
from flowmesh_agent.runners import Runners
from flowmesh_agent.spec import AgentBlock, Role
from flowmesh_agent.tools import Tool
from flowmesh_agent.trace import Trace

from flowmesh_core import ExecutorInfo, RunContext, SecretMask
from flowmesh_core.testing import TaskRun, run_task

__all__ = ["Asked", "FakeRunner", "Notes", "make_executor", "run_agents"]

(_DECLARED,) = plugin.flowmesh_register_executors()
INFO: ExecutorInfo = attrs.evolve(_DECLARED, name="test.agent", places=("inline",), needs=())


@attrs.frozen(kw_only=True)
class Asked:
    """What an agent was asked, and what it has at hand."""

    name: str
    prompt: str
    schema: Mapping[str, Any] | None
    tools: Sequence[Tool[Any]]
    agent: Role
    folder: Path
    budget: Budget
    trace: Trace
    deadline: float


Behaviour = Callable[[Asked], Awaitable[AgentAnswer | str]]


@attrs.frozen(kw_only=True)
class FakeRunner:
    """Answers as ``behave`` does; each run takes one request of 10 + 5 tokens."""

    behave: Behaviour
    asked: list[Asked] = attrs.field(factory=list)
    folder: Path = Path()
    budget: Budget | None = None
    trace: Any = None
    deadline: float = 0.0

    async def run(
        self,
        agent: Role,
        prompt: str,
        *,
        name: str = "",
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Tool[Any]] = (),
    ) -> AgentAnswer:
        given: Any = {"folder": self.folder, "budget": self.budget, "trace": self.trace}
        asked = Asked(
            name=name,
            prompt=prompt,
            schema=schema,
            tools=tools,
            agent=agent,
            deadline=self.deadline,
            **given,
        )
        self.asked.append(asked)
        if self.budget is not None:
            usage = TokenUsage(prompt_tokens=10, completion_tokens=5, requests=1, cost_usd=0.25)
            self.budget.before_request()
            self.budget.after_request(usage)
        said = await self.behave(asked)
        if not isinstance(said, str):
            return said
        data = None if schema is None else json.loads(said)
        return AgentAnswer(output=said, data=data)


class Notes:
    """A trace that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, kind: str, agent: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, "agent": agent, **fields})


def make_executor(behave: Behaviour, *, on_close: Callable[[], None] = lambda: None) -> Any:
    """Return the executor's class with agents that behave so."""

    class Fake(AgentExecutor):
        def load(self, ctx: RunContext) -> None:
            """Need no engine."""

        @contextlib.asynccontextmanager
        async def open_runners(
            self, ctx: RunContext, block: AgentBlock, mask: SecretMask
        ) -> AsyncIterator[Runners]:
            def build(folder: Path, budget: Budget, trace: Trace, deadline: float) -> FakeRunner:
                return FakeRunner(
                    behave=behave, folder=folder, budget=budget, trace=trace, deadline=deadline
                )

            try:
                yield Runners(llm="fake-model", build=build)
            finally:
                on_close()

    return Fake


def run_agents(behave: Behaviour, spec: Mapping[str, Any], folder: Path) -> TaskRun:
    """Run a task whose agents behave so, in this process."""
    return run_task(make_executor(behave), spec, info=INFO, folder=folder)
