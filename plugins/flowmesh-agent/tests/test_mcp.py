"""Real MCP servers: what a document may reach, what the model sees, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("pydantic_ai", reason="needs the engine")

import flowmesh_agent.sandbox as sandboxes
from endpoint import call
from flowmesh_agent.engine import run_agent
from flowmesh_agent.masks import task_mask
from flowmesh_agent.sandbox import Sandbox
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import McpUse, Role
from flowmesh_agent.tools import ToolContext
from flowmesh_agent.toolset import build_toolsets
from orders import make_order, returned
from scripted import ScriptedModel, scripted
from website import Site

from flowmesh_core import ExecutionError, InputError
from flowmesh_core.testing import wait_for

HERE = Path(__file__).parent
DEMO = str(HERE / "servers" / "mcp_demo.py")
TOKEN = "mcp-token-0123456789"

jailed = pytest.mark.skipif(
    sandboxes.probe().level != "strong" and os.environ.get("FLOWMESH_STRICT_PLUGINS") != "1",
    reason="this kernel cannot jail programs",
)


class Stage:
    """An agent whose only tools are those of MCP servers."""

    def __init__(self, make: Callable[..., ToolContext], folder: Path) -> None:
        self.make = make
        self.file = folder / "mcp.yaml"
        self.mark = f"mark-{folder.name}-{os.getpid()}"
        self.log: list[str] = []
        self.model: ScriptedModel = scripted()
        self.allow: tuple[str, ...] = ()

    def write(self, **fields: Any) -> None:
        """Make the operator's file, with one server."""
        known = {"command": sys.executable, "args": [DEMO], "files": "open"}
        known = {} if "url" in fields else {**known, "env": {"DEMO_MARK": self.mark}}
        self.file.write_text(yaml.safe_dump({"demo": {**known, **fields}}))

    async def start(
        self, *calls: Any, use: Any = None, seconds: float = 20.0
    ) -> Sequence[tuple[str, Any]]:
        settings = AgentSettings(
            mcp=self.file if self.file.exists() else None, http_allow=self.allow
        )
        ctx = self.make(
            seconds=seconds,
            settings=settings,
            sandbox=Sandbox(read=(Path(sys.prefix), HERE)),
            log=self.log.append,
        )
        role = Role(mcp={"demo": use or McpUse()})
        mask = task_mask([role], settings, os.environ)
        toolsets = build_toolsets(role, [], ctx=ctx, mask=mask)
        self.model = scripted(*filter(None, [list(calls)]), "end")
        order = make_order(
            self.model,
            toolsets=toolsets,
            folder=ctx.folder,
            limits={"result_chars": 1000},
            mask=mask,
        )
        answer = await run_agent(order)
        if answer.error is not None:
            raise answer.error
        return returned(self.model)

    def run(self, *calls: Any, **options: Any) -> Sequence[tuple[str, Any]]:
        return asyncio.run(self.start(*calls, **options))

    @property
    def told(self) -> dict[str, Any]:
        """What the model was told of tools."""
        return {tool.name: tool for tool in self.model.requests[0][1].function_tools}

    def processes(self) -> list[psutil.Process]:
        """Processes that a server is, or has started, wherever they went."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("DEMO_MARK") == self.mark
        except psutil.Error:
            return False


@pytest.fixture
def stage(make_tool_context: Callable[..., ToolContext], tmp_path: Path) -> Iterator[Stage]:
    made = Stage(make_tool_context, tmp_path)
    yield made
    left = made.processes()
    for process in left:
        process.kill()
    assert left == []


def test_a_program_is_started_called_and_ended(stage: Stage) -> None:
    stage.write()
    results = stage.run(
        call("demo_add", a=1, b=2),
        call("demo_add", a="x", b=2),
        call("demo_fail", secret="x"),
        call("demo_picture"),
        call("demo_huge", characters=5000),
        call("demo_ask"),
    )
    assert results[0] == ("success", 3)
    assert [outcome for outcome, _ in results] == [
        *("success", "failed", "failed", "success", "success", "failed")
    ]
    assert results[3][1] == "[image/png, 8 bytes, not shown]"
    assert len(results[4][1]) == 1000
    assert results[4][1].endswith("kept in the file tool-result-1.txt]")


def test_the_model_sees_what_fits_and_nothing_of_the_servers_orders(stage: Stage) -> None:
    stage.write()
    stage.run()
    assert all(name.startswith("demo_") for name in stage.told)
    assert {"demo_add", "demo_hang"} <= set(stage.told)
    assert not {"demo_name with spaces", "demo_long_schema"} & set(stage.told)
    assert len(stage.told["demo_add"].description) == 2000
    assert "Obey" not in str(stage.model.requests[0])
    assert sorted(line.split("'")[3] for line in stage.log) == ["long_schema", "name with spaces"]


def test_operator_and_document_both_narrow_the_tools(stage: Stage) -> None:
    stage.write(tools=["add", "hang"])
    stage.run()
    assert set(stage.told) == {"demo_add", "demo_hang"}
    stage.run(use=McpUse(tools=["add"]))
    assert set(stage.told) == {"demo_add"}
    stage.run(use=McpUse(tools=[]))
    assert stage.told == {}
    with pytest.raises(InputError, match=r"spec\.agent\.mcp\.demo: tools not allowed.*: fail"):
        stage.run(use=McpUse(tools=["add", "fail"]))
    stage.write()
    with pytest.raises(InputError, match="MCP server 'demo' has no tools nothing"):
        stage.run(use=McpUse(tools=["add", "nothing"]))


def test_a_program_gets_its_own_environment_and_no_secret(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_LLM_API_KEY", "sk-never")
    monkeypatch.setenv("FLOWMESH_AGENT_MCP_TOKEN", TOKEN)
    env = {"DEMO_MARK": stage.mark, "TOKEN": "Bearer ${env.FLOWMESH_AGENT_MCP_TOKEN}"}
    stage.write(env=env)
    ((_, found),) = stage.run(call("demo_environment"))
    assert found["TOKEN"] == "Bearer ${env.FLOWMESH_AGENT_MCP_TOKEN}"  # as the model sees it
    assert "AGENT_LLM_API_KEY" not in found
    assert "FLOWMESH_AGENT_MCP_TOKEN" not in found


@jailed
def test_a_jailed_program_reads_and_reaches_nothing_of_the_worker(
    stage: Stage, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    stage.write(files="jail")
    results = stage.run(
        call("demo_add", a=1, b=2),
        call("demo_read", path=str(canary)),
        call("demo_read", path="/etc/passwd"),
        call("demo_environment"),
    )
    assert [outcome for outcome, _ in results] == ["success", "failed", "failed", "success"]
    assert results[3][1]["HOME"] == str(tmp_path / "work")


@pytest.mark.parametrize("files", ["open", pytest.param("jail", marks=jailed)])
def test_nothing_is_left_of_a_program_and_what_it_started(stage: Stage, files: str) -> None:
    stage.write(files=files)

    async def used() -> None:
        ((outcome, _),) = await stage.start(call("demo_spawn"))
        assert outcome == "success"
        assert stage.processes() == []  # the end of the loop would end it too

    asyncio.run(used())


@pytest.mark.parametrize("files", ["open", pytest.param("jail", marks=jailed)])
def test_cancel_ends_a_call_and_all_processes(stage: Stage, tmp_path: Path, files: str) -> None:
    stage.write(files=files)

    async def cancelled() -> float:
        task = asyncio.create_task(stage.start(call("demo_spawn"), call("demo_hang")))
        while not (tmp_path / "work" / "pids.json").exists():
            await asyncio.sleep(0.05)
        assert len(stage.processes()) >= 2
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - started

    assert asyncio.run(cancelled()) < 3
    assert stage.processes() == []


def test_a_call_that_hangs_or_kills_the_server_fails_alone(stage: Stage) -> None:
    stage.write(timeout_s=1)
    assert stage.run(call("demo_hang"), call("demo_add", a=1, b=2)) == [
        ("failed", "demo_hang did not end within 1 s"),
        ("success", 3),
    ]
    stage.write()
    ((outcome, text),) = stage.run(call("demo_die"))
    assert outcome == "failed"
    assert "closed" in str(text).lower()


def test_killing_the_process_of_the_task_ends_the_server(stage: Stage, tmp_path: Path) -> None:
    stage.write()
    script = f"""
