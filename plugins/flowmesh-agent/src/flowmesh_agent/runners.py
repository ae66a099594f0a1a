"""Opens what runs the agents of one task: models, network, tools and sandbox.

Whatever a worker refuses is refused here, before a model is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flowmesh_agent.answer import Runner
from flowmesh_agent.budget import Budget
from flowmesh_agent.hosts import open_client
from flowmesh_agent.sandbox import Sandbox
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock, AgentModel, Role
from flowmesh_agent.tools import Tool, ToolContext, open_tools
from flowmesh_agent.trace import Trace
from flowmesh_core import DeadlineError, Outcome, RunContext, SecretMask

if TYPE_CHECKING:  # needs the engine
    from flowmesh_agent.llm import Models, OpenedModel

__all__ = ["BUILD_S", "Runners", "open_runners"]

BUILD_S = 600.0
"""Seconds in which all models must be ready; one to serve may have to be fetched and loaded."""

_PROGRAMS = ("python", "shell")


@attrs.frozen(kw_only=True)
class Runners:
    """Runs the agents of one task.

    Attributes:
        llm: Name of the lead's model.
        build: Returns the runner of one item, from its folder, budget, trace and deadline.
    """

    llm: str
    build: Callable[[Path, Budget, Trace, float], Runner]


@contextlib.asynccontextmanager
async def open_runners(
    ctx: RunContext, block: AgentBlock, mask: SecretMask
) -> AsyncIterator[Runners]:
    """Open what the agents of a task need, for as long as the context lasts.

    Args:
        ctx: Of the task.
        block: The lead and its workers, limits capped.
        mask: Of all secrets that they and the operator have.

    Raises:
        FlowmeshError: A tool, server or model is not allowed, not there, or not well described,
            or a model did not get ready.
    """
    from flowmesh_agent.llm import Models  # noqa: PLC0415 - needs the engine

    settings: AgentSettings = ctx.settings or AgentSettings()
    sandbox = Sandbox.from_settings(settings)
    run_task = functools.partial(_run_task, ctx)
    async with Models(settings, run_task) as models, open_client(settings.http_allow) as http:
        shared = ToolContext(
            folder=ctx.folder,
            seconds=block.limits.tool_seconds,
            settings=settings,
            sandbox=sandbox,
            http=http,
            run_task=run_task,
            log=lambda line: ctx.log(mask.text(line)),
        )
        bench = _Bench(block=block, models=models, shared=shared, mask=mask, clock=ctx.clock)
        bench.check()
        await _check_sandbox(sandbox, settings, bench.roles, ctx)
        asked = [role.model or block.model or AgentModel() for role in bench.roles]
        lead, *_ = await _open_models(models, asked)
        yield Runners(llm=lead.name, build=bench.build)


@attrs.define(kw_only=True, eq=False)
class _Bench:
    """What all items of a task share."""

    block: AgentBlock
    models: Models
    shared: ToolContext
    mask: SecretMask
    clock: Callable[[], float]
    roles: Sequence[Role] = attrs.field(init=False)
    tools: Mapping[int, Sequence[Tool[Any]]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.roles = [self.block, *self.block.workers.values()]
        # Once for all items: to look them up takes milliseconds.
        self.tools = {id(role): open_tools(role.tools, self.shared.settings) for role in self.roles}

    def check(self) -> None:
        """Raise what the first item would."""
        from flowmesh_agent.output import build_output  # noqa: PLC0415 - needs the engine

        for role in self.roles:
            self._toolsets(self.shared, role, ())
        if self.block.output_schema is not None:
            build_output(self.block.output_schema, self.block.output_mode)

    def build(self, folder: Path, budget: Budget, trace: Trace, deadline: float) -> Runner:
        from flowmesh_agent.loop import AgentRunner  # noqa: PLC0415 - needs the engine

        return AgentRunner(
            lead=self.block,
            models=self.models,
            toolsets=functools.partial(self._toolsets, attrs.evolve(self.shared, folder=folder)),
            folder=folder,
            budget=budget,
            trace=trace,
            mask=self.mask,
            deadline=deadline,
            clock=self.clock,
        )

    def _toolsets(self, item: ToolContext, role: Role, given: Sequence[Tool[Any]]) -> Sequence[Any]:
        from flowmesh_agent.toolset import build_toolsets  # noqa: PLC0415 - needs the engine

        return build_toolsets(role, given, ctx=item, mask=self.mask, tools=self.tools[id(role)])


async def _open_models(models: Models, asked: Sequence[AgentModel]) -> list[OpenedModel]:
    async def open_all() -> list[OpenedModel]:
        return [await models.open(spec) for spec in asked]

    try:
        return await asyncio.wait_for(open_all(), BUILD_S)
    except asyncio.TimeoutError as exc:
        raise DeadlineError(f"the models of agents were not ready within {BUILD_S:g} s") from exc


async def _check_sandbox(
    sandbox: Sandbox, settings: AgentSettings, roles: Sequence[Role], ctx: RunContext
) -> None:
    named = {use.name for role in roles for use in role.tools if settings.allows(use.name)}
    if named.isdisjoint(_PROGRAMS):
        return
    missing = await asyncio.to_thread(sandbox.check)
    if missing:
        ctx.log(f"programs of agents are limited, but not jailed: {missing}", level="warning")


async def _run_task(ctx: RunContext, spec: Mapping[str, Any]) -> Outcome:
    """Run a task for an agent, and remove what it left if it has come to its end.

    There may be one for each step of a model; one that failed is kept, to look into.
    """
    outcome = await ctx.run_task(spec)
    if outcome.ok and outcome.folder and spec.get("taskType") != "serve":  # which still runs
        shutil.rmtree(outcome.folder, ignore_errors=True)
    return outcome
