from __future__ import annotations

from typing import Any

import pytest
from flowmesh_llamacpp.spec import LlamacppServeSpec, LlamacppSpec
from pydantic import ValidationError


def parse(**spec: Any) -> LlamacppSpec:
    return LlamacppSpec.model_validate({"taskType": "inference", **spec})


def parse_options(**options: Any) -> LlamacppSpec:
    return parse(model={"llamacpp": options})


def test_defaults_ask_for_answers_that_depend_on_nothing_else() -> None:
    options = parse().model.llamacpp
    assert (options.n_ctx, options.n_parallel) == (4096, 4)
    assert not options.flash_attn
    assert not options.cache_prompt


def test_a_null_block_means_its_defaults() -> None:
    assert parse(model={"llamacpp": None}) == parse(model={"llamacpp": {}})


def test_another_engines_block_is_ignored() -> None:
    assert parse(model={"vllm": {"dtype": "half"}}).model.llamacpp == parse().model.llamacpp


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="unknown key 'n_ctxt', did you mean 'n_ctx'"):
        parse_options(n_ctxt=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_parallel": 0}, "n_parallel\n.*greater than or equal to 1"),
        ({"n_ctx": -1}, "n_ctx\n.*greater than or equal to 0"),
        ({"n_threads": 0}, "n_threads\n.*greater than or equal to 1"),
        ({"cache_type_k": "f8"}, "cache_type_k\n.*'f32', 'f16'"),
        ({"n_ubatch": 1024}, "n_ubatch 1024 must be at most n_batch 512"),
        ({"cache_type_v": "q8_0"}, "cache_type_v 'q8_0' needs flash_attn: true"),
        ({"chat_template": "chatml"}, "must be the Jinja text"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse_options(**options)


def test_a_quantized_value_cache_is_taken_with_flash_attention() -> None:
    assert parse_options(cache_type_v="q8_0", flash_attn=True).model.llamacpp.flash_attn


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": {"source": {"trust_remote_code": True}}}, "cannot honour trust_remote_code"),
        ({"inference": {"logprobs": 2}}, "cannot honour logprobs"),
        (
            {"model": {"adapters": [{"name": "a", "path": "x.gguf", "apply": "merge"}]}},
            "adapter a: llama.cpp cannot honour apply: merge",
        ),
        ({"model": {"adapters": [{"path": "x", "type": "ia3"}]}}, "adapter 0: type must be 'lora'"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(**spec)


def test_serve_takes_the_same_model_block_and_one_of_its_own() -> None:
    raw = {"model": {"llamacpp": {"n_ctx": 64}}, "serve": {"port": 8080, "ttl_s": 60}}
    spec = LlamacppServeSpec.model_validate(raw)
    assert (spec.model.llamacpp.n_ctx, spec.serve.port, spec.serve.ttl_s) == (64, 8080, 60)
    with pytest.raises(ValidationError, match="unknown key 'n_ctxt', did you mean 'n_ctx'"):
        LlamacppServeSpec.model_validate({"model": {"llamacpp": {"n_ctxt": 5}}})
