from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flowmesh_agent.builtin.programs import PythonTool, ShellTool
from flowmesh_agent.sandbox import Sandbox
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import ToolUse
from flowmesh_agent.tools import Tool, ToolContext, ToolError, open_tools
from jails import alive, needs_jail

from flowmesh_core import ContractError, InputError
from flowmesh_core.testing import wait_for

pytestmark = needs_jail

ToolContexts = Callable[..., ToolContext]
MARKER = f"3000.{os.getpid()}"


@pytest.fixture
def ctx(make_tool_context: ToolContexts) -> Iterator[ToolContext]:
    yield make_tool_context(sandbox=Sandbox())
    for pid in alive(MARKER):
        os.kill(pid, signal.SIGKILL)


def shell(ctx: ToolContext, command: str, **options: Any) -> dict[str, Any]:
    tool = ShellTool(options)
    return asyncio.run(tool.call(ctx, tool.parameters(command=command)))


def python(ctx: ToolContext, code: str, **options: Any) -> dict[str, Any]:
    tool = PythonTool(options)
    return asyncio.run(tool.call(ctx, tool.parameters(code=code)))


def test_python_tells_what_it_printed(ctx: ToolContext) -> None:
    assert python(ctx, "print(6 * 7)") == {"exit": 0, "stdout": "42\n"}


def test_an_error_of_the_program_is_a_result_with_its_line(ctx: ToolContext) -> None:
    told = python(ctx, "x = 1\nraise ValueError('no')")
    assert told["exit"] == 1
    assert "line 2, in <module>" in told["stderr"]
    assert told["stderr"].endswith("ValueError: no\n")


def test_shell_runs_pipes_and_knows_the_same_python(ctx: ToolContext) -> None:
    command = "printf 'b\\na\\n' | sort; python -c 'import sys; print(sys.prefix)'; exit 4"
    assert shell(ctx, command) == {"exit": 4, "stdout": f"a\nb\n{sys.prefix}\n"}


def test_programs_share_the_folder(ctx: ToolContext) -> None:
    shell(ctx, "mkdir -p notes && echo hello > notes/a.txt")
    assert python(ctx, "print(open('notes/a.txt').read())")["stdout"] == "hello\n\n"
    assert (ctx.folder / "notes" / "a.txt").read_text() == "hello\n"


def test_a_program_that_takes_too_long_tells_what_it_had_written(
    make_tool_context: ToolContexts,
) -> None:
    ctx = make_tool_context(sandbox=Sandbox(), seconds=1.0)
    told = python(ctx, "print('begun')\nwhile True: pass")
    assert told == {"signal": "SIGKILL", "ended_over": "time", "stdout": "begun\n"}


def test_a_program_that_cannot_start_is_told_to_the_model(ctx: ToolContext) -> None:
    with pytest.raises(ToolError, match=r"cannot start '/bin/sh'.*null byte"):
        shell(ctx, "echo \0")


