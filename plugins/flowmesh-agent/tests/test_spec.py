from __future__ import annotations

import json
from typing import Any

import pytest
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock, AgentModel, AgentResult, AgentSpec, Limits
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flowmesh_core import ConfigError, ContractError
from flowmesh_core.config import load_plugin_settings
from flowmesh_core.validation import validate_model

HELPER = {"description": "reads"}


def read(**spec: Any) -> AgentSpec:
    return validate_model(AgentSpec, {"taskType": "agent", **spec}, where="", prefix="spec")


def block(**agent: Any) -> AgentBlock:
    return read(task="do it", agent=agent).agent


# Where the work comes from.


@pytest.mark.parametrize(
    "spec",
    [
        {"task": "do it"},
        {"task": "do it", "data": None},
        {"task": "do it", "data": {"type": "none"}},
        {"data": {"type": "list", "items": ["a"]}},
        {"data": "${stage.items}"},
    ],
)
def test_one_source_of_work_is_enough(spec: dict[str, Any]) -> None:
    found = read(**spec)
    assert found.config_name == "default"
    assert found.agent == AgentBlock()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, r"spec must have either task or data, got neither"),
        ({"data": {"type": "none"}}, r"either task or data, got neither"),
        ({"task": "x", "data": {"type": "list", "items": ["a"]}}, "task or data, got both"),
        ({"task": " \n"}, r"spec\.task"),
        ({"task": 5}, r"spec\.task must be a string, got 5"),
        ({"task": "x", "configName": "../etc/passwd"}, r"spec\.configName"),
        ({"task": "x", "configName": "a/b"}, r"spec\.configName"),
        ({"task": "x", "configName": ".hidden"}, r"spec\.configName"),
        ({"task": "x", "configName": "a\n"}, r"spec\.configName"),
        ({"task": "x", "configName": "a" * 65}, r"spec\.configName"),
        ({"task": "x", "agent": "search"}, r"spec\.agent must be an object, got 'search'"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_by_field(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        read(**spec)


def test_nulls_are_what_is_not_said() -> None:
    assert read(task="x", configName=None, agent=None) == read(task="x", agent={})
    found = block(tools=None, mcp=None, limits=None, workers=None, model=None)
    assert found == AgentBlock()
    assert block(mcp={"docs": None}).mcp["docs"].server is None


# The block.


def test_a_tool_is_its_name_or_its_name_with_options() -> None:
    plain, optional, configured = block(
        tools=["files", {"name": "http", "required": False}, {"name": "shell", "network": True}]
    ).tools
    assert (plain.name, plain.required, plain.options) == ("files", True, {})
    assert (optional.required, optional.options) == (False, {})
    assert (configured.required, configured.options) == (True, {"network": True})


@pytest.mark.parametrize("key", ["timeout", "timeoutSec", "timeout_s"])
def test_the_timeout_is_known_by_each_of_its_names(key: str) -> None:
    assert block(**{key: 2.5}).timeout == 2.5


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        ({"instuctions": "x"}, r"spec\.agent: unknown key 'instuctions', .*'instructions'"),
        ({"model": {"nam": "x"}}, r"spec\.agent\.model: unknown key 'nam', did you mean 'name'"),
        ({"limits": {"step": 1}}, r"spec\.agent\.limits: unknown key 'step', .*'steps'"),
        ({"tools": ["a b"]}, r"spec\.agent\.tools\[0\]\.name"),
        ({"tools": [{"network": True}]}, r"spec\.agent\.tools\[0\]\.name is required"),
        ({"tools": "files"}, r"spec\.agent\.tools must be a list, got 'files'"),
        ({"mcp": {"x": {"command": "sh"}}}, r"spec\.agent\.mcp\.x: unknown key 'command'"),
        ({"mcp": {"x": {"env": {"A": "b"}}}}, r"spec\.agent\.mcp\.x: unknown key 'env'"),
        ({"mcp": {"x": {"server": "a", "url": "http://h"}}}, "one of server and url, got both"),
        ({"mcp": {"x": {"headers": {"a": "b"}}}}, r"mcp\.x: headers need url"),
        ({"mcp": {"x": {"url": "file:///etc/passwd"}}}, r"mcp\.x\.url must be an http"),
        ({"mcp": {"a-b": {}}}, r"spec\.agent\.mcp"),
        ({"form": "swarm"}, r"spec\.agent\.form"),
        ({"workers": {"a": {}}}, r"spec\.agent\.workers\.a\.description is required"),
        ({"workers": {"a": {**HELPER, "workers": {}}}}, r"workers\.a: unknown key 'workers'"),
        ({"workers": {"a": {**HELPER, "form": "single"}}}, r"workers\.a: unknown key 'form'"),
        ({"workers": {"a": {**HELPER, "timeout": 5}}}, r"workers\.a: unknown key 'timeout'"),
        ({"output_schema": {"type": "array"}}, 'output_schema must have type "object"'),
        ({"output_schema": {}}, 'output_schema must have type "object"'),
        ({"output_mode": "magic"}, r"spec\.agent\.output_mode"),
        ({"model": {"base_url": "ftp://h"}}, r"model\.base_url must be an http:// or https://"),
        ({"model": {"base_url": "http://u:p@h"}}, "URL without a login"),
        ({"model": {"api_key": "k"}}, "api_key and headers need base_url"),
        ({"model": {"headers": {"a": "b"}}}, "api_key and headers need base_url"),
        ({"model": {"base_url": "http://h", "api_key": "${KEY}"}}, r"model\.api_key.*\$\{env\.NAM"),
        (
            {"model": {"base_url": "http://h", "inference": {"model": {}}}},
            r"one of base_url, inference and serve, got \['base_url', 'inference'\]",
        ),
        ({"model": {"base_url": "http://h", "serve": {}}}, r"got \['base_url', 'serve'\]"),
        ({"model": {"inference": {"a": 1}, "serve": {"a": 1}}}, r"got \['inference', 'serve'\]"),
        ({"model": {"stop": [""]}}, r"spec\.agent\.model\.stop\[0\]"),
        ({"model": {"prices": {"input_per_million": 1}}}, "prices.output_per_million is required"),
    ],
)
def test_what_is_wrong_with_an_agent_is_told_by_field(agent: dict[str, Any], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        block(**agent)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ContractError, match="limits") as caught:
        block(form="swarm", limits={"steps": 0}, model={"top_p": 2})
    assert len(caught.value.problems) == 3


