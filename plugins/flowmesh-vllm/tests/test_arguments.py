from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from flowmesh_vllm.arguments import (
    Room,
    build_arguments,
    refuse_unknown,
    refuse_unsafe,
    trusts_code,
)
from flowmesh_vllm.spec import VllmOptions, VllmSettings
from flowmesh_vllm.weights import Weights

from flowmesh_core import InputError, ModelRef

GIB = 1 << 30
CPU = Room(free_bytes=8 * GIB)


def build(
    options: Mapping[str, Any] | None = None,
    *,
    weights: Weights | None = None,
    room: Room = CPU,
    **more: Any,
) -> dict[str, Any]:
    read = VllmOptions.model_validate(options or {})
    return build_arguments(read, weights or Weights(model="acme/big"), room=room, **more)


# What is loaded.


def test_a_bare_document_becomes_the_arguments_of_a_generator_on_the_cpu() -> None:
    assert build() == {
        "model": "acme/big",
        "dtype": "auto",
        "max_model_len": -1,
        "enable_prefix_caching": True,
        "tensor_parallel_size": 1,
        "runner": "generate",
        "trust_remote_code": False,
        "max_loras": 4,
        "max_lora_rank": 64,
        "kv_cache_memory_bytes": 2 * GIB,
        "enforce_eager": True,
    }


def test_a_model_comes_with_its_revision_and_its_tokenizer() -> None:
    weights = Weights(model="/models/tuned", revision="v2", tokenizer="acme/big")
    found = build(weights=weights)
    assert (found["model"], found["revision"]) == ("/models/tuned", "v2")
    assert found["tokenizer"] == "acme/big"


def test_what_embeds_is_a_pooling_model_whose_prompts_are_not_cached() -> None:
    found = build({"enable_prefix_caching": True}, embeds=True)
    assert found["runner"] == "pooling"
    assert "enable_prefix_caching" not in found


def test_every_option_of_the_document_reaches_the_engine() -> None:
    options = {
        "max_model_len": 2048,
        "dtype": "float16",
        "download_dir": "/cache",
        "quantization": "awq",
        "enable_prefix_caching": False,
        "enforce_eager": False,
        "max_loras": 2,
        "max_lora_rank": 128,
        "kv_cache_memory_bytes": 7,
        "max_num_seqs": 16,  # of those that are not declared
    }
    for room in (CPU, Room(gpus=1)):
        assert build(options, room=room).items() >= options.items()


def test_what_only_documents_know_does_not_reach_the_engine() -> None:
    found = build({"chat_template": "{{ x }}", "release_after_run": True})
    assert not {"chat_template", "release_after_run"} & found.keys()


def test_code_of_a_repository_runs_only_when_that_was_decided() -> None:
    assert build({"trust_remote_code": True})["trust_remote_code"] is False
    assert build(trust_remote_code=True)["trust_remote_code"] is True


def test_without_adapters_at_run_time_nothing_is_kept_for_them() -> None:
    found = build({"enable_lora": False, "max_loras": 8})
    assert found["enable_lora"] is False
    assert not {"max_loras", "max_lora_rank"} & found.keys()
    assert build({"enable_lora": True})["enable_lora"] is True


# Over how many GPUs.


def split(gpus: int, config: Any = None, **options: Any) -> int:
    size = build(options, config=config, room=Room(gpus=gpus))["tensor_parallel_size"]
    assert isinstance(size, int)
    return size


@pytest.mark.parametrize(
    ("heads", "gpus", "size"),
    [(32, 1, 1), (32, 4, 4), (32, 6, 4), (12, 8, 6), (9, 4, 3), (7, 4, 1), (2, 8, 2), (1, 8, 1)],
)
def test_a_layer_is_split_over_as_many_gpus_as_divide_its_heads(
    heads: int, gpus: int, size: int
) -> None:
    assert split(gpus, {"num_attention_heads": heads}) == size
    assert split(gpus, {"num_attention_heads": heads, "num_key_value_heads": heads}) == size


@pytest.mark.parametrize(
    ("heads", "pairs", "gpus", "size"),
    [(32, 8, 8, 8), (32, 8, 16, 16), (12, 4, 6, 4), (12, 2, 6, 6), (12, 1, 6, 6), (24, 6, 8, 6)],
)
def test_heads_that_share_keys_are_split_evenly_or_copied(
    heads: int, pairs: int, gpus: int, size: int
) -> None:
    assert split(gpus, {"num_attention_heads": heads, "num_key_value_heads": pairs}) == size