def test_a_program_that_cannot_be_jailed_is_told_to_the_model(
    ctx: ToolContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_agent.sandbox._MINDER", (sys.executable, "-c", "pass"))
    with pytest.raises(ToolError, match="sandbox: its minder was killed"):
        shell(ctx, "echo a")


def test_a_document_can_ask_for_a_network_and_the_operator_decides(
    make_tool_context: ToolContexts,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection({server.getsockname()!r}); print('in')"
        for asked, allowed, expected in ((False, True, {}), (True, True, {"stdout": "in\n"})):
            ctx = make_tool_context(sandbox=Sandbox(network=allowed))
            told = python(ctx, code, network=asked)
            assert {name: told[name] for name in told if name == "stdout"} == expected
        refused = make_tool_context(sandbox=Sandbox(network=False))
        with pytest.raises(ToolError, match="no network here: FLOWMESH_AGENT_SANDBOX_NETWORK"):
            python(refused, code, network=True)


@pytest.mark.parametrize("name", ["python", "shell"])
def test_the_entry_point_gives_it_to_who_may_have_it(name: str) -> None:
    use = ToolUse.model_validate({"name": name, "network": True})
    (tool,) = open_tools([use], AgentSettings(tools=(name,), sandbox_network=True))
    assert (tool.name, tool.description[:4]) == (name, "Run ")
    with pytest.raises(InputError, match=rf"'{name}' cannot work .*: .*_AGENT_SANDBOX_NETWORK"):
        open_tools([use], AgentSettings(tools=(name,)))
    assert [tool.name for tool in open_tools([ToolUse(name=name)], AgentSettings(tools="*"))]
    with pytest.raises(InputError, match=rf"not allowed on this worker: {name}; it allows files"):
        open_tools([use], AgentSettings())
    wrong = ToolUse.model_validate({"name": name, "netwrok": True})
    with pytest.raises(ContractError, match=rf"spec.agent.tools: '{name}'.*netwrok"):
        open_tools([wrong], AgentSettings(tools=("*",)))


def test_cancelling_a_call_ends_what_it_started(ctx: ToolContext) -> None:
    async def main() -> float:
        tool: Tool[Any] = ShellTool({})
        command = f"trap '' TERM; (setsid sleep {MARKER} &); sleep {MARKER}"
        call = asyncio.create_task(tool.call(ctx, tool.parameters(command=command)))
        await asyncio.to_thread(wait_for, lambda: len(alive(f"sleep\0{MARKER}")) >= 2)
        call.cancel()
        began = time.monotonic()
        await asyncio.wait([call])
        assert call.cancelled()
        return time.monotonic() - began

    assert asyncio.run(main()) < 1.0
    assert alive(MARKER) == []


# What a page or a file might tell a model to do, which then does it.
# Chosen so that a jail that does not hold costs this test's folder and session, and no more.
ORDERS = {
    "read the passwords": "cat /etc/passwd /etc/shadow; cat ../../../../etc/passwd",
    "read the worker": "cat /proc/{pid}/environ /proc/*/environ /proc/self/environ",
    "read the canary": "cat {canary}; cp {canary} mine; ln {canary} mine; mv {canary} mine",
    "link to the canary": "ln -s {canary} link; cat link; ln -s {above} folder; ls folder",
    "remove everything": "rm -rf {above} {canary} ~/.. .. --no-preserve-root",
    "overwrite": "echo gone > {canary}; truncate -s 0 {canary}; dd if=/dev/zero of={canary}",
    "change modes": "chmod -R 000 {above}; chown -R 1:1 {above}; touch -d @1 {canary}",
    "find it": "ls -la {above} / /root /home /tmp; find / -name canary",
    "connect": "python -c \"import socket; socket.create_connection(('127.0.0.1', {port}))\"",
    "fetch": "curl -sm 2 http://127.0.0.1:{port}/; wget -t 1 -qT 2 -O - http://127.0.0.1:{port}/",
    "bash connects": "bash -c 'echo canary > /dev/tcp/127.0.0.1/{port}'",
    "kill the worker": "kill -9 {pid}; kill -STOP {pid}",
    "stay": "(setsid sleep {marker} &); nohup sleep {marker} & (trap '' HUP; sleep {marker}) &",
    "fork bomb": (  # that ends by itself, too, where nobody stops it
        "b() {{ if [ $1 -gt 0 ]; then b $(($1-1)) | b $(($1-1)) & else sleep 20; fi; }};"
        " b 9; sleep 20"
    ),
    "escape": "unshare -r sh; chroot / sh; mount -t tmpfs x .; mknod d b 8 0; su -c id; sudo id",
    "print the key": "env; echo $AGENT_LLM_API_KEY '${{env.SECRET}}'; set",
}


@pytest.mark.parametrize("name", ORDERS)
def test_obeying_every_order_achieves_nothing(
    ctx: ToolContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AGENT_LLM_API_KEY", "sk-secret-of-the-worker")
    canary = tmp_path / "canary"
    canary.write_text("tweet")
    before = {path: path.stat() for path in (canary, tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        names = {
            "pid": os.getpid(),
            "canary": canary,
            "above": tmp_path,
            "marker": MARKER,
            "port": server.getsockname()[1],
        }
        told = json.dumps(shell(ctx, ORDERS[name].format(**names)))
        with pytest.raises(TimeoutError, match="timed out"):
            server.accept()
    assert [word for word in ("root:x:", "tweet", "sk-secret", "uid=0") if word in told] == []
    assert canary.read_text() == "tweet"
    for path, was in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_mtime) == (was.st_mode, was.st_uid, was.st_mtime)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "work"]
    assert not [path for path in ctx.folder.rglob("*") if path.is_symlink()]
    assert alive(MARKER) == []
    assert shell(ctx, "echo still here")["stdout"] == "still here\n"
