"""Specs that several engines share: defaults, ranges, hints, spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from flowmesh_core.errors import ContractError
from flowmesh_core.specs import (
    CheckpointLoad,
    EmbeddingResult,
    EmbeddingSpec,
    InferenceParams,
    InferenceResult,
    InferenceSpec,
    JsonlExport,
    Model,
    ResponseFormat,
    ServeResult,
    ServeSpec,
    TaskSpec,
    Usage,
    refuse_fields,
)
from flowmesh_core.validation import StrictBlock, validate_model

SPECS = {
    path.stem: spec
    for path in sorted((Path(__file__).parent / "documents").glob("*.yaml"))
    if (spec := yaml.safe_load(path.read_text("utf-8")).get("spec") or {}).get("taskType")
    in ("inference", "vllm")
}


def read(model: type[BaseModel], raw: Any) -> Any:
    return validate_model(model, raw, where="task a", prefix="spec")


def read_params(**raw: Any) -> InferenceParams:
    return InferenceParams.model_validate(raw)


def problem_of(model: type[BaseModel], raw: Any) -> str:
    with pytest.raises(ContractError, match=r"^task a: ") as caught:
        read(model, raw)
    return str(caught.value).removeprefix("task a: ")


# Documents.


@pytest.mark.parametrize("name", SPECS)
def test_inference_document_of_the_contract_is_read(name: str) -> None:
    spec = read(InferenceSpec, SPECS[name])
    assert spec.task_type == SPECS[name]["taskType"]
    assert spec.inference == InferenceParams.model_validate(SPECS[name].get("inference") or {})


def test_every_field_of_the_largest_document_arrives() -> None:
    spec = read(InferenceSpec, SPECS["inference_vllm"])
    assert spec.model.source.identifier == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (spec.model.source.type, spec.model.source.revision) == ("huggingface", "main")
    style, tone, task = spec.model.adapters
    assert (style.name, style.id, style.apply, style.path, style.scale) == (
        *("style", "7", "runtime", "adapters/style"), 0.5)  # fmt: skip
    assert (tone.id, tone.apply, tone.archive_format, tone.headers) == (
        "tone", "merge", "tar.gz", {"X-Key": "k"})  # fmt: skip
    assert (task.task_id, task.scale, task.type) == ("7f3c", 1.0, "lora")
    load = spec.checkpoint.load
    assert (load.url, load.filename) == ("https://host.example/model.tar.gz", "model.tar.gz")
    assert (load.archive_format, load.timeout_s) == ("tar.gz", 300)
    params = spec.inference
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.2, 0.9, -1, 64)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, 0.2)
    assert (params.stop, params.system_prompt) == (["\n\n", "END"], "Answer briefly.")
    export = spec.postprocess.jsonl_export
    assert (export.path, export.required_fields) == ("answers.jsonl", ["answer"])
    assert export.fields["answer"] == {"from": "output", "fallback": "none"}


@pytest.mark.parametrize(
    ("model", "one", "other"),
    [
        (InferenceParams, {"max_tokens": 3}, {"max_new_tokens": 3}),
        (InferenceParams, {"system_prompt": "x"}, {"systemPrompt": "x"}),
        (InferenceParams, {"stop": ["x"]}, {"stop": "x"}),
        (InferenceSpec, {"checkpoint": {"load": {"path": "x"}}},
         {"checkpoint": {"load": {"uri": "x"}}}),
        (InferenceSpec, {"checkpoint": {"load": {"taskId": "x", "timeoutSec": 3}}},
         {"checkpoint": {"load": {"task_id": "x", "timeout_s": 3}}}),
        (InferenceSpec, {"model": {"adapters": [{"taskId": "7", "id": "3"}]}},
         {"model": {"adapters": [{"task_id": 7, "adapter_id": 3}]}}),
        (InferenceSpec, {"model": {"source": {"taskId": "x", "file": "f"}}},
         {"model": {"source": {"task_id": "x", "filename": "f"}}}),
        (InferenceSpec, {"taskType": "inference"}, {"task_type": "inference"}),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"type": "object"}},
         {"type": "json_schema", "schema": {"type": "object"}}),
    ],
)  # fmt: skip
def test_both_spellings_mean_the_same(
    model: type[BaseModel], one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert read(model, one) == read(model, other) != model.model_construct()


@pytest.mark.parametrize("absent", [{}, {"model": None, "checkpoint": None, "inference": None,
                                         "postprocess": None}])  # fmt: skip
def test_defaults_are_those_of_the_contract(absent: dict[str, Any]) -> None:
    spec = read(InferenceSpec, absent)
    params = spec.inference
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (
        0.7,
        0.95,
        -1,
        512,
    )
    assert (params.presence_penalty, params.frequency_penalty) == (0, 0)
    assert (params.repetition_penalty, params.min_p, params.n) == (1.0, 0.0, 1)
    assert (params.stop, params.seed, params.logprobs, params.do_sample) == ([], None, None, None)
    assert (params.system_prompt, params.prompt_format) == (None, "auto")
    assert params.response_format.schema_object is None
    assert (spec.model.source, spec.model.adapters) == (None, [])
    assert (spec.checkpoint.load, spec.postprocess.jsonl_export) == (None, None)


# Ranges.

RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 0.0, 1.5, 100, "0.5"], [-0.1, "warm", None, [], float("nan")]),
    ("top_p", [0.01, 1, 1.0], [0, -1, 1.01, "x", float("nan")]),
    ("top_k", [-1, 0, 1, 10**6], [-2, 1.5, "many"]),
    ("min_p", [0, 0.5, 1], [-0.1, 1.1]),
    ("max_tokens", [1, 10**6], [0, -1, 1.5, None]),
    ("presence_penalty", [-2, 0, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 1, 5], [0, -1]),
    ("seed", [0, 2**32 - 1, None], [-1, 2**32, 1.5, 10**5000]),
    ("n", [1, 64], [0, 65]),
    ("logprobs", [0, 20, None], [-1]),
    ("stop", ["x", ["x", "y"], [], None], ["", ["x", ""], [1], {"x": 1}]),
    ("do_sample", [True, False, None], ["perhaps", 3]),
    ("stream", [True, False], ["perhaps", 3, None]),
    ("prompt_format", ["auto", "chat", "plain"], ["jinja", None]),
    ("system_prompt", ["", "x", None], [3, ["x"]]),
    (
        "response_format",
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "regex", "regex": "[a-z]+"},
            {"type": "choice", "choice": ["yes", "no"]},
        ],
        ["json_object", {"type": "x"}, {"type": "regex"}, {"type": "choice", "choice": []}],
    ),
]


def test_every_field_of_inference_is_in_the_table() -> None:
    assert {name for name, _, _ in RANGES} == set(InferenceParams.model_fields)


@pytest.mark.parametrize(("name", "good", "bad"), RANGES, ids=[row[0] for row in RANGES])
def test_field_of_inference_keeps_to_its_range(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        read(InferenceSpec, {"inference": {name: value}})
    for value in bad:
        assert problem_of(InferenceSpec, {"inference": {name: value}}).startswith(
            f"spec.inference.{name}"
        ), value


def test_problem_says_field_range_and_what_came() -> None:
    raw = {"inference": {"temperature": -1, "top_p": 2, "n": "x"}}
    assert problem_of(InferenceSpec, raw) == (
        "spec.inference.temperature must be greater than or equal to 0, got -1; "
        "spec.inference.top_p must be less than or equal to 1, got 2; "
        "spec.inference.n must be a whole number, got 'x'"
    )
    assert problem_of(InferenceParams, {"stop": ["x", ""]}) == (
        "spec.stop: an empty string would stop before the first token"
    )


# Hints.


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"inference": {"temprature": 1}},
         "spec.inference: unknown key 'temprature', did you mean 'temperature'?"),
        ({"inference": {"maxtokens": 1}},
         "spec.inference: unknown key 'maxtokens', did you mean 'max_tokens'?"),
        ({"inference": {"systemprompt": 1}},
         "spec.inference: unknown key 'systemprompt', did you mean 'system_prompt'?"),
        ({"inference": {"response_format": {"typ": "text"}}},
         "spec.inference.response_format: unknown key 'typ', did you mean 'type'?"),
        ({"postprocess": {"jsonl_export": {"path": "x", "requiredfields": []}}},
         "spec.postprocess.jsonl_export: unknown key 'requiredfields', "
         "did you mean 'required_fields'?"),
    ],
)  # fmt: skip
def test_unknown_key_gets_the_nearest_name(raw: dict[str, Any], problem: str) -> None:
    assert problem_of(InferenceSpec, raw) == problem


def test_another_engines_block_is_ignored() -> None:
    raw = {"model": {"vllm": {"no_such": 1}, "source": {"identifier": "x", "extra": 1}}, "x": 1}
    assert read(InferenceSpec, raw).model.source.identifier == "x"


@given(st.text(max_size=12).filter(lambda key: key not in ("path", "fields", "required_fields")))
@settings(max_examples=60, deadline=None, database=None)
def test_any_unknown_key_is_refused_by_name(key: str) -> None:
    assert f"unknown key {key!r}, " in problem_of(JsonlExport, {"path": "x", key: 1})


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"model": {"adapters": [{"name": "x"}]}},
         "spec.model.adapters[0]: one of path, url, taskId is required"),
        ({"model": {"adapters": [{"path": "x", "apply": "later"}]}},
         "spec.model.adapters[0].apply must be 'runtime' or 'merge', got 'later'"),
        ({"model": {"adapters": [{"path": "x", "id": True}]}},
         "spec.model.adapters[0].id must be a string, got True"),
        ({"checkpoint": {"load": {"archive_format": "rar"}}},
         "spec.checkpoint.load.archive_format must be 'auto', 'zip', 'tar', 'tar.gz', 'tgz', "
         "'tar.bz2', 'tar.xz' or 'none', got 'rar'"),
        ({"checkpoint": {"load": {"timeoutSec": 0}}},
         "spec.checkpoint.load.timeoutSec must be greater than 0, got 0"),
        ({"model": []}, "spec.model must be an object, got list"),
        ({"postprocess": {"jsonl_export": {}}}, "spec.postprocess.jsonl_export.path is required"),
    ],
)  # fmt: skip
def test_block_that_cannot_work_is_refused(raw: dict[str, Any], problem: str) -> None:
    assert problem_of(InferenceSpec, raw) == problem


# Response format.

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("raw", "schema"),
    [
        ({}, None),
        ({"type": "text"}, None),
        ({"type": "text", "json_schema": SCHEMA}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
         SCHEMA),
        ({"type": "json_schema", "json_schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema", "schema": SCHEMA}, SCHEMA),
    ],
)  # fmt: skip
def test_schema_is_found_where_documents_put_it(raw: dict[str, Any], schema: Any) -> None:
    assert ResponseFormat.model_validate(raw).schema_object == schema


@pytest.mark.parametrize("raw", [{"type": "json_schema"}, {"type": "json_schema", "schema": {}}])
def test_json_schema_without_a_schema_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match='json_schema is required when type is "json_schema"'):
        ResponseFormat.model_validate(raw)


# Sampling.


@pytest.mark.parametrize(
    ("raw", "deterministic"),
    [
        ({}, False),
        ({"seed": 1}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "do_sample": True}, True),
        ({"do_sample": False}, True),
        ({"do_sample": True}, False),
        ({"do_sample": None}, False),
    ],
)
def test_greedy_decoding_is_deterministic(raw: dict[str, Any], deterministic: bool) -> None:
    assert read_params(**raw).deterministic is deterministic


# Fields that an engine cannot honour.


def test_fields_that_an_engine_cannot_honour_are_refused_all_at_once() -> None:
    params = read_params(min_p=0.1, logprobs=3, top_k=-1, n=1, temperature=0)
    with pytest.raises(ValueError, match=r"^tiny cannot honour min_p, logprobs; leave it out$"):
        refuse_fields(params, ["min_p", "logprobs", "top_k", "n", "seed"], engine="tiny")


@pytest.mark.parametrize(
    "raw",
    [{}, {"stop": []}, {"stop": None}, {"max_new_tokens": 512}, {"response_format": {}},
     {"temperature": 0}],
)  # fmt: skip
def test_default_written_out_is_not_refused(raw: dict[str, Any]) -> None:
    names = ["stop", "max_tokens", "response_format"]
    refuse_fields(read_params(**raw), names, engine="tiny")


def test_field_named_by_its_other_spelling_is_refused_too() -> None:
    with pytest.raises(ValueError, match="cannot honour max_tokens"):
        refuse_fields(read_params(max_new_tokens=3), ["max_tokens"], engine="tiny")


# The other specs and the results.


def test_serve_listens_on_a_free_loopback_port_until_it_is_stopped() -> None:
    for raw in ({}, {"serve": None, "model": None, "checkpoint": None}):
        spec = read(ServeSpec, raw)
        serve = spec.serve
        assert (serve.host, serve.port, serve.ttl_s, serve.api_key) == ("127.0.0.1", 0, None, None)
        assert (spec.model.source, spec.checkpoint.load) == (None, None)


def test_serve_names_every_field_that_is_wrong_at_once() -> None:
    serve = {"host": "http://x:1", "port": 65536, "ttl_s": 0, "api_key": "two words"}
    assert problem_of(ServeSpec, {"serve": serve}) == (
        "spec.serve.host must be an IP address or a host name, without scheme and port, got "
        "'http://x:1'; "
        "spec.serve.port must be less than or equal to 65535, got 65536; "
        "spec.serve.ttl_s must be greater than 0, got 0; "
        "spec.serve.api_key must be visible ASCII characters without blanks or a line end"
    )


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("host", ["::1", "0.0.0.0", "localhost", "a-1.example"],
         ["", "127.0.0.1:80", "[::1]", "-x", "a b", "a/b", None, 5]),
        ("port", [0, 1, 65535], [-1, "x", None]),
        ("ttl_s", [0.5, 3600, None], [-1, float("inf"), float("nan"), "soon"]),
        ("api_key", ["x", "sk-~!", None], ["", "x\n", "\u00e9", " x"]),
    ],
)  # fmt: skip
def test_field_of_serve_keeps_to_its_range(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        read(ServeSpec, {"serve": {name: value}})
    for value in bad:
        problem = problem_of(ServeSpec, {"serve": {name: value}})
        assert problem.startswith(f"spec.serve.{name} must be "), value


def test_serve_refuses_an_unknown_key_with_the_nearest_name() -> None:
    problem = problem_of(ServeSpec, {"serve": {"apikey": "x"}})
    assert problem == "spec.serve: unknown key 'apikey', did you mean 'api_key'?"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False)],
)  # fmt: skip
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert read(ServeSpec, {"serve": {"host": host}}).serve.is_loopback is loopback


def test_the_key_of_an_endpoint_is_not_shown() -> None:
    spec = read(ServeSpec, {"serve": {"api_key": "sk-1234"}})
    assert spec.serve.api_key.get_secret_value() == "sk-1234"
    assert "sk-1234" not in f"{spec!r} {spec.model_dump_json()}"
    assert "sk 1234" not in problem_of(ServeSpec, {"serve": {"api_key": "sk 1234"}})


def test_the_result_of_serve_has_an_end_or_none() -> None:
    raw = {"ok": True, "endpoint": "http://127.0.0.1:1/v1", "model": "m", "pid": 7}
    assert ServeResult.model_validate({**raw, "expires_at": None}).expires_at is None
    ends = ServeResult.model_validate({**raw, "expires_at": "2030-01-02T03:04:05+00:00"})
    assert ends.model_dump(mode="json") == {**raw, "expires_at": "2030-01-02T03:04:05Z"}
    with pytest.raises(ValidationError, match=r"expires_at\n.*timezone"):
        ServeResult.model_validate({**raw, "expires_at": "2030-01-02T03:04:05"})


def test_embedding_normalizes_unless_told_otherwise() -> None:
    assert read(EmbeddingSpec, {}).normalize is True
    assert read(EmbeddingSpec, {"normalize": False}).normalize is False


def test_bare_task_spec_keeps_what_it_does_not_know() -> None:
    spec = read(TaskSpec, {"taskType": "x", "anything": [1]})
    assert (spec.task_type, spec.model_extra) == ("x", {"anything": [1]})


class Voice(StrictBlock):
    speed: float = 1.0


class VoiceModel(Model):
    acme: Voice = Field(default_factory=Voice)


class VoiceSpec(TaskSpec):
    text: str
    model: VoiceModel = Field(default_factory=VoiceModel)


@pytest.mark.parametrize(
    "absent",
    [
        {"model": None, "more": None},
        {"model": {"acme": None, "source": None, "adapters": None, "other": None}},
    ],
)
def test_null_is_absent_in_a_spec_of_ones_own(absent: dict[str, Any]) -> None:
    spec = read(VoiceSpec, {"text": "hi", **absent})
    assert spec == read(VoiceSpec, {"text": "hi"})
    assert (spec.model_extra, spec.model.model_extra) == ({}, {})


def test_null_in_one_spelling_leaves_the_other() -> None:
    raw = {"text": "hi", "model": {"adapters": [{"taskId": None, "task_id": "a", "headers": None}]}}
    (adapter,) = read(VoiceSpec, raw).model.adapters
    assert (adapter.task_id, adapter.headers) == ("a", {})
    assert problem_of(CheckpointLoad, {"archive_format": None, "timeoutSec": 0}) == (
        "spec.timeoutSec must be greater than 0, got 0"
    )


def test_null_is_not_what_is_required_nor_a_value_in_a_result() -> None:
    raw = {"model": {"adapters": [{"path": None}]}}
    problem = "spec.model.adapters[0]: one of path, url, taskId is required"
    assert problem_of(VoiceSpec, {"text": None, **raw}) == f"spec.text is required; {problem}"
    with pytest.raises(ValidationError, match="prompt_tokens"):
        Usage.model_validate({"prompt_tokens": None})


def test_results_are_read_in_the_contracts_shape() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "latency_sec": 0.1,
             "num_requests": 1}  # fmt: skip
    raw = {
        "ok": True,
        "model": "m",
        "usage": usage,
        "items": [
            {"index": 0, "prompt": "p", "output": "o", "finish_reason": "length", "metadata": {}}
        ],
    }
    result = InferenceResult.model_validate(raw)
    assert result.model_dump(exclude_unset=True) == raw
    with pytest.raises(ValidationError, match="finish_reason"):
        InferenceResult.model_validate({**raw, "items": [{**raw["items"][0],  # type: ignore[index]
                                                          "finish_reason": "tired"}]})  # fmt: skip
    vectors = {"model": "m", "dimensions": 2, "items": [{"embedding": [0.0, 1.0]}], "usage": {}}
    assert EmbeddingResult.model_validate(vectors).usage.total_tokens == 0
