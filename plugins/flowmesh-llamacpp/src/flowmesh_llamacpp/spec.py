"""Specs under llama.cpp: the shared ones and the block ``model.llamacpp``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flowmesh_core import InferenceSpec, Model, ServeSpec, StrictBlock, refuse_fields

__all__ = ["LlamacppModel", "LlamacppOptions", "LlamacppServeSpec", "LlamacppSpec"]

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Positive = Annotated[int, Field(ge=1)]


class LlamacppOptions(StrictBlock):
    """``model.llamacpp``: how the engine is loaded, in llama.cpp's own names.

    Attributes:
        n_ctx: Tokens of context for one prompt with its answer (llama.cpp's own number is this
            times ``n_parallel``); 0 is what the model was trained for, which is also the limit.
        n_batch: Prompt tokens that one step takes; a cancel waits for at most one step.
        n_ubatch: Prompt tokens that one computation takes; at most ``n_batch``.
        n_parallel: Slots: prompts that are answered at once. Memory for context grows with it.
        n_threads: Threads of computation; without it, all CPUs that the process may use but one.
            They must have their CPUs to themselves.
        n_gpu_layers: Layers on a GPU; needs an xllamacpp that was built for one.
        flash_attn: Flash attention. Off by default: on a CPU it makes an answer depend on the
            prompts beside it.
        cache_type_k: Storage of the attention keys.
        cache_type_v: Storage of the values; a quantized one needs ``flash_attn``.
        cache_prompt: Reuse what an earlier prompt with the same beginning computed. Off by
            default: then no answer depends on the prompts before it.
        mmap: Map the weights instead of reading them.
        mlock: Keep the weights from being swapped out.
        warmup: Run the model once when it is loaded.
        chat_template: Jinja text that replaces the model's own template.
    """

    n_ctx: int = Field(default=4096, ge=0)
    n_batch: Positive = 512
    n_ubatch: Positive = 512
    n_parallel: int = Field(default=4, ge=1, le=256)
    n_threads: Positive | None = None
    n_gpu_layers: int = Field(default=0, ge=0)
    flash_attn: bool = False
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    cache_prompt: bool = False
    mmap: bool = True
    mlock: bool = False
    warmup: bool = True
    chat_template: str | None = None

    @field_validator("chat_template")
    @classmethod
    def _is_jinja(cls, value: str | None) -> str | None:
        # llama.cpp takes any other text for a template that ignores the prompt
        if value is not None and "{{" not in value:
            raise ValueError("must be the Jinja text of a template, not a name or a path")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> LlamacppOptions:
        problems = []
        if self.n_ubatch > self.n_batch:
            problems.append(f"n_ubatch {self.n_ubatch} must be at most n_batch {self.n_batch}")
        if self.cache_type_v not in ("f32", "f16", "bf16") and not self.flash_attn:
            problems.append(f"cache_type_v {self.cache_type_v!r} needs flash_attn: true")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class LlamacppModel(Model):
    """``model`` with llama.cpp's block; other engines' blocks are ignored."""

    llamacpp: LlamacppOptions = Field(default_factory=LlamacppOptions)

    @model_validator(mode="after")
    def _refuse_what_cannot_be(self) -> LlamacppModel:
        if self.source:
            refuse_fields(self.source, ["trust_remote_code"], engine="llama.cpp")
        for number, adapter in enumerate(self.adapters):
            name = adapter.name or adapter.id or str(number)
            if adapter.type != "lora":
                raise ValueError(f"adapter {name}: type must be 'lora', got {adapter.type!r}")
            if adapter.apply != "runtime":
                raise ValueError(
                    f"adapter {name}: llama.cpp cannot honour apply: merge; use apply: runtime"
                )
        return self


class LlamacppSpec(InferenceSpec):
    """Spec of ``inference`` under llama.cpp."""

    model: LlamacppModel = Field(default_factory=LlamacppModel)

    @model_validator(mode="after")
    def _refuse_what_cannot_be(self) -> LlamacppSpec:
        refuse_fields(self.inference, ["logprobs"], engine="llama.cpp")
        refuse_fields(self.inference.response_format, ["regex", "choice"], engine="llama.cpp")
        return self


class LlamacppServeSpec(ServeSpec):
    """Spec of ``serve`` under llama.cpp."""

    model: LlamacppModel = Field(default_factory=LlamacppModel)
