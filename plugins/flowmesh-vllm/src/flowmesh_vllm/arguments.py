"""Turns the options of a document into vLLM's engine arguments; pure."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flowmesh_core import InputError, ModelRef

if TYPE_CHECKING:
    from flowmesh_vllm.spec import VllmOptions, VllmSettings
    from flowmesh_vllm.weights import Weights

__all__ = [
    "Room",
    "build_arguments",
    "check_download_dir",
    "refuse_unknown",
    "refuse_unsafe",
    "trusts_code",
]

# What only shapes how the engine computes. What runs code, opens files, listens or connects is not
# for whoever may send a task, and new versions bring more of it.
_FOR_DOCUMENTS = frozenset(
    {
        *("max_num_seqs", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_logprobs"),
        *("long_prefill_token_threshold", "enable_chunked_prefill", "scheduling_policy"),
        *("num_gpu_blocks_override", "block_size", "kv_cache_dtype", "logprobs_mode", "seed"),
        *("pipeline_parallel_size", "prefill_context_parallel_size"),
        *("decode_context_parallel_size", "enable_expert_parallel", "disable_custom_all_reduce"),
        *("distributed_executor_backend", "max_parallel_loading_workers", "cpu_offload_gb"),
        *("disable_sliding_window", "disable_cascade_attn", "attention_backend", "moe_backend"),
        *("cudagraph_capture_sizes", "max_cudagraph_capture_size", "prefix_caching_hash_algo"),
        *("tokenizer_mode", "config_format", "load_format", "model_impl", "hf_overrides"),
        *("max_cpu_loras", "lora_dtype", "lora_target_modules", "fully_sharded_loras"),
        *("limit_mm_per_prompt", "language_model_only", "interleave_mm_strings"),
        *("mm_processor_kwargs", "mm_processor_cache_gb", "skip_mm_profiling"),
        *("override_generation_config", "pooler_config", "reasoning_parser"),
        *("async_scheduling", "stream_interval", "swap_space", "rope_scaling", "rope_theta"),
        *("mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_block_size", "mamba_cache_mode"),
        # Of the server, for ``serve``.
        *("enable_auto_tool_choice", "tool_call_parser", "chat_template_content_format"),
        *("response_role", "default_chat_template_kwargs", "enable_prompt_tokens_details"),
        *("enable_force_include_usage", "return_tokens_as_token_ids"),
    }
)
_BACKENDS = ("mp", "uni")
# Share of a GPU that is left to others beside what they hold already.
_SLACK, _LEAST, _MOST = 0.05, 0.02, 0.98
_CPU_CACHE_BYTES = 4 * 1024**3
# Between which, and tensor parallel, the GPUs are shared out.
_OTHER_SIZES = ("pipeline_parallel_size", "prefill_context_parallel_size")


@attrs.frozen(kw_only=True)
class Room:
    """What an engine may use.

    Attributes:
        gpus: Number of the task's GPUs; 0 runs on the CPU.
        gpu_free: Least free share of the memory of one of them, 0 to 1; None when unknown.
        free_bytes: Free memory of the machine; None when unknown.
    """

    gpus: int = 0
    gpu_free: float | None = None
    free_bytes: int | None = None


def refuse_unsafe(further: Mapping[str, Any], declared: Collection[str]) -> None:
    """Refuse engine arguments that a document must not give.

    Args:
        further: Those that are not declared.
        declared: Names of the others.

    Raises:
        ValueError: Naming each, with the nearest name or who may give it.
    """
    problems = []
    for name in sorted(further.keys() - _FOR_DOCUMENTS):
        near = difflib.get_close_matches(name, [*_FOR_DOCUMENTS, *declared], n=1, cutoff=0.8)
        problems.append(
            f"{name} is not for documents; did you mean {near[0]}?"
            if near
            else f"{name} is not for documents; the operator may give engine arguments of vLLM in "
            "FLOWMESH_VLLM_ENGINE_ARGS"
        )
    backend = further.get("distributed_executor_backend", "mp")
    if backend not in _BACKENDS:
        problems.append(
            f"distributed_executor_backend must be one of {', '.join(_BACKENDS)}, got {backend!r}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def refuse_unknown(further: Collection[str], known: Collection[str]) -> None:
    """Refuse engine arguments that this vLLM does not have.

    Raises:
        InputError: Naming each, with the nearest name that it has.
    """
    problems = []
    for name in sorted(set(further) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"model.vllm.{name} is no engine argument of this vLLM{hint}")
    if problems:
        raise InputError("; ".join(problems))


def trusts_code(options: VllmOptions, model: ModelRef | None, settings: VllmSettings) -> bool:
    """Tell whether the repository's own code may run: both document and operator must say so.

    Raises:
        InputError: The document alone says so.
    """
    if options.trust_remote_code and not settings.trust_remote_code:
        raise InputError(
            "model.vllm.trust_remote_code runs code of the model's repository, which the operator "
            "of this worker does not allow; leave it out, or set FLOWMESH_TRUST_REMOTE_CODE=1 there"
        )
    return options.trust_remote_code or bool(model and model.trust_remote_code)


def check_download_dir(options: VllmOptions, settings: VllmSettings) -> None:
    """Refuse to write where the operator does not let documents.

    Raises:
        InputError: Naming the folder and who may allow it.
    """
    if options.download_dir is None:
        return
    wanted = Path(os.path.realpath(options.download_dir))
    if not any(wanted.is_relative_to(os.path.realpath(each)) for each in settings.allowed_dirs):
        raise InputError(
            f"model.vllm.download_dir {options.download_dir} is not in a folder that the operator "
            "of this worker allows; leave it out, or add one to FLOWMESH_ALLOWED_DIRS there"
        )


def build_arguments(
    options: VllmOptions,
    weights: Weights,
    *,
    room: Room,
    config: Mapping[str, Any] | None = None,
    embeds: bool = False,
    trust_remote_code: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return vLLM's engine arguments.

    Args:
        options: Of the document.
        weights: Model, tokenizer and adapters.
        room: What it may use.
        config: The model's own, when it is known.
        embeds: Whether it turns texts into vectors.
        trust_remote_code: Whether the repository's own code may run.
        defaults: The operator's, for what the document does not say.
    """
    own = {
        "model": weights.model,
        "revision": weights.revision,
        "tokenizer": weights.tokenizer,
        "dtype": options.dtype,
        "download_dir": options.download_dir,
        "quantization": options.quantization,
        # -1: as long as memory allows
        "max_model_len": options.max_model_len or -1,
        "enable_prefix_caching": None if embeds else options.enable_prefix_caching,
        "tensor_parallel_size": _tensor_parallel_size(
            options, config or {}, room.gpus, {**(defaults or {}), **options.further}
        ),
        "runner": "pooling" if embeds else "generate",
        "trust_remote_code": trust_remote_code,
        **_lora_arguments(options),
        **(_gpu_arguments(options, room) if room.gpus else _cpu_arguments(options, room)),
    }
    said = {
        name for name in options.model_fields_set & own.keys() if getattr(options, name) is not None
    }
    kept = {name: value for name, value in (defaults or {}).items() if name not in said}
    given = {name: value for name, value in own.items() if value is not None}
    return {**given, **kept, **options.further}


