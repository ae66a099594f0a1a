"""Opens the MCP servers of one agent: the operator's, or a document's own over HTTP.

What a server says of itself is data from outside: its instructions, requests for samples, questions
and folders are not answered, and of its tools the model sees those whose names and schemas fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from fastmcp.client.transports import StdioTransport, StreamableHttpTransport
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.messages import BinaryContent
from pydantic_ai.toolsets import WrapperToolset

from flowmesh_agent.hosts import HostRules
from flowmesh_agent.mcp_config import McpServer, allowed_tools
from flowmesh_agent.network import build_http_client
from flowmesh_agent.spec import McpUse
from flowmesh_agent.tools import ToolContext
from flowmesh_agent.toolset import within
from flowmesh_core import ExecutionError, FlowmeshError, InputError, SecretMask

__all__ = ["open_server"]

MAX_TOOLS = 128
MAX_SCHEMA_CHARS = 20_000
MAX_DESCRIPTION_CHARS = 2_000

_LOG_CHARS = 2_000
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # Source: names of functions in OpenAI's API


def open_server(
    name: str,
    use: McpUse,
    server: McpServer,
    rules: HostRules,
    *,
    ctx: ToolContext,
    mask: SecretMask,
) -> Any:
    """Return the toolset of a server; entering it starts or reaches the server, leaving ends it.

    Args:
        name: Of the block in the document.
        use: The block.
        server: What it means.
        rules: Where its client may go.
        ctx: What each call is given.
        mask: Of all secrets, for what the server says of its faults.

    Raises:
        InputError: The document names a tool that the operator does not.
    """
    seconds = min(ctx.seconds, server.timeout_s)
    timeout_s = seconds + 5  # our own comes first
    transport = _Program(server, ctx) if server.url is None else _Website(server, rules, timeout_s)
    session = MCPToolset(
        transport,
        id=name,
        init_timeout=server.start_s,
        read_timeout=timeout_s,
        tool_error_behavior="failed",
        include_instructions=False,
    )
    allowed = allowed_tools(name, use, server)
    return _Server(session, name, server, seconds, mask, allowed, ctx.log)


class _Website(StreamableHttpTransport):  # type: ignore[misc] # the engine's types are not read
    """A server that runs elsewhere, with the status of its last answer."""

    def __init__(self, server: McpServer, rules: HostRules, timeout_s: float) -> None:
        super().__init__(server.url, httpx_client_factory=self._build)
        self.status = 0
        self._client = functools.partial(
            build_http_client,
            rules,
            timeout_s=timeout_s,
            headers=server.headers,
            trust_env=False,
        )

    def _build(self, **_: Any) -> Any:  # headers and redirects are not the library's to choose
        client = self._client()
        client.event_hooks = {**client.event_hooks, "response": [self._note]}
        return client

    async def _note(self, response: Any) -> None:
        self.status = response.status_code


class _Program(StdioTransport):  # type: ignore[misc] # as above
    """A server that runs under the sandbox's minder, with the end of what it wrote to its log."""

    def __init__(self, server: McpServer, ctx: ToolContext) -> None:
        super().__init__(server.command, server.args, keep_alive=False)
        self.told = ""
        self._server = server
        self._ctx = ctx

    @contextlib.asynccontextmanager
    async def connect_session(self, **options: Any) -> AsyncIterator[Any]:
        """Start it, and end it with all that it has started."""
        server, folder = self._server, self._ctx.folder
        is_open = server.files == "open"
        wrap = functools.partial(
            self._ctx.sandbox.wrap, folder=folder, network=server.network, files_open=is_open
        )
        self.command, *self.args = await asyncio.to_thread(wrap, [server.command, *server.args])
        scratch = folder / ".tmp"
        scratch.mkdir(exist_ok=True)
        homes = {} if is_open else {"HOME": str(folder), "TMPDIR": str(scratch)}
        self.env = homes | server.env
        self.cwd = str(folder) if server.cwd == "work" else server.cwd
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            self.log_file = log
            try:
                async with super().connect_session(**options) as session:
                    yield session
            finally:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_CHARS))
                self.told = log.read().strip()


