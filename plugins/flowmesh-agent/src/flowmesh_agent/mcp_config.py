"""Which MCP servers an agent may use: the operator's file, and what documents ask of it; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from flowmesh_agent.hosts import HostRules
from flowmesh_agent.references import resolve_references
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import McpUse, ShortName
from flowmesh_agent.tools import explain
from flowmesh_core import ArtifactError, ConfigError, InputError, StrictBlock

__all__ = ["McpServer", "allowed_tools", "find_servers", "read_servers", "server_secrets"]

MAX_FILE_BYTES = 2**18

_PREFIX = "FLOWMESH_AGENT_MCP_"


class McpServer(StrictBlock):
    """One server of the operator's file.

    ``${env.NAME}`` in ``env`` and ``headers`` stands for a variable ``FLOWMESH_AGENT_MCP_…``.

    Attributes:
        command: A program that speaks MCP over its standard input and output; or ``url``.
        args: Its arguments.
        env: Its environment, beside ``PATH`` and the like.
        cwd: Where it begins: ``work`` is the item's folder.
        files: ``jail`` lets it see what programs of agents see, ``open`` all that the worker does.
        network: Whether a jailed one has a network.
        url: A server that runs elsewhere.
        headers: Sent to ``url``.
        tools: The only tools of it that documents get; None is all.
        timeout_s: For one call, where the document's own limit is not shorter.
        start_s: Until it is ready.
    """

    command: str | None = None
    args: list[str] = Field(default_factory=list)
    env: dict[str, str] = Field(default_factory=dict)
    cwd: str = "work"
    files: Literal["jail", "open"] = "jail"
    network: bool = False
    url: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    tools: list[str] | None = None
    timeout_s: float = Field(default=3600, gt=0)
    start_s: float = Field(default=30, gt=0)

    @model_validator(mode="after")
    def _has_one_way(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("needs one of command and url")
        other = {"headers"} if self.url is None else {"args", "env", "cwd", "files", "network"}
        if misplaced := sorted(other & self.model_fields_set):
            raise ValueError(f"{', '.join(misplaced)} do not go with {self.url or self.command}")
        return self


_SERVERS = TypeAdapter(dict[ShortName, McpServer])


def read_servers(path: Path | None, environ: Mapping[str, str]) -> dict[str, McpServer]:
    """Read the operator's servers, by name; none without a file.

    Args:
        path: A YAML file.
        environ: Where references lead.

    Raises:
        ConfigError: The file, or a server in it, cannot be read.
    """
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} must not be larger than {MAX_FILE_BYTES} bytes")
        servers = _SERVERS.validate_python(yaml.safe_load(data) or {})
        return {name: _resolve(server, environ) for name, server in servers.items()}
    except (OSError, yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(f"FLOWMESH_AGENT_MCP: {path} cannot be read: {exc}") from exc
    except ValidationError as exc:
        raise ConfigError(f"FLOWMESH_AGENT_MCP: {path}: {explain(exc)}") from None


def _resolve(server: McpServer, environ: Mapping[str, str]) -> McpServer:
    def resolve(values: Mapping[str, str]) -> dict[str, str]:
        return {
            name: resolve_references(value, environ, prefix=_PREFIX)
            for name, value in values.items()
        }

    try:
        return server.model_copy(
            update={"env": resolve(server.env), "headers": resolve(server.headers)}
        )
    except ValueError as exc:
        raise ConfigError(f"FLOWMESH_AGENT_MCP: {exc}") from None


def find_servers(
    uses: Mapping[str, McpUse], settings: AgentSettings, environ: Mapping[str, str]
) -> dict[str, tuple[McpServer, HostRules]]:
    """Return the servers that a document means, and where the client of each may go.

    Args:
        uses: Blocks of the document by their names.
        settings: The operator's, with the file of the servers.
        environ: Where references of that file lead.

    Raises:
        InputError: A server is not known, or its host not allowed.
        ConfigError: The operator's file cannot be read.
    """
    known = read_servers(settings.mcp, environ)
    return {name: _find_server(name, use, known, settings) for name, use in uses.items()}


def _find_server(
    name: str, use: McpUse, known: Mapping[str, McpServer], settings: AgentSettings
) -> tuple[McpServer, HostRules]:
    if use.url is None:
        wanted = use.server or name
        if wanted not in known:
            raise InputError(
                f"spec.agent.mcp.{name}: this worker has no MCP server {wanted!r}; it has"
                f" {', '.join(sorted(known)) or 'none'} (FLOWMESH_AGENT_MCP)"
            )
        server = known[wanted]
        return server, HostRules(hosts=(urlsplit(server.url or "").hostname or "",))
    rules = HostRules(hosts=settings.http_allow)
    try:
        rules.check_host(use.url)
    except ArtifactError as exc:
        raise InputError(f"spec.agent.mcp.{name}: {exc}") from exc
    headers = {key: value.get_secret_value() for key, value in use.headers.items()}
    return McpServer(url=use.url, headers=headers), rules


def allowed_tools(name: str, use: McpUse, server: McpServer) -> set[str] | None:
    """Return which of its tools a document gets, None for all.

    Raises:
        InputError: The document names one that the operator does not.
    """
    lists = [set(names) for names in (use.tools, server.tools) if names is not None]
    if len(lists) == 2 and (refused := sorted(lists[0] - lists[1])):
        raise InputError(
            f"spec.agent.mcp.{name}: tools not allowed on this worker: {', '.join(refused)}"
        )
    return lists[0] if lists else None


def server_secrets(
    servers: Mapping[str, McpServer], environ: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield what the operator set aside for servers, and their headers, each with a name."""
    for server in servers.values():
        yield from server.headers.items()
    yield from (item for item in environ.items() if item[0].startswith(_PREFIX))
