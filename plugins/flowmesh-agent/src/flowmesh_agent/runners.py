"""Opens what runs the agents of one task: models, network, tools and sandbox.

Whatever a worker refuses is refused here, before a model is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
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
    from flowmesh_agent.loop import AgentRunner  # noqa: PLC0415 - as above
    from flowmesh_agent.output import build_output  # noqa: PLC0415 - as above
    from flowmesh_agent.toolset import build_toolsets  # noqa: PLC0415 - as above

    settings: AgentSettings = ctx.settings or AgentSettings()
    roles: list[Role] = [block, *block.workers.values()]
    sandbox = Sandbox.from_settings(settings)
    run_task = _Children(ctx).run
    async with Models(settings, run_task) as models, open_client(settings.http_allow) as http:

        def toolsets(item: ToolContext, role: Role, given: Sequence[Tool[Any]]) -> Sequence[Any]:
            tools = opened[id(role)]  # once for all items: to look them up takes milliseconds
            return build_toolsets(role, given, ctx=item, mask=mask, tools=tools)

        def build(folder: Path, budget: Budget, trace: Trace, deadline: float) -> Runner:
            item = attrs.evolve(shared, folder=folder)
            return AgentRunner(
                lead=block,
                models=models,
                toolsets=lambda role, given: toolsets(item, role, given),
                folder=folder,
                budget=budget,
                trace=trace,
                mask=mask,
                deadline=deadline,
                clock=ctx.clock,
            )

        shared = ToolContext(
            folder=ctx.folder,
            seconds=block.limits.tool_seconds,
            settings=settings,
            sandbox=sandbox,
            http=http,
            run_task=run_task,
            log=lambda line: ctx.log(mask.text(line)),
        )
        opened = {id(role): open_tools(role.tools, settings) for role in roles}
        for role in roles:
            toolsets(shared, role, ())
        if block.output_schema is not None:
            build_output(block.output_schema, block.output_mode)
        await _check_sandbox(sandbox, settings, roles, ctx)
        asked = [role.model or block.model or AgentModel() for role in roles]
        lead, *_ = await _open_models(models, asked)
        yield Runners(llm=lead.name, build=build)


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


class _Children:
    """Runs tasks for agents, and removes what those left that have come to their end.

    There may be one for each step of a model; one that failed is kept, to look into.
    """

    def __init__(self, ctx: RunContext) -> None:
        self._ctx = ctx
        self._started = 0

    async def run(self, spec: Mapping[str, Any]) -> Outcome:
        self._started += 1
        folder = self._ctx.folder / "children" / str(self._started)
        outcome = await self._ctx.run_task(spec)
        if outcome.ok and spec.get("taskType") != "serve":  # which still runs
            shutil.rmtree(folder, ignore_errors=True)
        return outcome