def test_the_heads_of_a_model_that_also_sees_are_those_of_its_text() -> None:
    config = {"num_attention_heads": 8, "text_config": {"num_attention_heads": 3}}
    assert split(8, config) == 3
    assert split(8, {"num_attention_heads": 3, "text_config": None}) == 3


@pytest.mark.parametrize(
    "config",
    [None, {}, {"num_attention_heads": 0}, {"num_attention_heads": "3"}, {"text_config": {}}],
)
def test_a_model_of_unknown_size_is_split_by_a_power_of_two(config: Any) -> None:
    assert split(7, config) == 4


@pytest.mark.parametrize(("wanted", "size"), [(1, 1), (2, 2), (3, 3), (8, 4)])
def test_the_documents_number_counts_up_to_the_gpus_of_the_task(wanted: int, size: int) -> None:
    assert split(4, {"num_attention_heads": 32}, tensor_parallel_size=wanted) == size


def test_all_that_shares_the_gpus_counts() -> None:
    assert split(8, prefill_context_parallel_size=2) == 4
    assert split(8, pipeline_parallel_size=2, prefill_context_parallel_size=2) == 2


@pytest.mark.parametrize(
    ("stages", "wanted", "size"),
    [(2, None, 4), (3, None, 2), (4, None, 2), (8, None, 1), (16, None, 1), (2, 8, 4), (2, 2, 2)],
)
def test_pipeline_stages_share_the_gpus(stages: int, wanted: int | None, size: int) -> None:
    options = {"pipeline_parallel_size": stages, "tensor_parallel_size": wanted}
    found = build(options, room=Room(gpus=8))
    assert found["tensor_parallel_size"] == size
    assert found["pipeline_parallel_size"] == stages


@pytest.mark.parametrize("stages", [0, -1, "two", None])
def test_stages_that_make_no_sense_are_left_for_the_engine_to_refuse(stages: Any) -> None:
    found = build({"pipeline_parallel_size": stages}, room=Room(gpus=4))
    assert found["tensor_parallel_size"] == 4
    assert found["pipeline_parallel_size"] == stages


# Memory.


@pytest.mark.parametrize(
    ("wanted", "free", "share"),
    [
        (None, None, 0.9),
        (None, 1.0, 0.9),
        (None, 0.5, 0.45),
        (0.3, 0.5, 0.3),
        (1.0, 1.0, 0.95),
        (1.0, None, 0.98),
        (None, 0.05, 0.02),
        (None, 0.0, 0.02),
        (0.01, 0.0, 0.01),
        (None, 1 / 3, 0.2833),
    ],
)
def test_the_share_of_a_gpu_fits_what_is_free(
    wanted: float | None, free: float | None, share: float
) -> None:
    options = {} if wanted is None else {"gpu_memory_utilization": wanted}
    found = build(options, room=Room(gpus=1, gpu_free=free))
    assert found["gpu_memory_utilization"] == share


def test_on_a_gpu_the_engine_decides_on_its_cache_and_its_graphs() -> None:
    found = build(room=Room(gpus=1, gpu_free=0.9, free_bytes=GIB))
    assert not {"kv_cache_memory_bytes", "enforce_eager"} & found.keys()


