from __future__ import annotations

import json
import os
from typing import Any

import pytest
from flowmesh_vllm.spec import (
    VllmOptions,
    VllmServeSettings,
    VllmServeSpec,
    VllmSettings,
    VllmSpec,
)
from pydantic import BaseModel, ValidationError

ADAPTER = {"path": "/adapters/a"}
each_spec = pytest.mark.parametrize("spec", [VllmSpec, VllmServeSpec])


def read(options: Any, **model: Any) -> VllmOptions:
    return VllmSpec.model_validate({"model": {**model, "vllm": options}}).model.vllm


@each_spec
@pytest.mark.parametrize("raw", [{}, {"model": None}, {"model": {}}, {"model": {"vllm": None}}])
def test_a_document_that_says_nothing_of_the_engine_has_the_defaults(
    spec: type[VllmSpec], raw: Any
) -> None:
    assert spec.model_validate(raw).model.vllm == VllmOptions()


def test_blocks_of_other_engines_are_ignored() -> None:
    found = VllmSpec.model_validate({"model": {"llamacpp": {"n_ctx": 5}, "transformers": 3}})
    assert found.model.vllm == VllmOptions()


def test_engine_arguments_beside_the_declared_ones_keep_their_names_and_values() -> None:
    options = read({"max_model_len": 8, "max_num_seqs": 4, "hf_overrides": {"a": [1]}})
    assert options.max_model_len == 8
    assert options.further == {"max_num_seqs": 4, "hf_overrides": {"a": [1]}}
    assert VllmOptions().further == {}


@pytest.mark.parametrize("name", ["tensor_parallel_size", "max_model_len"])
def test_a_zero_means_that_the_engine_decides(name: str) -> None:
    assert getattr(read({name: 0}), name) is None
    assert getattr(read({name: None}), name) is None
    assert getattr(read({name: 2}), name) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel_size": -1}, "greater than or equal to 1"),
        ({"max_model_len": -1}, "greater than or equal to 1"),
        ({"max_model_len": False}, "greater than or equal to 1"),
        ({"kv_cache_memory_bytes": 0}, "greater than or equal to 1"),
        ({"gpu_memory_utilization": 0}, "greater than 0"),
        ({"gpu_memory_utilization": 1.1}, "less than or equal to 1"),
        ({"max_loras": 0}, "greater than or equal to 1"),
        ({"max_lora_rank": 0}, "greater than or equal to 1"),
        ({"dtype": None}, "valid string"),
        ("fast", "valid dictionary"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=rf"(?s)model\.vllm.*{says}"):
        read(options)


@each_spec
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("worker_extension_cls", "is not for documents; the operator may"),
        ("served_model_name", "is not for documents"),
        ("distributed_executor_backend", "must be one of mp, uni, got 'x'"),
    ],
)
def test_what_a_document_must_not_say_is_refused_before_anything_is_loaded(
    spec: type[BaseModel], name: str, says: str
) -> None:
    with pytest.raises(ValidationError, match=f"{name} {says}"):
        spec.model_validate({"model": {"vllm": {name: "x"}}})


@each_spec
def test_adapters_at_run_time_need_room_in_the_engine(spec: type[BaseModel]) -> None:
    def document(**adapter: Any) -> dict[str, Any]:
        vllm = {"enable_lora": False}
        return {"model": {"vllm": vllm, "adapters": [{**ADAPTER, **adapter}]}}

    spec.model_validate(document(apply="merge"))
    with pytest.raises(ValidationError, match=r"need vllm\.enable_lora, which is false here"):
        spec.model_validate(document())
    with pytest.raises(ValidationError, match=r"or give them apply: merge"):
        spec.model_validate(document(apply="runtime"))


def test_one_spec_serves_answers_and_vectors() -> None:
    raw = {"normalize": False, "inference": {"temperature": 0}, "taskType": "embedding"}
    found = VllmSpec.model_validate(raw)
    assert (found.normalize, found.inference.temperature) == (False, 0)
    assert VllmSpec.model_validate({}).normalize is True


def test_an_endpoint_has_a_place_to_listen() -> None:
    found = VllmServeSpec.model_validate({"serve": {"port": 8000}})
    assert found.serve.port == 8000


@pytest.mark.parametrize("kind", [VllmSettings, VllmServeSettings])
def test_the_operators_variables_are_text(kind: type[VllmSettings]) -> None:
    found = kind.model_validate(
        {
            "FLOWMESH_TRUST_REMOTE_CODE": "1",
            "FLOWMESH_HTTP_ALLOW": " a.invalid, *.b.invalid ,,",
            "FLOWMESH_ALLOWED_DIRS": os.pathsep.join(["/models", "/a,b", ""]),
            "FLOWMESH_VLLM_ENGINE_ARGS": json.dumps({"worker_cls": "acme.W", "max_num_seqs": 4}),
        }
    )
    assert found.trust_remote_code is True
    assert found.http_allow == ("a.invalid", "*.b.invalid")
    assert found.allowed_dirs == ("/models", "/a,b")
    assert found.engine_args == {"worker_cls": "acme.W", "max_num_seqs": 4}


def test_the_operator_allows_nothing_unless_asked() -> None:
    found = VllmSettings()
    assert (found.trust_remote_code, found.http_allow, found.engine_args) == (False, (), {})


def test_engine_arguments_of_the_operator_that_are_no_object_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"(?si)engine_args.*dictionary"):
        VllmSettings.model_validate({"engine_args": "[1]"})
    with pytest.raises(ValidationError, match=r"(?i)engine_args"):
        VllmSettings.model_validate({"engine_args": "{"})