class _Server(WrapperToolset[Any]):  # type: ignore[misc] # as above
    """Stands before one server: what the model sees of its tools, and how it calls them."""

    def __init__(
        self,
        session: Any,
        name: str,
        server: McpServer,
        seconds: float,
        mask: SecretMask,
        allowed: set[str] | None,
        log: Callable[[str], None],
    ) -> None:
        super().__init__(session)
        self._name = name
        self._server = server
        self._seconds = seconds
        self._mask = mask
        self._allowed = allowed
        self._log = log
        self._left_out: set[str] = set()

    async def __aenter__(self) -> _Server:
        try:
            await self.wrapped.__aenter__()
        except Exception as exc:  # noqa: BLE001 - whatever libraries made of a server's fault
            raise self._explain(exc) from None
        return self

    def _explain(self, error: Exception) -> FlowmeshError:
        """Return why it cannot be used; one of another machine may be back soon."""
        *_, cause = _causes(error)
        transport = self.wrapped.client.transport
        told, status = getattr(transport, "told", ""), getattr(transport, "status", 0)
        parts = (
            f"MCP server {self._name!r} cannot be used: {str(cause) or type(cause).__name__}",
            f"it answered with status {status}" if status else "",
            f"it wrote: {told}" if told else "",
        )
        text = self._mask.text("; ".join(filter(None, parts)))
        passing = status in (0, 408, 429) or status >= 500
        if self._server.url is None or isinstance(cause, FlowmeshError) or not passing:
            return InputError(text)
        return ExecutionError(text, retriable=True)

    async def get_tools(self, ctx: Any) -> dict[str, Any]:
        """Return the tools that are allowed and that a model can be told of."""
        found = await self.wrapped.get_tools(ctx)
        if missing := sorted((self._allowed or set()) - found.keys()):
            raise InputError(f"MCP server {self._name!r} has no tools {', '.join(missing)}")
        return dict(itertools.islice(self._fitting(found), MAX_TOOLS))

    def _fitting(self, found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for own, tool in found.items():
            if self._allowed is not None and own not in self._allowed:
                continue
            name = f"{self._name}_{own}"
            definition = tool.tool_def
            if problem := _misfit(name, definition.parameters_json_schema):
                self._leave_out(own, problem)
                continue
            told = (definition.description or "")[:MAX_DESCRIPTION_CHARS]
            definition = dataclasses.replace(definition, name=name, description=told)
            yield name, dataclasses.replace(tool, toolset=self, tool_def=definition)

    def _leave_out(self, tool: str, problem: str) -> None:
        if tool not in self._left_out:
            self._left_out.add(tool)
            self._log(f"MCP server {self._name!r}: tool {tool[:64]!r} left out: {problem}")

    async def call_tool(self, name: str, tool_args: dict[str, Any], ctx: Any, tool: Any) -> Any:
        """Call one of its tools."""
        own = name.removeprefix(f"{self._name}_")
        return await within(self._seconds, name, self._call(own, tool_args))

    async def _call(self, tool: str, arguments: dict[str, Any]) -> Any:
        result = await self.wrapped.direct_call_tool(tool, arguments)
        parts = result if isinstance(result, list) else [result]
        shown = [_media(part) if isinstance(part, BinaryContent) else part for part in parts]
        return shown if isinstance(result, list) else shown[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _media(content: Any) -> str:
    return f"[{content.media_type}, {len(content.data)} bytes, not shown]"


def _misfit(name: str, schema: Any) -> str:
    """Return why a model cannot be told of a tool, or nothing."""
    if not _TOOL_NAME.fullmatch(name):
        return "its name must be of at most 64 letters, digits, _ and -"
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return "its arguments must be an object"
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        return f"its schema must not be longer than {MAX_SCHEMA_CHARS} characters"
    return ""
