"""``python`` and ``shell``: run what the model writes, in the sandbox."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from flowmesh_agent.sandbox import Finished
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.tools import Tool, ToolContext, ToolError
from flowmesh_core import FlowmeshError, StrictBlock

__all__ = ["ProgramOptions", "PythonTool", "ShellTool"]

ArgumentsT = TypeVar("ArgumentsT", bound=BaseModel)

_MARGIN_S = 0.5  # to tell what it wrote before the call itself is cancelled
_PLACE = (
    " It begins in the working folder, the only one that it can write to, and is ended with all"
    " that it started. It has no input, and a network only if you were told so. Files cannot be"
    " made executable, and links not be made."
)


class ProgramOptions(StrictBlock):
    """What a document says beside the name of the tool.

    Attributes:
        network: Whether programs get the worker's network, where the operator allows that.
    """

    network: bool = False


class _ProgramTool(Tool[ArgumentsT]):
    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = ProgramOptions.model_validate(dict(options))

    def check(self, settings: AgentSettings) -> None:
        """Refuse a network that the operator gives no program."""
        if self._options.network and not settings.sandbox_network:
            raise ToolError("programs get no network here: FLOWMESH_AGENT_SANDBOX_NETWORK")

    async def _run(self, ctx: ToolContext, argv: Sequence[str], stdin: str = "") -> dict[str, Any]:
        try:
            finished = await ctx.sandbox.run(
                argv,
                stdin=stdin.encode(),
                seconds=max(ctx.seconds - _MARGIN_S, ctx.seconds / 2),
                folder=ctx.folder,
                network=self._options.network,
            )
        except FlowmeshError as exc:
            raise ToolError(str(exc)) from exc
        return _tell(finished)


def _tell(finished: Finished) -> dict[str, Any]:
    told = {
        "exit": finished.exit,
        "signal": finished.signal,
        "ended_over": finished.stopped,
        "stdout": finished.stdout,
        "stderr": finished.stderr,
    }
    return {name: value for name, value in told.items() if value not in ("", None)}


class PythonArguments(BaseModel):
    """What ``python`` is called with."""

    code: str = Field(description="A whole Python program; only what it prints is seen.")


class PythonTool(_ProgramTool[PythonArguments]):
    """Runs Python with the packages of this worker."""

    name = "python"
    description = "Run a Python program and return its exit status and what it printed." + _PLACE
    parameters = PythonArguments

    async def call(self, ctx: ToolContext, arguments: PythonArguments) -> dict[str, Any]:
        """Run it; modules in the folder can be imported."""
        return await self._run(ctx, [sys.executable, "-"], stdin=arguments.code)


class ShellArguments(BaseModel):
    """What ``shell`` is called with."""

    command: str = Field(description="Lines for /bin/sh.", max_length=100_000)


class ShellTool(_ProgramTool[ShellArguments]):
    """Runs lines of a shell."""

    name = "shell"
    description = "Run shell commands and return exit status and output." + _PLACE
    parameters = ShellArguments

    async def call(self, ctx: ToolContext, arguments: ShellArguments) -> dict[str, Any]:
        """Run it."""
        return await self._run(ctx, ["/bin/sh", "-c", arguments.command])
