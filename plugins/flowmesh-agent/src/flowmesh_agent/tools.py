"""Tools of agents: what one is, what it is given, and who allows it.

A tool comes from an entry point of the group ``flowmesh.agent.tools``: anything that is called
with the options of a document and returns a tool or several. A class of tools is one by itself.
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs
import httpx
from pydantic import BaseModel, ValidationError

from flowmesh_agent.sandbox import Sandbox
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import ToolUse
from flowmesh_core import (
    ContractError,
    FlowmeshError,
    InputError,
    Outcome,
    PluginError,
    load_driver,
)

__all__ = ["GROUP", "Tool", "ToolContext", "ToolError", "explain", "open_tools"]

GROUP = "flowmesh.agent.tools"
ArgumentsT = TypeVar("ArgumentsT", bound=BaseModel)


class ToolError(Exception):
    """A call failed in a way that the model should know of, to try another."""


@attrs.frozen(kw_only=True)
class ToolContext:
    """What a tool is given with each call.

    Attributes:
        folder: The item's folder for files; a tool writes nowhere else.
        seconds: How long this call may take; it is cancelled then.
        settings: Of the operator.
        sandbox: Runs programs.
        http: Reaches only what the operator allows agents; follows no redirects.
        run_task: Runs another task on this worker.
        log: Writes a line to the task's log.
    """

    folder: Path
    seconds: float
    settings: AgentSettings
    sandbox: Sandbox
    http: httpx.AsyncClient
    run_task: Callable[[Mapping[str, Any]], Awaitable[Outcome]]
    log: Callable[[str], None]


class Tool(abc.ABC, Generic[ArgumentsT]):
    """Base of all tools; one instance serves all calls of one agent, several at once.

    Attributes:
        name: Unique among the tools of an agent; letters, digits and ``_``.
        description: For the model: what it does, and when to use it.
        parameters: What the model must give; its fields' descriptions are for the model too.
    """

    name: str
    description: str
    parameters: type[ArgumentsT]

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Take the document's options; a tool that has some overrides this.

        Raises:
            ValueError: An option is unknown or does not fit; pydantic's error is one.
        """
        if options:
            raise ValueError(f"takes no options, got {', '.join(sorted(options))}")

    def check(self, settings: AgentSettings) -> None:
        """Refuse a worker where the tool cannot work; asked before anything runs.

        Raises:
            ToolError: Saying what is missing.
        """

    @abc.abstractmethod
    async def call(
        self, ctx: ToolContext, arguments: ArgumentsT
    ) -> str | dict[str, Any] | list[Any]:
        """Do it and return text or JSON data, which the model sees cut to ``limits.result_chars``.

        It must not block the loop, and end at once when it is cancelled.

        Raises:
            ToolError: The model is told, and goes on; anything else that is raised is told to it
                as a failure without its reason.
        """


def open_tools(uses: Sequence[ToolUse], settings: AgentSettings) -> list[Tool[Any]]:
    """Return the tools that a document names, in its order.

    Those that are not allowed here, or cannot work, are left out if they are not ``required``.

    Raises:
        InputError: One is not allowed or cannot work here, or several have one name.
        ContractError: Its options do not fit.
        PluginError: It is not installed, cannot be loaded or made, or is no tool.
    """
    refused = [use.name for use in uses if use.required and not settings.allows(use.name)]
    if refused:
        raise InputError(
            f"tools not allowed on this worker: {', '.join(refused)}; it allows"
            f" {', '.join(settings.tools) or 'none'} (FLOWMESH_AGENT_TOOLS)"
        )
    found: dict[str, Tool[Any]] = {}
    for use in uses:
        for tool in _open(use, settings) if settings.allows(use.name) else ():
            if tool.name in found:
                raise InputError(f"tool {use.name!r}: the agent has a tool {tool.name!r} already")
            found[tool.name] = tool
    return list(found.values())


def _open(use: ToolUse, settings: AgentSettings) -> list[Tool[Any]]:
    make = load_driver(GROUP, use.name)
    try:
        tools = _listed(make(use.options), use.name)
        for tool in tools:
            tool.check(settings)
    except FlowmeshError:
        raise
    except ToolError as exc:
        if use.required:
            raise InputError(f"tool {use.name!r} cannot work on this worker: {exc}") from None
        return []
    except ValueError as exc:
        raise ContractError(f"spec.agent.tools: {use.name!r}: {explain(exc)}") from None
    except Exception as exc:  # noqa: BLE001 - a plugin's code; its traceback would show the options
        raise PluginError(
            f"{GROUP}: {use.name!r} cannot be made: {type(exc).__name__}: {exc}"
        ) from None
    return tools


def _listed(made: Any, name: str) -> list[Tool[Any]]:
    tools = list(made) if isinstance(made, Iterable) else [made]
    if not all(isinstance(tool, Tool) for tool in tools):
        raise PluginError(f"{GROUP}: {name!r} must make tools, got {type(made).__name__}")
    return tools


def explain(error: ValueError) -> str:
    """Return in one line what is wrong with a value; pydantic's findings each with its field."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = error.errors(include_url=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"]))) for item in found
    )