def test_secrets_of_a_document_are_not_in_its_text() -> None:
    found = block(
        model={"base_url": "http://h", "api_key": "s3cret", "headers": {"x": "s3cret"}},
        mcp={"a": {"url": "http://h", "headers": {"x": "s3cret"}}},
    )
    assert "s3cret" not in repr(found)
    assert found.model is not None
    assert found.model.api_key is not None
    assert found.model.api_key.get_secret_value() == "s3cret"


BOUNDS: list[tuple[Any, str, int, int]] = [
    (Limits, "steps", 1, 1000),
    (Limits, "tool_calls", 0, 10_000),
    (Limits, "tokens", 1, 10**9),
    (Limits, "result_chars", 200, 10**6),
    (AgentBlock, "concurrency", 1, 64),
    (AgentModel, "retries", 0, 10),
    (AgentModel, "seed", 0, 2**32 - 1),
]


@pytest.mark.parametrize(("model", "name", "low", "high"), BOUNDS)
@given(data=st.data())
def test_whole_numbers_are_taken_between_their_bounds_only(
    model: Any, name: str, low: int, high: int, data: st.DataObject
) -> None:
    value = data.draw(st.sampled_from([low - 1, low, high, high + 1]) | st.integers())
    if low <= value <= high:
        assert getattr(model.model_validate({name: value}), name) == value
    else:
        with pytest.raises(ValidationError, match=name):
            model.model_validate({name: value})


@given(
    case=st.sampled_from(
        [
            (Limits, "seconds", 1e6),
            (Limits, "tool_seconds", 3600),
            (Limits, "cost_usd", 1e6),
            (AgentBlock, "timeout", 1e6),
            (AgentModel, "request_timeout_s", 1e6),
            (AgentModel, "top_p", 1),
        ]
    ),
    value=st.floats() | st.floats(-1, 2),
)
def test_shares_and_times_are_above_nothing_and_finite(case: Any, value: float) -> None:
    model, name, high = case
    if 0 < value <= high:
        assert getattr(model.model_validate({name: value}), name) == value
    else:
        with pytest.raises(ValidationError, match=name):
            model.model_validate({name: value})


# A named agent and what a document lays over it.


def test_what_a_document_says_takes_the_place_of_the_named_agents() -> None:
    named = AgentBlock.model_validate(
        {"instructions": "be brief", "tools": ["files"], "limits": {"steps": 5}, "timeout": 9}
    )
    whole = block(tools=[], limits={"tokens": 7}).over(named)
    assert (whole.instructions, whole.timeout) == ("be brief", 9)
    assert whole.tools == []
    assert whole.limits == Limits(tokens=7)
    assert block().over(named) == named


def test_a_key_of_one_model_never_goes_to_the_endpoint_of_another() -> None:
    named = AgentBlock.model_validate(
        {"model": {"base_url": "https://trusted", "api_key": "s3cret", "headers": {"x": "y"}}}
    )
    whole = block(model={"base_url": "https://elsewhere"}).over(named)
    assert whole.model is not None
    assert whole.model.api_key is None
    assert whole.model.headers == {}


def test_a_form_may_come_from_one_and_its_workers_from_the_other() -> None:
    named = AgentBlock.model_validate({"workers": {"a": HELPER}, "form": "workforce"})
    assert block(form="plan_execute").over(named).workers["a"].description == "reads"
    with pytest.raises(ContractError, match=r"workers need .*form plan_execute or workforce"):
        block(form="single").over(named)
    with pytest.raises(ContractError, match="workers is required when form is 'workforce'"):
        block(workers={}).over(named)


# Forms for other readers.


