"""Whole tasks: the worker's child, the real engine, real tools, and an endpoint with a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("pydantic_ai", reason="needs the engine")

from endpoint import Hang, Refusal, Reply, ScriptedEndpoint, Slow, call
from flowmesh_agent.budget import BudgetError
from flowmesh_agent.spec import AgentResult
from jails import alive, needs_jail
from tasks import KEY, Operator, last_result, results_in, trace_of, written_in
from website import HERE, Site

from flowmesh_core import ContractError, DeadlineError, ExecutionError, InputError
from flowmesh_core.testing import TaskRun, wait_for

DEMO = Path(__file__).parent / "servers" / "mcp_demo.py"


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    return Operator(tmp_path / "out", monkeypatch)


def gist(run: TaskRun) -> list[tuple[str, str, str]]:
    """Return who did what, without times and texts."""
    return [
        (line["kind"], line["agent"], line.get("tool", ""))
        for line in trace_of(run)
        if line["kind"] not in ("request", "usage")
    ]


def asked(body: Mapping[str, Any]) -> str:
    """Return the prompt of a request."""
    prompts = [m["content"] for m in body["messages"] if m["role"] == "user"]
    return str(prompts[0])


def test_an_agent_uses_its_tools_until_it_answers(operator: Operator) -> None:
    write = call("write_file", path="facts.md", content="Mars is red")
    with ScriptedEndpoint(write, call("read_file", path="facts.md"), "done") as endpoint:
        run = operator.run(endpoint, {"task": "Write facts."})
    AgentResult.model_validate(run.result)
    assert run.result["items"][0]["output"] == "done"
    assert run.result["llm"] == "scripted"
    assert (run.folder / "work" / "facts.md").read_text() == "Mars is red"
    assert json.loads(last_result(endpoint.requests[-1].body)) == {
        "tool": "read_file",
        "result": "Mars is red",
    }
    assert gist(run) == [
        ("response", "", ""),
        ("tool_call", "", "write_file"),
        ("tool_result", "", "write_file"),
        ("response", "", ""),
        ("tool_call", "", "read_file"),
        ("tool_result", "", "read_file"),
        ("response", "", ""),
        ("answer", "", ""),
    ]
    assert [line["kind"] for line in run.result["metadata"]["execution_log"]] == [
        *("step", "tool", "step", "tool", "step", "answer")
    ]
    usage = run.result["usage"]
    assert (usage["llm_requests"], usage["tool_calls"]) == (3, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (30, 15)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("agent_output.txt", "artifacts", "logs", "metrics.jsonl", "trace.jsonl", "work")
    ]


@needs_jail
def test_every_built_in_tool_and_an_mcp_server_work_in_one_task(
    operator: Operator, tmp_path: Path
) -> None:
    servers = {"demo": {"command": sys.executable, "args": [str(DEMO)]}}
    (tmp_path / "mcp.yaml").write_text(yaml.safe_dump(servers))
    page = (200, {"Content-Type": "text/html"}, b"<title>Moon</title><p>It is grey.</p>")
    found = {"organic": [{"title": "Moon", "link": "x", "snippet": "grey"}]}
    search = (200, {"Content-Type": "application/json"}, json.dumps(found).encode())
    operator.serve_rag()
    with Site({"/moon": page, "/search": search}) as site:
        operator.allow(
            FLOWMESH_AGENT_TOOLS="*",
            FLOWMESH_AGENT_HTTP_ALLOW=HERE,
            FLOWMESH_AGENT_MCP=str(tmp_path / "mcp.yaml"),
            FLOWMESH_AGENT_SEARCH_URL=f"{site.url}/search",
            FLOWMESH_AGENT_SANDBOX_READ=str(DEMO.parent),
            SERPER_API_KEY="serper-key-0123456789",
        )
        calls = [
            call("write_file", path="n.txt", content="4"),
            call("python", code="print(int(open('n.txt').read()) ** 2)"),
            call("shell", command="cat n.txt"),
            call("http", url=f"{site.url}/moon"),
            call("web_search", query="moon"),
            call("web_read", url=f"{site.url}/moon"),
            call("retrieve", query="the moon"),
            call("demo_add", a=2, b=3),
        ]
        tools = ["files", "python", "shell", "http", "web_search", "web_read"]
        retrieve = {"name": "retrieve", "store": {"path": "index"}}
        with ScriptedEndpoint(*calls, "done") as endpoint:
            agent = {"tools": [*tools, retrieve], "mcp": {"demo": {"tools": ["add"]}}}
            run = operator.run(endpoint, {"task": "Try all.", "agent": agent})
    assert run.error is None
    seen = results_in(run)
    assert seen["python"] == {"exit": 0, "stdout": "16\n"}
    assert seen["shell"] == {"exit": 0, "stdout": "4"}
    assert "grey" in seen["http"]["text"]
    assert seen["web_search"][0]["snippet"] == "grey"
    assert "It is grey." in seen["web_read"]
    assert seen["retrieve"][0]["text"] == "about the moon"
    assert "5" in json.dumps(seen["demo_add"])
    offered = {tool["function"]["name"] for tool in endpoint.requests[0].body["tools"]}
    assert {"demo_add", "edit_file"} <= offered
    assert "demo_environment" not in offered
    assert not (run.folder / "children" / "1").exists()  # it went well
    assert not (run.folder / "work" / ".tmp").exists()
    assert run.result["usage"]["tool_calls"] == 8
    assert "serper-key" not in endpoint.text + written_in(run.folder)


def test_an_answer_is_held_to_a_schema(operator: Operator) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    with ScriptedEndpoint('{"town": 1}', '{"city": "Paris"}') as endpoint:
        run = operator.run(endpoint, {"task": "Where?", "agent": {"output_schema": schema}})
    (item,) = run.result["items"]
    assert item["data"] == {"city": "Paris"}
    assert json.loads(item["output"]) == item["data"]
    assert run.result["usage"]["llm_requests"] == 2


WORKERS = {
    "reader": {"description": "reads", "tools": ["files"]},
    "writer": {"description": "writes", "tools": ["files"]},
}


def test_workers_follow_a_plan_with_their_own_tools(operator: Operator) -> None:
    steps = [{"worker": "writer", "task": "Write."}, {"worker": "reader", "task": "Read."}]
    script = (
        json.dumps({"steps": steps}),
        call("write_file", path="a.txt", content="seven"),
        "written",
        call("read_file", path="a.txt"),
        "it says seven",
        "The file says seven.",
    )
    with ScriptedEndpoint(*script) as endpoint:
        agent = {"form": "plan_execute", "workers": WORKERS, "tools": []}
        run = operator.run(endpoint, {"task": "Write and read.", "agent": agent})
    assert run.result["items"][0]["output"] == "The file says seven."
    assert gist(run) == [
        ("response", "", ""),
        ("plan", "", ""),
        ("response", "writer", ""),
        ("tool_call", "writer", "write_file"),
        ("tool_result", "writer", "write_file"),
        ("response", "writer", ""),
        ("response", "reader", ""),
        ("tool_call", "reader", "read_file"),
        ("tool_result", "reader", "read_file"),
        ("response", "reader", ""),
        ("response", "", ""),
        ("answer", "", ""),
    ]
    assert "it says seven" in asked(endpoint.requests[-1].body)


def test_a_workforce_works_at_once_and_longer_than_a_tool_may(operator: Operator) -> None:
    def answer(body: Any) -> Any:
        prompt = asked(body)
        if prompt != "Do both.":
            return Slow(f"{prompt} is done", 0.6)
        if any(message["role"] == "tool" for message in body["messages"]):
            return "both are done"
        return [
            call("delegate", worker="reader", task="one"),
            call("delegate", worker="writer", task="two"),
        ]

    with ScriptedEndpoint(always=answer) as endpoint:
        agent = {"form": "workforce", "workers": WORKERS, "limits": {"tool_seconds": 0.2}}
        run = operator.run(endpoint, {"task": "Do both.", "agent": agent})
    assert run.error is None
    assert run.result["items"][0]["output"] == "both are done"
    told = [line["result"] for line in trace_of(run) if line["kind"] == "tool_result"]
    assert sorted(told) == ["one is done", "two is done"]
    first, second = [request.at_s for request in endpoint.requests[1:3]]
    assert abs(second - first) < 0.5
    assert run.result["usage"]["llm_requests"] == 4


def test_a_worker_spends_the_budget_of_all(operator: Operator) -> None:
    delegate = call("delegate", worker="reader", task="read")
    looks = [call("list_files") for _ in range(5)]
    with ScriptedEndpoint(delegate, *looks, always="end") as endpoint:
        agent = {"form": "workforce", "workers": WORKERS, "limits": {"tool_calls": 3}}
        run = operator.run(endpoint, {"task": "x", "agent": agent})
    assert isinstance(run.error, ExecutionError)
    assert str(run.error) == "budget tool_calls of 3 is spent, asked for tool list_files"
    assert len(endpoint.requests) == 4
    assert not run.error.retriable


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FLOWMESH_AGENT_STEPS_MAX": "2"}, "budget steps of 2 is spent"),
        ({"FLOWMESH_AGENT_TOKENS_MAX": "30"}, "budget tokens of 30 is spent, asked for tool"),
        (
            {"FLOWMESH_AGENT_COST_MAX": "0.02", "FLOWMESH_AGENT_PRICES": "500,1000"},
            r"budget cost_usd of 0\.02 is spent, asked for tool",
        ),
        ({"FLOWMESH_AGENT_COST_MAX": "9"}, "the price of a request is unknown"),
    ],
)
def test_the_operators_ceilings_end_a_task(
    operator: Operator, variables: dict[str, str], message: str
) -> None:
    operator.allow(**variables)
    limits = {"steps": 100, "tokens": 100_000}
    with ScriptedEndpoint(always=call("list_files")) as endpoint:
        run = operator.run(endpoint, {"task": "x", "agent": {"limits": limits}})
    with pytest.raises(ExecutionError, match=message):
        raise run.error or AssertionError(run.result)
    assert len(endpoint.requests) == (1 if "unknown" in message else 2)


def test_what_a_server_was_given_is_masked_wherever_it_comes_up(
    operator: Operator, tmp_path: Path
) -> None:
    token = "mcp-token-0123456789"
    demo = {"command": sys.executable, "args": [str(DEMO)], "files": "open"}
    (tmp_path / "mcp.yaml").write_text(yaml.safe_dump({"demo": demo}))
    operator.allow(FLOWMESH_AGENT_MCP=str(tmp_path / "mcp.yaml"), FLOWMESH_AGENT_MCP_TOKEN=token)
    write = Reply(text=f"I write {token}", calls=[call("write_file", path="t", content="x")])
    with ScriptedEndpoint(write, f"it is {token}") as endpoint:
        agent = {"tools": ["files"], "mcp": {"demo": {}}}
        run = operator.run(endpoint, {"task": "Say it.", "agent": agent})
    assert run.result["items"][0]["output"] == "it is ${env.FLOWMESH_AGENT_MCP_TOKEN}"
    assert token not in json.dumps(run.result) + written_in(run.folder)


def test_a_batch_keeps_the_order_and_an_item_that_fails_spoils_no_other(
    operator: Operator,
) -> None:
    def answer(body: Any) -> Any:
        prompt = asked(body)
        if prompt == "bad":
            return Refusal(400, "no such thing")
        return Slow(prompt.upper(), 0.3 if prompt == "a" else 0)

    with ScriptedEndpoint(always=answer) as endpoint:
        data = {"type": "list", "items": ["a", "bad", "c"]}
        run = operator.run(endpoint, {"data": data, "agent": {"model": {"retries": 0}}})
    assert [item["output"] for item in run.result["items"]] == ["A", "", "C"]
    assert run.result["items"][1]["error"]["code"] == "executor.failed"
    assert "400: no such thing" in run.result["items"][1]["error"]["message"]
    assert run.result["metadata"]["batch_summary"] == {
        "total_tasks": 3,
        "completed": 2,
        "failed": 1,
    }
    assert (run.folder / "batch_logs" / "task_3_output.txt").read_text() == "C"


@pytest.mark.parametrize(("status", "retriable"), [(503, True), (401, False)])
def test_a_batch_that_failed_altogether_is_tried_again_if_that_may_help(
    operator: Operator, status: int, retriable: bool
) -> None:
    with ScriptedEndpoint(always=Refusal(status, "sorry")) as endpoint:
        data = {"type": "list", "items": ["a", "b"]}
        run = operator.run(endpoint, {"data": data, "agent": {"model": {"retries": 0}}})
    assert isinstance(run.error, ExecutionError)
    assert str(run.error).startswith("all 2 tasks of the batch failed")
    assert run.error.retriable is retriable


def test_an_item_has_its_own_time(operator: Operator) -> None:
    def answer(body: Any) -> Any:
        return Hang() if asked(body) == "slow" else "quick"

    with ScriptedEndpoint(always=answer) as endpoint:
        data = {"type": "list", "items": ["slow", "fast"]}
        run = operator.run(endpoint, {"data": data, "agent": {"timeout": 1.0}})
        wait_for(lambda: endpoint.dropped == 1, 5)
    slow, fast = run.result["items"]
    assert slow["error"]["code"] == DeadlineError.code
    assert 1.0 <= slow["usage"]["seconds"] < 2.0
    assert fast["output"] == "quick"


@needs_jail
def test_a_time_limit_covers_tools_and_ends_them(operator: Operator) -> None:
    operator.allow(FLOWMESH_AGENT_TOOLS="shell")
    with ScriptedEndpoint(call("shell", command="sleep 7391.5 & sleep 7391.5"), "no") as endpoint:
        agent = {"tools": ["shell"], "timeout": 1.5}
        run = operator.run(endpoint, {"task": "x", "agent": agent})
    assert isinstance(run.error, DeadlineError)
    assert not alive("7391.5")
    assert (run.folder / "agent_output.txt").is_file()


def test_the_time_of_the_task_holds_when_it_is_the_shorter(operator: Operator) -> None:
    with ScriptedEndpoint(Hang()) as endpoint:
        spec = {"task": "x", "timeoutSec": 4, "agent": {"timeout": 100}}
        started = time.monotonic()
        run = operator.run(endpoint, spec)
        assert time.monotonic() - started < 10
        wait_for(lambda: endpoint.dropped == len(endpoint.requests), 5)
    assert isinstance(run.error, DeadlineError)


@pytest.mark.parametrize(
    ("agent", "error", "message"),
    [
        ({"tools": ["shell"]}, InputError, "not allowed on this worker: shell; it allows files"),
        ({"tools": [{"name": "files", "depth": 1}]}, ContractError, "files.*takes no options"),
        ({"mcp": {"shop": {}}}, InputError, "no MCP server 'shop'"),
        ({"mcp": {"shop": {"url": "https://shop.example.org"}}}, InputError, "not among"),
        ({"model": {"base_url": "http://127.0.0.1:1/v1"}}, ContractError, "name is required"),
        (
            {
                "form": "plan_execute",
                "workers": {"w": {"description": "works"}},
                "output_schema": {"type": "object", "properties": {"a": {"type": "text"}}},
            },
            ContractError,
            "output_schema: .*'text'",
        ),
        ({"limits": {"step": 3}}, ContractError, "did you mean 'steps'"),
    ],
)
def test_what_is_not_allowed_or_not_right_ends_a_task_before_a_model_is_asked(
    operator: Operator, agent: dict[str, Any], error: type[Exception], message: str
) -> None:
    with ScriptedEndpoint(always="never") as endpoint:
        spec = {"data": {"type": "list", "items": ["a", "b"]}, "agent": agent}
        run = operator.run(endpoint, spec)
    with pytest.raises(error, match=message):
        raise run.error or AssertionError(run.result)
    assert endpoint.requests == []


def test_a_worker_without_a_model_says_how_to_get_one(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedEndpoint() as endpoint:
        monkeypatch.setattr(ScriptedEndpoint, "url", "")
        run = operator.run(endpoint, {"task": "x"})
    assert isinstance(run.error, InputError)
    assert "AGENT_LLM_BASE_URL" in str(run.error)


def test_no_secret_is_in_result_files_or_what_the_model_reads(operator: Operator) -> None:
    document_key = "sk-document-5555555555"

    def answer(body: Any) -> Any:
        if any(message["role"] == "tool" for message in body["messages"]):
            return f"the key is {document_key}, of the operator {KEY}"
        return Reply(text=f"I try {KEY}", calls=[call("write_file", path="k", content=KEY)])

    with ScriptedEndpoint(always=answer) as endpoint:
        model = {"base_url": endpoint.url, "name": "m", "api_key": document_key}
        run = operator.run(endpoint, {"task": "Say it.", "agent": {"model": model}})
        headers = [request.headers["authorization"] for request in endpoint.requests]
    assert headers == [f"Bearer {document_key}"] * 2
    shown = json.dumps(run.result) + written_in(run.folder / "logs")
    shown += (run.folder / "trace.jsonl").read_text() + (
        run.folder / "agent_output.txt"
    ).read_text()
    assert "${env.AGENT_LLM_API_KEY}" in shown
    for secret in (KEY, document_key):
        assert secret[:10] not in shown


CANCELLED = """
metadata: {name: long}
spec:
  taskType: agent
  task: Wait.
  agent: {tools: [shell, files], mcp: {slow: {}}}
