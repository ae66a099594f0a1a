"""Calls of tools in plain JSON: what a model is told, and what its text means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flowmesh_agent.protocol import (
    Answered,
    Called,
    Offer,
    StepError,
    Turn,
    build_chat,
    explain_tools,
    read_step,
    step_schema,
    write_call,
    write_result,
)
from hypothesis import given
from hypothesis import strategies as st

ADD = Offer(
    name="add",
    description="Adds two numbers.",
    parameters={
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/Number"}},
        "required": ["a", "b"],
        "$defs": {"Number": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/Words"}]}}
        | {"Words": {"type": "string"}},
    },
)
JOIN = Offer(name="join", parameters={"$defs": {"Number": {"type": "null"}}})
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
objects = st.dictionaries(st.text(), values)


@given(st.text(), objects)
def test_what_is_written_as_a_call_is_read_as_that_call(tool: str, arguments: Any) -> None:
    text = write_call(tool, arguments)
    assert read_step(text, structured=False) == Called(tool, arguments)
    assert read_step(f"\n```json\n{text}\n```\n", structured=True) == Called(tool, arguments)


@given(objects)
def test_an_object_is_an_answer_where_one_is_wanted(answer: Any) -> None:
    text = json.dumps({"answer": answer})
    assert read_step(text, structured=True) == Answered(answer)
    assert read_step(text, structured=False) == Answered(json.dumps(answer, ensure_ascii=False))


@given(st.text())
def test_any_text_is_a_step_or_a_reason_why_it_is_none(text: str) -> None:
    for structured in (True, False):
        try:
            step: Any = read_step(text, structured=structured)
        except StepError as exc:
            step = str(exc)
        if isinstance(step, str):
            assert "JSON object" in step
        else:
            assert step == Answered(text.strip())
            assert not structured


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"tool": "add", "arguments": {"a"', "no valid JSON"),
        ("```json\n{oops}\n```", "no valid JSON"),
        ("[1]", 'either "tool" or "answer"'),
        ("{}", 'either "tool" or "answer"'),
        ('{"tool": "add", "answer": "both"}', 'either "tool" or "answer"'),
        ('{"tool": 3, "arguments": {}}', '"tool" must be the name'),
        ('{"tool": "add", "arguments": [1]}', '"arguments" an object'),
        ("{" * 100_000, "no valid JSON"),
        ('{"a":' * 100_000, "no valid JSON"),
    ],
)
def test_what_is_no_step_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(StepError, match=reason):
        read_step(text, structured=False)


def test_text_is_no_answer_where_an_object_is_wanted() -> None:
    with pytest.raises(StepError, match="no valid JSON"):
        read_step("Paris", structured=True)
    with pytest.raises(StepError, match='"answer" must be an object'):
        read_step('{"answer": "Paris"}', structured=True)


def test_a_call_without_arguments_has_none() -> None:
    assert read_step('{"tool": "list"}', structured=False) == Called("list", {})


def test_the_schema_takes_calls_of_each_tool_and_an_answer_and_nothing_else() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the engine")
    schema = step_schema([ADD, JOIN], CITY)
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    good: list[Any] = [
        {"tool": "add", "arguments": {"a": 1, "b": 2}},
        {"tool": "add", "arguments": {"a": 1, "b": "two"}},
        {"tool": "join", "arguments": {}},
        {"answer": {"city": "Paris"}},
    ]
    bad: list[Any] = [
        {"tool": "add", "arguments": {"a": "1", "b": 2}},
        {"tool": "add", "arguments": {"a": 1, "b": None}},
        {"tool": "add"},
        {"tool": "join", "arguments": []},
        {"tool": "remove", "arguments": {}},
        {"answer": "Paris"},
        {"answer": {"city": "Paris"}, "tool": "join"},
    ]
    assert [step for step in good if not checker.is_valid(step)] == []
    assert [step for step in bad if checker.is_valid(step)] == []


def test_definitions_of_two_tools_with_one_name_stay_apart() -> None:
    other = {"properties": {"a": {"$ref": "#/$defs/Number"}}, "$defs": {"Number": {"const": 1}}}
    schema = step_schema([ADD, Offer(name="answer", parameters=other)], other)
    assert schema["$defs"] == {
        "d0": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/d1"}]},
        "d1": {"type": "string"},
        "d2": {"const": 1},
        "d3": {"const": 1},
    }
    schema = step_schema([JOIN], None)
    assert schema["anyOf"][-1]["properties"] == {"answer": {"type": "string"}}
    assert "$defs" not in schema


TREE = {"type": "object", "properties": {"left": {"$ref": "#"}, "leaf": {"type": "integer"}}}
PAIR = {
    "type": "object",
    "properties": {"a/b %": {"enum": [1, 2]}, "c": {"$ref": "#/properties/a~1b%20%25"}},
}
CHOICE = {
    "type": "object",
    "anyOf": [{"required": ["a"]}, {"properties": {"b": {"$ref": "#/anyOf/0"}}}],
}
NAMED = {
    "type": "object",
    "definitions": {"n": {"properties": {"v": {"type": "null"}, "n": {"$ref": "#/definitions/n"}}}},
    "properties": {"n": {"$ref": "#/definitions/n"}, "$ref": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        (TREE, {"left": {"left": {"leaf": 1}}}, {"left": {"left": {"leaf": "x"}}}),
        (PAIR, {"a/b %": 1, "c": 2}, {"c": 3}),
        (CHOICE, {"b": {"a": 1}}, {"b": {}}),
        (NAMED, {"n": {"n": {"v": None}}, "$ref": "x"}, {"n": {"n": {"v": 1}}}),
    ],
)
def test_references_of_any_kind_lead_where_they_did(parameters: Any, good: Any, bad: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the engine")
    given = jsonschema.Draft202012Validator(parameters)
    assert [given.is_valid(good), given.is_valid(bad)] == [True, False]
    schema = step_schema([ADD, Offer(name="use", parameters=parameters)], parameters)
    checker = jsonschema.Draft202012Validator(schema)
    checker.check_schema(schema)
    for value, valid in ((good, True), (bad, False)):
        assert checker.is_valid({"tool": "use", "arguments": value}) == valid
        assert checker.is_valid({"answer": value}) == valid


def test_references_that_lead_nowhere_hold_a_model_to_nothing() -> None:
    parts = ("#/$defs/gone", "#/properties/a/type/0", "#/required/x")
    wanted = {"properties": {str(n): {"$ref": part} for n, part in enumerate(parts)}}
    schema = step_schema([Offer(name="use", parameters={**wanted, "required": ["0"]})], None)
    assert schema["$defs"] == {"d0": {}, "d1": {}, "d2": {}}


def test_a_model_is_told_of_each_tool_and_of_the_answer_that_is_wanted() -> None:
    told = explain_tools([ADD, JOIN], CITY)
    assert "- add: Adds two numbers. Arguments: {" in told
    assert "- join:" in told
    assert '"city"' in told
    assert "your answer as text" in explain_tools([ADD], None)


def test_neighbours_of_one_role_are_one_message() -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Hello"),
        Turn("user", write_result("add", "3")),
        Turn("assistant", "3"),
        Turn("user", "Thanks"),
    ]
    assert build_chat(turns) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\n\nResult of add: 3"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Thanks"},
    ]