def test_the_schema_of_a_spec_is_json_and_knows_both_ways_to_name_a_tool() -> None:
    schema = json.loads(json.dumps(AgentSpec.model_json_schema()))
    kinds = schema["$defs"]["AgentBlock"]["properties"]["tools"]["items"]["anyOf"]
    assert {"type": "string"} in kinds
    assert {"$ref": "#/$defs/ToolUse"} in kinds


def test_a_result_has_the_contracts_keys() -> None:
    found = AgentResult.model_validate(
        {
            "ok": True,
            "model": "default",
            "items": [{"index": 0, "output": "x", "finish_reason": "completed"}],
            "usage": {"execution_time_sec": 1.5, "num_requests": 1, "agent_config": "default"},
            "metadata": {"task": "t", "execution_log": []},
        }
    ).model_dump()
    assert {"ok", "model", "items", "usage", "metadata"} <= set(found)
    assert {"execution_time_sec", "num_requests", "agent_config"} <= set(found["usage"])
    assert {"index", "output", "finish_reason"} <= set(found["items"][0])


# What the operator decides.


def settings(**environ: str) -> AgentSettings:
    return load_plugin_settings(AgentSettings, plugin="agent", environ=environ)


def test_nothing_set_allows_files_and_no_network() -> None:
    found = settings()
    assert found.allows("files")
    assert not found.allows("shell")
    assert found.http_allow == ()
    assert (found.sandbox, found.sandbox_network) == ("strict", False)
    assert (found.base_url, found.model, found.api_key) == ("", "", None)


def test_lists_and_folders_are_read_from_their_variables() -> None:
    found = settings(
        FLOWMESH_AGENT_TOOLS="files, shell",
        FLOWMESH_AGENT_CONFIGS="/a:/b",
        FLOWMESH_AGENT_SANDBOX_NETWORK="1",
        FLOWMESH_AGENT_MEMORY_BYTES="1024",
        FLOWMESH_AGENT_HTTP_ALLOW="a.org,b.org",
        FLOWMESH_HTTP_ALLOW="c.org",
    )
    assert found.tools == ("files", "shell")
    assert [str(folder) for folder in found.configs] == ["/a", "/b"]
    assert (found.sandbox_network, found.memory_bytes) == (True, 1024)
    assert (found.http_allow, found.fetch_allow) == (("a.org", "b.org"), ("c.org",))
    assert settings(FLOWMESH_AGENT_TOOLS="*").allows("anything")


def test_the_older_names_of_the_endpoint_work_and_the_new_ones_win() -> None:
    old = {"UTU_LLM_BASE_URL": "http://old", "UTU_LLM_MODEL": "m1", "UTU_LLM_API_KEY": "k1"}
    found = settings(**old, UTU_LLM_TYPE="chat.completions")
    assert (found.base_url, found.model) == ("http://old", "m1")
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "k1"
    new = {"AGENT_LLM_BASE_URL": "http://new", "AGENT_LLM_MODEL": "m2", "AGENT_LLM_API_KEY": "k2"}
    found = settings(**old, **new)
    assert (found.base_url, found.model) == ("http://new", "m2")
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "k2"


def test_an_older_key_never_goes_to_an_endpoint_of_the_new_name() -> None:
    found = settings(AGENT_LLM_BASE_URL="http://new", UTU_LLM_API_KEY="k1", UTU_LLM_MODEL="m1")
    assert (found.base_url, found.model, found.api_key) == ("http://new", "m1", None)


def test_a_way_to_ask_that_is_not_known_is_an_error_by_name() -> None:
    with pytest.raises(ConfigError, match=r"UTU_LLM_TYPE must be chat\.completions.*'responses'"):
        settings(UTU_LLM_TYPE="responses")


def test_keys_are_listed_for_masks_and_hidden_from_texts() -> None:
    found = settings(AGENT_LLM_API_KEY="s3cret-a", SERPER_API_KEY="s3cret-b", JINA_API_KEY="s3c-c")
    assert found.secrets == {
        "AGENT_LLM_API_KEY": "s3cret-a",
        "SERPER_API_KEY": "s3cret-b",
        "JINA_API_KEY": "s3c-c",
    }
    assert "s3c" not in repr(found)
    assert settings(UTU_LLM_API_KEY="x").secrets == {"UTU_LLM_API_KEY": "x"}


ceilings = st.none() | st.integers(1, 300)


@given(
    limits=st.builds(
        Limits,
        steps=st.integers(1, 300),
        tokens=st.integers(1, 300),
        cost_usd=ceilings,
        tool_calls=st.integers(0, 9),
    ),
    maxima=st.fixed_dictionaries(
        {"steps_max": ceilings, "tokens_max": ceilings, "cost_max": ceilings}
    ),
)
def test_no_document_goes_over_the_operators_ceilings(limits: Limits, maxima: Any) -> None:
    capped = AgentSettings(**maxima).cap(limits)
    for name in ("steps", "tokens", "cost"):
        field = "cost_usd" if name == "cost" else name
        known = [x for x in (getattr(limits, field), maxima[f"{name}_max"]) if x is not None]
        assert getattr(capped, field) == min(known, default=None)
    assert capped.tool_calls == limits.tool_calls