def _lora_arguments(options: VllmOptions) -> dict[str, Any]:
    if options.enable_lora is False:
        return {"enable_lora": False}
    return {
        "enable_lora": options.enable_lora,
        "max_loras": options.max_loras,
        "max_lora_rank": options.max_lora_rank,
    }


def _gpu_arguments(options: VllmOptions, room: Room) -> dict[str, Any]:
    share = options.gpu_memory_utilization
    if room.gpu_free is not None:
        share = min(share, max(_LEAST, room.gpu_free - _SLACK))
    return {
        "gpu_memory_utilization": round(min(share, _MOST), 4),
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "enforce_eager": options.enforce_eager,
    }


def _cpu_arguments(options: VllmOptions, room: Room) -> dict[str, Any]:
    fair = _CPU_CACHE_BYTES if room.free_bytes is None else room.free_bytes // 4
    return {
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes or min(_CPU_CACHE_BYTES, fair),
        "enforce_eager": True if options.enforce_eager is None else options.enforce_eager,
    }


def _tensor_parallel_size(
    options: VllmOptions, config: Mapping[str, Any], gpus: int, further: Mapping[str, Any]
) -> int:
    """Return over how many GPUs a layer is split: each must get as many heads as the others."""
    if not gpus:
        return options.tensor_parallel_size or 1
    others = [further.get(name, 1) for name in _OTHER_SIZES]
    shares = math.prod(size for size in others if isinstance(size, int) and size > 0)
    most = max(1, gpus // shares)
    if options.tensor_parallel_size:
        return min(options.tensor_parallel_size, most)
    return next(size for size in range(most, 0, -1) if _divides(config, size))


def _divides(config: Mapping[str, Any], size: int) -> bool:
    """Tell whether heads can be shared out; those of unknown number are a power of two."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    heads = _count(inner.get("num_attention_heads")) or 2**16
    pairs = _count(inner.get("num_key_value_heads")) or heads
    return heads % size == 0 and (pairs % size == 0 or size % pairs == 0)


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