"""


@needs_jail
def test_a_cancel_ends_model_tools_and_servers_at_once(tmp_path: Path) -> None:
    server = tmp_path / "cancelled_demo.py"
    server.write_text(DEMO.read_text())
    servers = {"slow": {"command": sys.executable, "args": [str(server)], "files": "open"}}
    (tmp_path / "mcp.yaml").write_text(yaml.safe_dump(servers))
    (tmp_path / "long.yaml").write_text(CANCELLED)
    busy = [
        call("shell", command="(setsid sleep 7392.5 &) ; trap '' TERM; sleep 7392.5"),
        call("slow_hang"),
        call("slow_spawn"),
    ]
    with ScriptedEndpoint(busy, always="never") as endpoint:
        environ = {
            **os.environ,
            "AGENT_LLM_BASE_URL": endpoint.url,
            "AGENT_LLM_MODEL": "m",
            "FLOWMESH_AGENT_TOOLS": "*",
            "FLOWMESH_AGENT_MCP": str(tmp_path / "mcp.yaml"),
        }
        took = interrupt(
            tmp_path, environ, lambda: len(alive("7392.5")) >= 2 and alive(str(server))
        )
    assert not alive("7392.5")
    assert not alive(str(server))
    assert took < 5


def test_a_cancel_ends_a_request_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text("spec: {taskType: agent, task: Wait.}\n")
    with ScriptedEndpoint(Hang()) as endpoint:
        environ = {**os.environ, "AGENT_LLM_BASE_URL": endpoint.url, "AGENT_LLM_MODEL": "m"}
        took = interrupt(tmp_path, environ, lambda: endpoint.requests)
        wait_for(lambda: endpoint.dropped == 1, 5)
    assert took < 5


def interrupt(folder: Path, environ: Mapping[str, str], when: Callable[[], Any]) -> float:
    """Run ``long.yaml``, interrupt it and return the seconds until it had ended."""
    argv = [sys.executable, "-m", "flowmesh_core", "run", str(folder / "long.yaml")]
    process = subprocess.Popen(
        [*argv, "--out", str(folder / "out")],
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: when() or process.poll() is not None, 60)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, output
    return time.monotonic() - started


def test_a_budget_error_is_an_execution_error_for_the_worker() -> None:
    assert BudgetError("spent").to_dict()["kind"] == "ExecutionError"


def test_a_key_that_a_named_agents_file_refers_to_goes_to_its_endpoint_alone(
    operator: Operator, tmp_path: Path
) -> None:
    key = "sk-large-0123456789"
    with (
        ScriptedEndpoint(call("list_files"), f"the key is {key}") as own,
        ScriptedEndpoint() as other,
    ):
        model = {"base_url": own.url, "name": "m", "api_key": "${env.FLOWMESH_AGENT_LARGE_KEY}"}
        (tmp_path / "large.yaml").write_text(json.dumps({"model": model, "tools": ["files"]}))
        operator.allow(FLOWMESH_AGENT_CONFIGS=str(tmp_path), FLOWMESH_AGENT_LARGE_KEY=key)
        run = operator.run(other, {"task": "Tell.", "configName": "large"})
    assert run.error is None
    assert {each.headers["authorization"] for each in own.requests} == {f"Bearer {key}"}
    assert other.requests == []
    assert run.result["items"][0]["output"].startswith("the key is ${")
    assert key not in written_in(run.folder)


def test_tools_that_cannot_work_here_are_refused_before_a_model_is_asked(
    operator: Operator,
) -> None:
    operator.allow(FLOWMESH_AGENT_TOOLS="*")
    with ScriptedEndpoint() as endpoint:
        run = operator.run(endpoint, {"task": "Look it up.", "configName": "search"})
    assert isinstance(run.error, InputError)
    assert "'web_search' cannot work on this worker" in str(run.error)
    assert endpoint.requests == []
