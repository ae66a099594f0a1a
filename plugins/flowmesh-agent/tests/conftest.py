"""What every tool is given: a folder, settings, a client and, unless told otherwise, no sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.tools import ToolContext

from flowmesh_core import Outcome

ToolContexts = Callable[..., ToolContext]


class NoSandbox:
    """Runs nothing, for tools that must not ask for it."""

    async def run(self, argv: Any, **_: Any) -> Any:
        raise AssertionError(f"a tool that runs no programs ran {argv}")


async def _no_tasks(spec: Mapping[str, Any]) -> Outcome:
    raise AssertionError(f"a tool that runs no tasks ran {spec}")


@pytest.fixture
def make_tool_context(tmp_path: Path) -> Iterator[ToolContexts]:
    """Make contexts whose fields may be given by name; ``ctx.folder`` exists and is empty."""
    clients: list[httpx.AsyncClient] = []

    def make(**fields: Any) -> ToolContext:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        clients.append(httpx.AsyncClient(trust_env=False))
        known: dict[str, Any] = {
            "folder": folder,
            "seconds": 20.0,
            "settings": AgentSettings(),
            "sandbox": NoSandbox(),
            "http": clients[-1],
            "run_task": _no_tasks,
            "log": lambda _line: None,
        }
        return ToolContext(**{**known, **fields})

    yield make
    for client in clients:
        asyncio.run(client.aclose())
