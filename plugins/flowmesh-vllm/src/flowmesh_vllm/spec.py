"""Specs under vLLM: the shared ones and the block ``model.vllm``."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator

from flowmesh_core import (
    CommaSeparated,
    EmbeddingResult,
    EmbeddingSpec,
    InferenceResult,
    InferenceSpec,
    Model,
    ServeSettings,
    ServeSpec,
)
from flowmesh_vllm.arguments import refuse_unsafe

__all__ = [
    "VllmModel",
    "VllmOptions",
    "VllmResult",
    "VllmServeSettings",
    "VllmServeSpec",
    "VllmSettings",
    "VllmSpec",
]

Positive = Annotated[int, Field(ge=1)]


class VllmOptions(BaseModel):
    """``model.vllm``: how the engine is loaded, in vLLM's own names.

    Any other engine argument of vLLM that only shapes how it computes may stand here too; an
    unknown one is refused with the nearest name. What runs code, opens files or listens is for
    the operator (``FLOWMESH_VLLM_ENGINE_ARGS``).

    Attributes:
        tensor_parallel_size: GPUs over which each layer is split; without it, as many of the
            task's as divide the model's attention heads. Never more than the task has.
        gpu_memory_utilization: Share of each GPU's memory; lowered to what is free. On the CPU
            ``kv_cache_memory_bytes`` counts instead.
        kv_cache_memory_bytes: Bytes for keys and values; on the CPU a quarter of the free memory,
            4 GiB at most, without it.
        max_model_len: Tokens of a prompt with its answer; without it what the model was trained
            for, or less where memory does not allow that.
        dtype: ``auto``, ``bfloat16``, ``float16``, ``float32``.
        download_dir: Where weights from the model hub are kept; in one of the folders that the
            operator allows documents.
        quantization: Method; without it, what the model's files say.
        enforce_eager: Never compile; without it, true on the CPU, where compiling takes minutes.
        enable_prefix_caching: Compute the common beginning of prompts once.
        enable_lora: Whether tasks may bring adapters at run time; without it, whether the model's
            architecture can.
        max_loras: Adapters that may be in one batch.
        max_lora_rank: Largest rank of such an adapter.
        trust_remote_code: Run the repository's own code; the operator must allow it.
        release_after_run: Accepted for documents that have it; an engine stays warm while there
            is room.
        chat_template: Jinja text that replaces the tokenizer's own template.
    """

    model_config = ConfigDict(extra="allow")

    tensor_parallel_size: Positive | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_memory_bytes: Positive | None = None
    max_model_len: Positive | None = None
    dtype: str = "auto"
    download_dir: str | None = None
    quantization: str | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool = True
    enable_lora: bool | None = None
    max_loras: Positive = 4
    max_lora_rank: Positive = 64
    trust_remote_code: bool = False
    release_after_run: bool = False
    chat_template: str | None = None

    @field_validator("tensor_parallel_size", "max_model_len", mode="before")
    @classmethod
    def _zero_is_absent(cls, value: object) -> object:
        return None if value == 0 and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _is_for_documents(self) -> VllmOptions:
        refuse_unsafe(self.further, type(self).model_fields)
        return self

    @property
    def further(self) -> dict[str, Any]:
        """Engine arguments beside those declared here."""
        return dict(self.model_extra or {})


class VllmModel(Model):
    """``model`` with vLLM's block; other engines' blocks are ignored."""

    vllm: VllmOptions = Field(default_factory=VllmOptions)

    @model_validator(mode="after")
    def _adapters_fit(self) -> VllmModel:
        at_run_time = [adapter for adapter in self.adapters if adapter.apply == "runtime"]
        if at_run_time and self.vllm.enable_lora is False:
            raise ValueError(
                "adapters need vllm.enable_lora, which is false here; leave it out, or give "
                "them apply: merge"
            )
        return self


class VllmSpec(InferenceSpec, EmbeddingSpec):
    """Spec of ``inference`` and of ``embedding``, which reads ``normalize`` and no sampling."""

    model: VllmModel = Field(default_factory=VllmModel)


class VllmResult(RootModel[InferenceResult | EmbeddingResult]):
    """Result of ``inference`` or of ``embedding``."""


class VllmServeSpec(ServeSpec):
    """Spec of ``serve`` under vLLM."""

    model: VllmModel = Field(default_factory=VllmModel)


class VllmSettings(BaseModel):
    """What the operator decides.

    Attributes:
        trust_remote_code: Whether documents may have a repository's own code run.
        http_allow: Hosts from which pictures and sounds of messages may come; the variable that
            the core reads for all it fetches.
        allowed_dirs: Folders that documents may name; likewise.
        engine_args: Engine arguments as JSON, for what documents do not say; here all are allowed.
    """

    model_config = ConfigDict(populate_by_name=True)

    trust_remote_code: bool = Field(default=False, alias="FLOWMESH_TRUST_REMOTE_CODE")
    http_allow: CommaSeparated = Field(default=(), alias="FLOWMESH_HTTP_ALLOW")
    allowed_dirs: tuple[str, ...] = Field(default=(), alias="FLOWMESH_ALLOWED_DIRS")
    engine_args: dict[str, Any] = Field(default_factory=dict, alias="FLOWMESH_VLLM_ENGINE_ARGS")

    @field_validator("allowed_dirs", mode="before")
    @classmethod
    def _split_folders(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part for part in value.split(os.pathsep) if part)

    @field_validator("engine_args", mode="before")
    @classmethod
    def _is_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value


class VllmServeSettings(VllmSettings, ServeSettings):
    """The same, and where endpoints may listen."""
