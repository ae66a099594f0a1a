from __future__ import annotations

from typing import Any

import pytest
from flowmesh_transformers.spec import TransformersOptions, TransformersSettings, TransformersSpec

from flowmesh_core import EmbeddingSpec, InferenceSpec
from flowmesh_core.config import load_plugin_settings


def parse(**options: Any) -> TransformersOptions:
    return TransformersSpec.model_validate({"model": {"transformers": options}}).model.transformers


def test_the_spec_is_both_shared_ones() -> None:
    spec = TransformersSpec.model_validate({"model": None, "inference": None})
    assert isinstance(spec, InferenceSpec)
    assert isinstance(spec, EmbeddingSpec)
    assert spec.normalize
    assert spec.model.transformers == TransformersOptions()


def test_a_document_of_the_contract_is_taken_whole() -> None:
    options = parse(
        device_map="auto",
        dtype="auto",
        trust_remote_code=False,
        low_cpu_mem_usage=False,
        load_in_8bit=True,
        load_in_4bit=False,
        use_flash_attention_2=True,
    )
    assert (options.device_map, options.load_in_8bit) == ("auto", True)
    assert options.attention == "flash_attention_2"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("torch.float16", "float16"), ("fp16", "float16"), ("half", "float16")),
        *(("bf16", "bfloat16"), ("float", "float32"), ("auto", "auto")),
    ],
)
def test_a_dtype_may_be_written_as_torch_or_in_short(written: str, meant: str) -> None:
    assert parse(dtype=written).dtype == meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype"),
        ({"device_map": "cuda:3"}, "device_map"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"pooling": "max"}, "pooling"),
        ({"load_in_4bits": True}, "unknown key 'load_in_4bits', did you mean 'load_in_4bit'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "contradicts .*'sdpa'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(**options)


@pytest.mark.parametrize("field", [{"logprobs": 2}, {"response_format": {"type": "json_object"}}])
def test_what_cannot_be_honoured_is_refused(field: Any) -> None:
    with pytest.raises(ValueError, match=f"transformers cannot honour {next(iter(field))}"):
        TransformersSpec.model_validate({"inference": field})


def test_the_operators_variable_is_the_cores_own() -> None:
    def read(**environ: str) -> bool:
        return load_plugin_settings(
            TransformersSettings, plugin="transformers", environ=environ
        ).trust_remote_code

    assert read(FLOWMESH_TRUST_REMOTE_CODE="1")
    assert not read(FLOWMESH_TRUST_REMOTE_CODE="0")
    assert not read()
