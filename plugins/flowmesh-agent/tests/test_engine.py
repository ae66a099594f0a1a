"""One run of an agent: what passes the gate, what ends it, and what comes out."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine")

from endpoint import Hang, Refusal, Reply, ScriptedEndpoint, Slow, call
from flowmesh_agent.budget import Budget, BudgetError
from flowmesh_agent.engine import explain, run_agent
from flowmesh_agent.llm import OpenedModel
from flowmesh_agent.spec import Limits, Prices
from flowmesh_agent.tools import ToolError
from orders import Notes, ask, make_order, run
from pydantic_ai import ModelRetry
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ToolReturnPart
from scripted import ScriptedModel, scripted

from flowmesh_core import (
    ArtifactError,
    ContractError,
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    InputError,
)

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}


async def add(a: int, b: int) -> dict[str, int]:
    """Add two numbers."""
    return {"sum": a + b}


async def leak() -> dict[str, list[str]]:
    """Read a file."""
    return {"text": ["the key is s3cret, s3cret"]}


def told(model: ScriptedModel, request: int = -1) -> list[Any]:
    """Return the results that a request told the model of."""
    parts = model.requests[request][0][-1].parts
    return [part.content for part in parts if isinstance(part, ToolReturnPart)]


def test_text_is_the_answer_and_its_tokens_are_counted() -> None:
    model, notes = scripted("Paris"), Notes()
    answer = run(model, prompt="Capital of France?", trace=notes, name="geographer")
    assert (answer.output, answer.data, answer.error) == ("Paris", None, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 5)
    assert (answer.usage.requests, answer.usage.unmeasured) == (1, 0)
    assert model.requests[0][1].instructions == "Be brief."
    assert notes.of("request")[0]["messages"][0]["text"] == "Capital of France?"
    response = notes.of("response")[0]
    assert (response["agent"], response["step"], response["text"]) == ("geographer", 1, "Paris")


def test_a_tool_s_result_is_told_as_data_of_that_tool() -> None:
    model, notes = scripted(call("add", a=1, b=2), "3"), Notes()
    answer = run(model, add, trace=notes)
    assert answer.output == "3"
    assert (answer.usage.requests, answer.usage.tool_calls) == (2, 1)
    assert told(model) == [{"tool": "add", "result": {"sum": 3}}]
    kinds = [line["kind"] for line in notes.lines]
    assert kinds == ["request", "response", "tool_call", "tool_result", "request", "response"]
    assert notes.of("tool_call")[0]["arguments"] == {"a": 1, "b": 2}
    assert notes.of("tool_result")[0]["result"] == {"sum": 3}


def test_calls_of_one_response_run_at_once() -> None:
    together = asyncio.Barrier(3)

    async def meet() -> str:
        """Wait for the others."""
        async with asyncio.timeout(5):
            await together.wait()
        return "met"

    answer = run(scripted([call("meet")] * 3, "done"), meet)
    assert (answer.output, answer.usage.tool_calls) == ("done", 3)


def test_no_secret_reaches_the_model_or_the_answer() -> None:
    async def fail() -> str:
        """Fail."""
        raise ToolError("refused with s3cret")

    model, notes = scripted([call("leak"), call("fail")], "it is s3cret"), Notes()
    answer = run(model, leak, fail, trace=notes)
    assert answer.output == "it is ${env.KEY}"
    assert told(model)[0]["result"] == {"text": ["the key is ${env.KEY}, ${env.KEY}"]}
    assert told(model)[1] == "refused with ${env.KEY}"
    assert "s3cret" not in str(notes.of("tool_result"))


def test_the_object_of_an_answer_is_masked_too() -> None:
    answer = run(scripted('{"city": "s3cret"}'), schema=CITY)
    assert answer.data == {"city": "${env.KEY}"}
    assert answer.output == '{"city": "${env.KEY}"}'


def test_a_long_result_is_cut_and_says_so(tmp_path: Path) -> None:
    async def read() -> list[str]:
        """Read."""
        return ["x" * 5_000_000]

    async def fail() -> str:
        """Fail."""
        raise ToolError("y" * 5_000)

    model = scripted([call("read"), call("fail")], "done")
    run(model, read, fail, limits={"result_chars": 300}, folder=tmp_path)
    result, problem = told(model)
    assert len(result["result"]) == len(problem) == 300
    assert "5000004 characters in all" in result["result"]
    (kept,) = tmp_path.iterdir()
    assert kept.read_text().startswith('["xxxx')


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ToolError("no such file"), "no such file"),
        (InputError("no index there"), "no index there"),
        (ModelRetry("say which"), "say which"),
        (OSError("/home/worker/.ssh is not yours"), "broken failed: OSError"),
        (RuntimeError(), "broken failed: RuntimeError"),
    ],
)
def test_a_tool_that_fails_ends_no_run_and_tells_what_it_means_to(
    error: Exception, shown: str
) -> None:
    async def broken() -> str:
        """Break."""
        raise error

    model, notes = scripted(call("broken"), "so be it"), Notes()
    answer = run(model, broken, trace=notes)
    assert answer.output == "so be it"
    assert told(model) == [shown]
    assert type(error).__name__ in notes.of("tool_result")[0]["cause"] or shown == "say which"


def test_calls_that_fit_no_tool_are_told_so_as_often_as_the_budget_lets_them() -> None:
    wrong = [call("subtract", a=1), call("add", a="one"), call("add", a="two", b=[])]
    model = scripted(*wrong, call("add", a=1, b=1), "2")
    answer = run(model, add)
    assert (answer.output, answer.usage.tool_calls) == ("2", 1)


def test_steps_end_a_run_and_keep_what_was_said() -> None:
    steps = [Reply(text=f"step {i}", calls=[call("add", a=i, b=i)]) for i in range(4)]
    answer = run(scripted(*steps), add, limits={"steps": 3})
    assert isinstance(answer.error, BudgetError)
    assert str(answer.error) == "budget steps of 3 is spent"
    assert (answer.output, answer.usage.requests) == ("step 2", 3)


def test_failed_calls_of_tools_count_and_calls_at_once_go_not_over_the_limit() -> None:
    calls = 0

    async def broken() -> str:
        """Break."""
        nonlocal calls
        calls += 1
        raise ToolError("no")

    answer = run(scripted(call("broken"), [call("broken")] * 9), broken, limits={"tool_calls": 3})
    assert "budget tool_calls of 3 is spent, asked for tool broken" in str(answer.error)
    assert calls <= 3


def test_cost_is_what_the_document_s_prices_say() -> None:
    prices = Prices(input_per_million=100, output_per_million=1000)
    opened = OpenedModel(model=scripted("a"), name="m", prices=prices)
    assert run(opened).usage.cost_usd == pytest.approx(10 * 1e-4 + 5 * 1e-3)
    assert run(scripted("a")).usage.cost_usd is None


def test_a_limit_of_cost_without_a_price_ends_the_run() -> None:
    answer = run(scripted("a"), limits={"cost_usd": 1.0})
    assert "the price of a request is unknown" in str(answer.error)


def test_an_answer_that_does_not_fit_its_schema_is_asked_for_again() -> None:
    model = scripted('{"city": "far too long"}', '{"town": "Rome"}', '{"city": "Rome"}')
    answer = run(model, schema=CITY)
    assert (answer.data, answer.output) == ({"city": "Rome"}, '{"city": "Rome"}')
    feedback = [str(request[0][-1].parts[0]) for request in model.requests[1:]]
    assert "too long" in feedback[0]
    assert "'town' was unexpected" in feedback[1] or "'city' is a required" in feedback[1]


def test_a_model_that_never_fits_the_schema_fails_in_the_end() -> None:
    answer = run(scripted(*['{"town": "Rome"}'] * 9), schema=CITY)
    assert isinstance(answer.error, ExecutionError)
    assert not answer.error.retriable
    assert answer.usage.requests == 4


@pytest.mark.parametrize("mode", ["auto", "native", "tool", "prompted"])
def test_every_mode_of_output_gives_the_object(mode: str) -> None:
    def step(_messages: Any, info: Any) -> Any:
        if info.output_tools:
            return call(info.output_tools[0].name, city="Rome")
        return '{"city": "Rome"}'

    answer = run(scripted(call("add", a=1, b=1), step), add, schema=CITY, output_mode=mode)
    assert answer.error is None
    assert answer.data == {"city": "Rome"}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "object", "properties": {"a": {"type": "text"}}}, r"output_schema: \$.*'text'"),
        (
            {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}},
            r"refers to http://127\.0\.0\.1:9/x\.json, not among its",
        ),
        ({"type": "object", "allOf": [{"$ref": "#"}, {"$ref": "#/$defs/A"}]}, "to #, #/.defs/A"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "'.' is not a 'regex'"),
        ({"type": "object", "$dynamicRef": "#b"}, "refers to #b"),
        (
            {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/A"}},
                "$defs": {"A": {"$id": "http://models.example/a", "$ref": "#/$defs/A"}},
            },
            "output_schema: .*recursive",
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"$id": "http://models.example/a", "$ref": "#/$defs/A"}},
                "$defs": {"A": {"type": "string"}},
            },
            "leads nowhere",
        ),
    ],
)
def test_a_schema_that_cannot_be_used_is_the_document_s_fault(schema: Any, problem: str) -> None:
    answer = run(scripted('{"a": "b"}'), schema=schema)
    assert isinstance(answer.error, (ContractError, InputError))
    assert not answer.error.retriable
    with pytest.raises(FlowmeshError, match=problem):
        raise answer.error


def test_definitions_of_a_schema_are_followed() -> None:
    inner = {"type": "string", "enum": ["b", "c"]}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": inner}}
    answer = run(scripted('{"a": "x"}', '{"a": "b"}'), schema=schema)
    assert (answer.data, answer.usage.requests) == ({"a": "b"}, 2)


def test_a_pattern_of_a_schema_is_kept() -> None:
    code = {"type": "string", "pattern": "^[A-Z]{3}$"}
    schema = {"type": "object", "properties": {"a": code}, "patternProperties": {"^x": code}}
    answer = run(scripted('{"a": "abc"}', '{"a": "ABC", "x": "x"}', '{"a": "ABC"}'), schema=schema)
    assert (answer.data, answer.usage.requests) == ({"a": "ABC"}, 3)


def test_what_goes_wrong_beside_a_pattern_is_told() -> None:
    lost = {"$id": "http://models.example/a", "$ref": "#/$defs/A"}
    schema = {"type": "object", "properties": {"a": lost}, "$defs": {"A": {"pattern": "^a"}}}
    answer = run(scripted('{"a": "b"}'), schema=schema)
    assert isinstance(answer.error, ContractError)
    assert "output_schema cannot be checked: " in str(answer.error)
    assert "/$defs/A leads nowhere" in str(answer.error)


SLOW = {"type": "object", "patternProperties": {"^(a+)+$": {"type": "null"}}}
BAIT = '{"' + "a" * 60 + '!": 1}'


def test_time_ends_a_pattern_that_never_comes_to_an_end() -> None:
    started = time.monotonic()
    answer = run(scripted(BAIT), schema=SLOW, seconds=1.0)
    assert isinstance(answer.error, DeadlineError)
    assert time.monotonic() - started < 4


def test_a_pattern_that_takes_too_long_holds_nobody_up_and_is_ended_with_its_run() -> None:
    async def main() -> list[int]:
        task = asyncio.create_task(run_agent(make_order(scripted(BAIT), schema=SLOW)))
        while not (found := psutil.Process().children()):
            await asyncio.sleep(0.02)
        started = time.monotonic()
        await asyncio.sleep(0.5)
        assert time.monotonic() - started < 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await task
        return [child.pid for child in found]

    assert not any(map(psutil.pid_exists, asyncio.run(main())))


def test_time_ends_a_run_in_the_middle_of_a_tool() -> None:
    ended: list[str] = []

    async def wait() -> str:
        """Wait."""
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("wait")
        return ""

    started = time.monotonic()
    answer = run(scripted(Reply(text="hold on", calls=[call("wait")])), wait, seconds=0.2)
    assert time.monotonic() - started < 5
    assert isinstance(answer.error, DeadlineError)
    assert (answer.output, ended) == ("hold on", ["wait"])


def test_seconds_of_the_budget_say_that_it_is_the_budget() -> None:
    answer = run(scripted(Hang()), limits={"seconds": 0.1}, seconds=0.1)
    assert str(answer.error) == "budget seconds of 0.1 is spent"


def test_a_cancelled_run_ends_at_once_and_tells_nobody_else() -> None:
    async def main() -> float:
        task = asyncio.create_task(run_agent(make_order(scripted(Hang()))))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await task
        return time.monotonic() - started

    assert asyncio.run(main()) < 1


def test_what_failed_in_passing_is_sent_again_after_the_pause_that_was_asked_for() -> None:
    notes, budget = Notes(), Budget(Limits())
    busy = Refusal(429, "busy", {"Retry-After": "1"})
    with ScriptedEndpoint(busy, Refusal(503, headers={"Retry-After": "0"}), "here") as endpoint:
        answer = ask(endpoint, trace=notes, budget=budget)
    assert answer.output == "here"
    at_s = [request.at_s for request in endpoint.requests]
    assert 1 <= at_s[1] - at_s[0] < 3
    assert [line["retry_in_s"] for line in notes.of("error")] == [1, 0]
    assert (answer.usage.requests, answer.usage.unmeasured, answer.usage.tokens) == (3, 2, 15)
    assert budget.usage == answer.usage


def test_what_is_sent_again_takes_a_step_each_time() -> None:
    limits, model = {"steps": 3}, {"retries": 10}
    with ScriptedEndpoint(always=Refusal(503, headers={"Retry-After": "0"})) as endpoint:
        answer = ask(endpoint, model=model, limits=limits)
    assert len(endpoint.requests) == answer.usage.requests == 3
    assert str(answer.error) == "budget steps of 3 is spent"


def test_a_model_s_last_error_is_written_once() -> None:
    notes = Notes()
    with ScriptedEndpoint(always=Refusal(503, "no", {"Retry-After": "0"})) as endpoint:
        answer = ask(endpoint, trace=notes, model={"retries": 1})
    again, last = notes.of("error")
    assert again["retry_in_s"] == 0
    assert last["message"] == str(answer.error)


@pytest.mark.parametrize(
    ("status", "retriable"),
    [(400, False), (401, False), (403, False), (404, False), (429, True), (500, True)],
)
def test_a_refusal_names_the_model_and_what_was_said(status: int, *, retriable: bool) -> None:
    refused = Refusal(status, "not for s3cret", {"Retry-After": "0"})
    with ScriptedEndpoint(always=refused) as endpoint:
        answer = ask(endpoint, model={"retries": 2})
    assert len(endpoint.requests) == (3 if retriable else 1)
    expected = f"model tiny refused the request with status {status}: not for ${{env.KEY}}"
    assert str(answer.error) == expected
    assert isinstance(answer.error, ExecutionError)
    assert answer.error.retriable is retriable


def test_a_spent_quota_is_not_asked_again() -> None:
    body = b'{"error": {"message": "pay first", "code": "insufficient_quota"}}'
    with ScriptedEndpoint(always=Refusal(429, headers={}, body=body)) as endpoint:
        answer = ask(endpoint)
    assert len(endpoint.requests) == 1
    assert answer.error is not None
    assert not answer.error.retriable


def test_an_endpoint_that_is_gone_may_come_back() -> None:
    with ScriptedEndpoint() as endpoint:
        pass
    answer = ask(endpoint, model={"retries": 0})
    assert "model tiny cannot be asked" in str(answer.error)
    assert answer.error is not None
    assert answer.error.retriable


@pytest.mark.parametrize("step", [Hang(), Slow("late", 30), Slow("late", 30, drip=True)])
def test_a_request_takes_no_longer_than_it_may(step: Any) -> None:
    started = time.monotonic()
    with ScriptedEndpoint(always=step) as endpoint:
        answer = ask(endpoint, model={"retries": 1, "request_timeout_s": 0.3})
    assert time.monotonic() - started < 10
    assert len(endpoint.requests) == 2
    assert answer.error is not None
    assert "model tiny cannot be asked" in str(answer.error)
    assert answer.error.retriable


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b""])
def test_an_answer_that_is_none_is_an_error_of_the_run(body: bytes) -> None:
    with ScriptedEndpoint(always=body) as endpoint:
        answer = ask(endpoint, model={"retries": 0})
    assert isinstance(answer.error, ExecutionError)


def test_an_endpoint_that_counts_no_tokens_is_told_as_unmeasured() -> None:
    with ScriptedEndpoint(Reply(text="hello " * 50, tokens=None)) as endpoint:
        answer = ask(endpoint, prompt="go " * 100)
    assert (answer.usage.requests, answer.usage.unmeasured) == (1, 1)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (104, 101)


def test_an_endpoint_that_counts_no_tokens_has_a_budget_of_them_all_the_same() -> None:
    step = Reply(calls=[call("add", a=1, b=1)], tokens=None)
    with ScriptedEndpoint(always=step) as endpoint:
        answer = ask(endpoint, add, limits={"tokens": 1})
    assert len(endpoint.requests) == 1
    assert str(answer.error) == "budget tokens of 1 is spent, asked for tool add"


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("stop", False)])
def test_an_answer_that_was_cut_says_so(reason: str, *, cut: bool) -> None:
    notes = Notes()
    with ScriptedEndpoint(Reply(text="once upon", finish_reason=reason)) as endpoint:
        answer = ask(endpoint, trace=notes)
    assert (answer.ok, answer.truncated) == (True, cut)
    assert ["max_tokens are spent" in line["message"] for line in notes.of("warning")] == [
        True
    ] * cut


def test_native_calls_of_tools_go_over_the_wire() -> None:
    with ScriptedEndpoint([call("add", a=1, b=2), call("add", a=3, b=4)], "3 and 7") as endpoint:
        answer = ask(endpoint, add)
    assert (answer.output, answer.usage.tool_calls) == ("3 and 7", 2)
    first, second = (request.body for request in endpoint.requests)
    assert first["tools"][0]["function"]["name"] == "add"
    results = [each["content"] for each in second["messages"] if each["role"] == "tool"]
    assert results == ['{"tool":"add","result":{"sum":3}}', '{"tool":"add","result":{"sum":7}}']


def test_what_is_ours_stays_ours_inside_what_libraries_wrap_around_it() -> None:
    inner = ArtifactError("host models.example is not allowed")
    outer = RuntimeError("connection error")
    outer.__cause__ = inner
    assert explain(outer) is inner
    assert isinstance(explain(UserError("two tools have one name")), InputError)
