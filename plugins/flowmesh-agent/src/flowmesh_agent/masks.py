"""Which values are secrets of a task: its document's, the operator's and those of MCP servers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from flowmesh_agent.mcp_config import read_servers, server_secrets
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import Role
from flowmesh_core import SecretMask

__all__ = ["SHORT", "build_mask", "task_mask"]

SHORT = 8
"""Characters of the shortest secret: `none` and `json` would be found in any text."""


def task_mask(
    roles: Iterable[Role], settings: AgentSettings, environ: Mapping[str, str]
) -> SecretMask:
    """Return a mask for all secrets that the agents of a task may come across.

    Raises:
        ConfigError: The operator's file of MCP servers cannot be read.
    """
    roles = list(roles)
    servers = read_servers(settings.mcp, environ) if any(role.mcp for role in roles) else {}
    return build_mask(
        chain(
            *(_secrets(role) for role in roles),
            server_secrets(servers, environ),
            settings.secrets.items(),  # last: a variable's name says more than a place
        )
    )


def build_mask(secrets: Iterable[tuple[str, str]]) -> SecretMask:
    """Return a mask for values, each with a name, which several may share.

    Each is also found by its words, as a token follows ``Bearer``, and as it stands inside a JSON
    string, where calls of tools carry text.
    """
    mask = SecretMask({})
    for name, value in secrets:
        for word in dict.fromkeys((*value.split(), value)):
            if len(word) >= SHORT:
                mask = mask.joined(SecretMask({f"{name} in JSON": json.dumps(word)[1:-1]}))
                mask = mask.joined(SecretMask({name: word}))
    return mask


def _secrets(role: Role) -> Iterator[tuple[str, str]]:
    headers = {}
    if role.model is not None:
        headers = dict(role.model.headers)
        if role.model.api_key is not None:
            yield "agent.model.api_key", role.model.api_key.get_secret_value()
    for name, use in role.mcp.items():
        headers |= {f"{name}.{key}": value for key, value in use.headers.items()}
    for name, secret in headers.items():
        yield f"agent.headers.{name}", secret.get_secret_value()