@pytest.mark.parametrize(
    ("free", "cache"), [(None, 4 * GIB), (100 * GIB, 4 * GIB), (6 * GIB, GIB * 3 // 2)]
)
def test_on_the_cpu_the_cache_is_a_quarter_of_what_is_free_and_never_large(
    free: int | None, cache: int
) -> None:
    found = build(room=Room(free_bytes=free))
    assert found["kv_cache_memory_bytes"] == cache
    assert "gpu_memory_utilization" not in found


def test_the_documents_own_cache_may_be_larger() -> None:
    assert build({"kv_cache_memory_bytes": 9 * GIB})["kv_cache_memory_bytes"] == 9 * GIB


# The operator.


def test_the_operators_defaults_hold_where_the_document_says_nothing() -> None:
    defaults = {"max_model_len": 512, "max_loras": 9, "max_num_seqs": 8, "worker_cls": "acme.W"}
    said = {"max_loras": 4, "max_num_seqs": 3}  # the first is the default, but was said
    found = build(said, defaults=defaults)
    assert found["max_model_len"] == 512
    assert found["max_loras"] == 4
    assert found["max_num_seqs"] == 3
    assert found["worker_cls"] == "acme.W"


def test_the_operator_may_say_what_would_be_found_out_otherwise() -> None:
    defaults = {"kv_cache_memory_bytes": 5, "enforce_eager": False}
    assert build(defaults=defaults).items() >= defaults.items()


# What documents may not say.


# The declared ones.
DECLARED = VllmOptions.model_fields


@pytest.mark.parametrize(
    "name",
    [
        *("worker_cls", "worker_extension_cls", "logits_processors", "kv_transfer_config"),
        *("allowed_local_media_path", "allowed_media_domains", "hf_token", "master_addr"),
        *("compilation_config", "additional_config", "model_loader_extra_config", "runner"),
        *("model", "tokenizer", "revision", "served_model_name", "speculative_config"),
        *("of_a_version_to_come", "hf_config_path", "generation_config"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_for_the_operator(name: str) -> None:
    message = f"{name} is not for documents; .*(FLOWMESH_VLLM_ENGINE_ARGS|did you mean)"
    with pytest.raises(ValueError, match=message):
        refuse_unsafe({name: "x"}, DECLARED)


@pytest.mark.parametrize(
    ("wrong", "right"), [("max_num_seq", "max_num_seqs"), ("max_modell_len", "max_model_len")]
)
def test_a_slip_of_the_pen_is_told_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"^{wrong} is not for .*; did you mean {right}\?$"):
        refuse_unsafe({wrong: 1}, DECLARED)


@pytest.mark.parametrize("backend", ["acme.Evil", "external_launcher", "ray", None, ["mp"], 1])
def test_only_known_ways_to_start_workers_are_taken(backend: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of mp, uni, got "):
        refuse_unsafe({"distributed_executor_backend": backend}, DECLARED)


@pytest.mark.parametrize("backend", ["mp", "uni"])
def test_what_is_safe_passes_to_the_engine(backend: str) -> None:
    further = {"distributed_executor_backend": backend, "max_num_seqs": 4, "seed": 1}
    assert VllmOptions.model_validate(further).further == further


def test_everything_unsafe_is_said_at_once() -> None:
    wrong = {"hf_token": "t", "distributed_executor_backend": "x", "worker_cls": "m"}
    with pytest.raises(ValueError, match=r"hf_token is not.*; worker_cls is not.*; distributed_ex"):
        refuse_unsafe(wrong, DECLARED)


def test_an_unknown_argument_is_named_with_the_nearest_one() -> None:
    known = {"max_num_seqs", "seed", "block_size"}
    message = (
        r"^model\.vllm\.max_num_seq is no engine argument of this vLLM; did you mean "
        r"max_num_seqs\?; model\.vllm\.zzz is no engine argument of this vLLM$"
    )
    with pytest.raises(InputError, match=message):
        refuse_unknown(["zzz", "seed", "max_num_seq"], known)
    refuse_unknown(["seed", "block_size"], known)
    refuse_unknown([], known)


# Code of a repository.


@pytest.mark.parametrize(
    ("document", "operator", "model", "trusted"),
    [
        (False, False, False, False),
        (False, True, False, False),
        (True, True, False, True),
        (False, False, True, True),  # what the core let pass with model.source
    ],
)
def test_document_and_operator_must_both_trust_a_repository(
    document: bool, operator: bool, model: bool, trusted: bool
) -> None:
    options = VllmOptions(trust_remote_code=document)
    settings = VllmSettings(trust_remote_code=operator)
    found = ModelRef(identifier="acme/big", hub_id="acme/big", trust_remote_code=model)
    assert trusts_code(options, found, settings) is trusted
    assert trusts_code(options, None, settings) is (document and operator)


def test_a_document_alone_cannot_run_code() -> None:
    with pytest.raises(InputError, match=r"set FLOWMESH_TRUST_REMOTE_CODE=1 there"):
        trusts_code(VllmOptions(trust_remote_code=True), None, VllmSettings())