import asyncio, pathlib, sys
sys.path.insert(0, {str(HERE)!r})
from test_mcp import *
def make(**fields):
    known = {{"folder": pathlib.Path({str(tmp_path)!r}), "http": None, "run_task": None}}
    return ToolContext(**known, **fields)
stage = Stage(make, pathlib.Path({str(tmp_path)!r}))
stage.run(call("demo_spawn"), call("demo_hang"))
"""
    worker = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "pids.json").exists)
        assert len(stage.processes()) >= 2
    finally:
        worker.kill()
        worker.wait()
    wait_for(lambda: stage.processes() == [])


@pytest.mark.parametrize("files", ["open", pytest.param("jail", marks=jailed)])
def test_a_program_that_cannot_be_used_is_explained(stage: Stage, files: str) -> None:
    stage.write(command="/no/such/server", files=files)
    with pytest.raises(InputError, match=r"MCP server 'demo' cannot be used:.*/no/such/server"):
        stage.run()
    line = "import sys; sys.exit('no licence found')"
    stage.write(args=["-c", line], files=files)
    with pytest.raises(InputError, match="it wrote: no licence found"):
        stage.run()


def test_a_program_that_never_gets_ready_is_given_up(stage: Stage) -> None:
    stage.write(args=["-c", "import time; time.sleep(3600)"], start_s=0.5)
    started = time.monotonic()
    with pytest.raises(InputError, match="MCP server 'demo' cannot be used"):
        stage.run()
    assert time.monotonic() - started < 15


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, DEMO, str(port)], stderr=subprocess.DEVNULL)

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(is_up)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


def test_a_document_reaches_servers_on_allowed_hosts_only(stage: Stage, url: str) -> None:
    use = McpUse(url=url)
    with pytest.raises(InputError, match=r"mcp\.demo: host 127\.0\.0\.1 is not among.*HTTP_ALLOW"):
        stage.run(use=use)
    stage.allow = ("*",)
    with pytest.raises(InputError, match="not a public address"):
        stage.run(use=use)
    stage.allow = ("127.0.0.1",)
    assert stage.run(call("demo_add", a=3, b=4), use=use) == [("success", 7)]


def test_the_operators_server_needs_no_other_leave(stage: Stage, url: str) -> None:
    stage.write(url=url)
    assert stage.run(call("demo_add", a=3, b=4)) == [("success", 7)]


def test_headers_reach_the_server_and_are_masked(stage: Stage) -> None:
    refusal = (401, {"Content-Type": "text/plain"}, f"bad token {TOKEN}".encode())
    with Site({"/mcp": refusal}) as site:
        stage.write(url=f"{site.url}/mcp", headers={"Authorization": f"Bearer {TOKEN}"})
        with pytest.raises(InputError, match="it answered with status 401") as caught:
            stage.run()
    assert TOKEN not in str(caught.value)
    assert {headers["authorization"] for _, headers, _ in site.requests} == {f"Bearer {TOKEN}"}


def test_a_redirect_takes_no_header_elsewhere(stage: Stage) -> None:
    with Site({}) as thief, Site({"/mcp": (307, {"Location": f"{thief.url}/mcp"}, b"")}) as site:
        stage.write(url=f"{site.url}/mcp", headers={"X-Key": TOKEN})
        with pytest.raises((InputError, ExecutionError), match="MCP server 'demo' cannot be used"):
            stage.run()
    assert site.asked
    assert thief.asked == []


def test_a_server_that_is_away_may_come_back(stage: Stage) -> None:
    with Site({"/mcp": (503, {}, b"")}) as site:
        for url in ("http://127.0.0.1:1/mcp", f"{site.url}/mcp"):
            stage.write(url=url)
            with pytest.raises(ExecutionError, match="MCP server 'demo' cannot be used") as caught:
                stage.run()
            assert caught.value.retriable


def test_an_unknown_server_is_refused_with_the_known_ones(stage: Stage) -> None:
    with pytest.raises(InputError, match="no MCP server 'demo'; it has none"):
        stage.run()
    stage.write()
    with pytest.raises(InputError, match="no MCP server 'other'; it has demo"):
        stage.run(use=McpUse(server="other"))
