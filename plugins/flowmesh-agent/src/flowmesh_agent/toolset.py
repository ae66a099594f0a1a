"""Gives pydantic-ai the tools of an agent: arguments checked, calls timed, long results kept.

Errors that are not for the model to read, the budget and the trace are the gate's.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from pydantic import BaseModel, ValidationError
from pydantic_ai.exceptions import ModelRetry, ToolFailed
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_core import SchemaValidator, core_schema, to_jsonable_python

from flowmesh_agent.spec import Limits, Role
from flowmesh_agent.tools import Tool, ToolContext, ToolError, explain, open_tools
from flowmesh_core import SecretMask

__all__ = ["Guard", "Toolset", "build_toolsets"]

KEPT_CHARS = 4 * 2**20
_ANY_OBJECT = SchemaValidator(
    core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
)


@attrs.frozen(kw_only=True)
class Guard:
    """Times one call of a tool and cuts what it returns.

    Attributes:
        folder: Where results are kept that are too long for the model.
        seconds: For one call.
        result_chars: Of one result, that the model sees.
        mask: Looked through before anything is cut, since half a secret is not found any more.
    """

    folder: Path
    seconds: float
    result_chars: int
    mask: SecretMask

    async def call(self, name: str, work: Awaitable[Any]) -> Any:
        """Await a call and return its result as JSON data.

        Raises:
            ToolFailed: It took too long, or the tool has told the model why it failed.
        """
        try:
            result = await asyncio.wait_for(work, self.seconds)
        except asyncio.TimeoutError as exc:
            raise ToolFailed(f"{name} did not end within {self.seconds:g} s") from exc
        except (ToolError, ToolFailed, ModelRetry) as exc:
            raise ToolFailed(self.mask.text(str(exc))) from exc
        plain = self.mask.value(to_jsonable_python(result, fallback=_describe))
        text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
        return plain if len(text) <= self.result_chars else self._shorten(text)

    def _shorten(self, text: str) -> str:
        kept = keep_text(self.folder, text[:KEPT_CHARS])
        note = f"\n[cut: {len(text)} characters in all, kept in the file {kept}]"
        return text[: max(0, self.result_chars - len(note))] + note


def _describe(value: Any) -> str:
    return f"[{type(value).__name__}, not shown]"


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
        guard: What stands around each call.
        name: In messages of the library.
    """

    def __init__(
        self, tools: Sequence[Tool[Any]], ctx: ToolContext, guard: Guard, *, name: str = "flowmesh"
    ) -> None:
        self._name = name
        self._tools = {tool.name: tool for tool in tools}
        self._ctx = ctx
        self._guard = guard

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
        return await self._guard.call(name, ours.call(self._ctx, arguments))


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
    limits: Limits,
    mask: SecretMask,
    tools: Sequence[Tool[Any]] | None = None,
) -> list[Any]:
    """Return the toolsets of one agent: its tools, those that a form gives it, and MCP servers.

    Args:
        role: The agent.
        given: Tools of a form.
        ctx: What each call is given.
        limits: Of the item.
        mask: Of all secrets but those of MCP servers, which are added here.
        tools: The agent's own, where they have been opened already.

    Raises:
        FlowmeshError: A tool or server is not allowed, not known, or its options do not fit.
    """
    guard = Guard(
        folder=ctx.folder, seconds=ctx.seconds, result_chars=limits.result_chars, mask=mask
    )
    tools = open_tools(role.tools, ctx.settings) if tools is None else tools
    toolsets: list[Any] = [Toolset(tools, ctx, guard)] if tools else []
    if given:  # they run whole agents, which the item's own time ends
        toolsets.append(Toolset(given, ctx, attrs.evolve(guard, seconds=math.inf), name="form"))
    if role.mcp:
        from flowmesh_agent.mcp_servers import open_servers  # noqa: PLC0415 - takes a second

        toolsets += open_servers(role.mcp, ctx=ctx, guard=guard)
    return toolsets
