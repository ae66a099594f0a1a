"""Gives pydantic-ai the tools of an agent: arguments checked, calls timed.

What they return or raise, the budget and the trace are the gate's.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import warnings
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_core import SchemaValidator, core_schema

from flowmesh_agent.mcp_config import find_servers
from flowmesh_agent.spec import Role
from flowmesh_agent.tools import Tool, ToolContext, explain, open_tools
from flowmesh_core import SecretMask

__all__ = ["KEPT_CHARS", "Toolset", "build_toolsets", "keep_text", "within"]

KEPT_CHARS = 4 * 2**20
_ANY_OBJECT = SchemaValidator(
    core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
)


async def within(seconds: float, name: str, work: Awaitable[Any]) -> Any:
    """Await one call of a tool.

    Raises:
        ToolFailed: It took too long.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as exc:
        raise ToolFailed(f"{name} did not end within {seconds:g} s") from exc


def keep_text(folder: Path, text: str) -> str:
    """Write a text to a new file of the folder and return its name.

    Programs of the agent may have put links there: none is followed, nothing is overwritten.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        number = 1
        while True:
            name = f"tool-result-{number}.txt"
            try:
                file = os.open(name, flags, 0o600, dir_fd=place)
                break
            except FileExistsError:
                number += 1
    finally:
        os.close(place)
    with os.fdopen(file, "w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)
    return name


class Toolset(AbstractToolset[Any]):  # type: ignore[misc] # the engine's types are not read
    """Tools of flowmesh as pydantic-ai wants them.

    Args:
        tools: No two of one name.
        ctx: What each call is given.
        seconds: For one call.
        name: In messages of the library.
    """

    def __init__(
        self, tools: Sequence[Tool[Any]], ctx: ToolContext, seconds: float, name: str = "flowmesh"
    ) -> None:
        self._name = name
        self._tools = {tool.name: tool for tool in tools}
        self._ctx = ctx
        self._seconds = seconds

    @property
    def id(self) -> str | None:
        """Its name in messages of the library."""
        return self._name

    async def get_tools(self, ctx: Any) -> dict[str, Any]:
        """Return what the model is told of each tool."""
        return {
            name: ToolsetTool(
                toolset=self,
                tool_def=ToolDefinition(
                    name=name,
                    description=tool.description,
                    parameters_json_schema=_schema_of(tool.parameters),  # type: ignore[arg-type]
                ),
                max_retries=ctx.max_retries,
                args_validator=_ANY_OBJECT,
            )
            for name, tool in self._tools.items()
        }

    async def call_tool(self, name: str, tool_args: dict[str, Any], ctx: Any, tool: Any) -> Any:
        """Check the arguments and call the tool."""
        ours = self._tools[name]
        arguments = _check(ours, tool_args)
        return await within(self._seconds, name, ours.call(self._ctx, arguments))


@functools.cache
def _schema_of(parameters: Any) -> dict[str, Any]:
    """Return what the model is told of arguments; the library asks for it before each step."""
    schema: dict[str, Any] = parameters.model_json_schema()
    return schema


def _check(tool: Tool[Any], arguments: Mapping[str, Any]) -> BaseModel:
    try:
        checked: BaseModel = tool.parameters.model_validate(arguments)
    except ValidationError as exc:
        raise ToolFailed(f"{tool.name} cannot be called so: {explain(exc)}") from exc
    return checked


def build_toolsets(
    role: Role,
    given: Sequence[Tool[Any]],
    *,
    ctx: ToolContext,
    mask: SecretMask,
    tools: Sequence[Tool[Any]] | None = None,
) -> list[Any]:
    """Return the toolsets of one agent: its tools, those that a form gives it, and MCP servers.

    Args:
        role: The agent.
        given: Tools of a form.
        ctx: What each call is given.
        mask: Of all secrets, for what servers say of their faults.
        tools: The agent's own, where they have been opened already.

    Raises:
        FlowmeshError: A tool or server is not allowed, not known, or its options do not fit.
    """
    tools = open_tools(role.tools, ctx.settings) if tools is None else tools
    toolsets: list[Any] = [Toolset(tools, ctx, ctx.seconds)] if tools else []
    if given:  # they run whole agents, which the item's own time ends
        toolsets.append(Toolset(given, ctx, math.inf, "form"))
    if role.mcp:
        environ = os.environ  # noqa: TID251 - the operator's file names variables of its own
        found = find_servers(role.mcp, ctx.settings, environ)
        with warnings.catch_warnings():  # the library adds a filter for the whole process
            from flowmesh_agent.mcp_servers import open_server  # noqa: PLC0415 - takes a second

        toolsets += [
            open_server(name, role.mcp[name], *where, ctx=ctx, mask=mask)
            for name, where in found.items()
        ]
    return toolsets
