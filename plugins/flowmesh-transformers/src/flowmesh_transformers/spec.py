"""Specs under Transformers: the shared ones and the block ``model.transformers``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    RootModel,
    model_validator,
)

from flowmesh_core import (
    EmbeddingResult,
    EmbeddingSpec,
    InferenceResult,
    InferenceSpec,
    Model,
    StrictBlock,
    refuse_fields,
)

__all__ = [
    "Pooling",
    "TransformersModel",
    "TransformersOptions",
    "TransformersResult",
    "TransformersSettings",
    "TransformersSpec",
]

Pooling = Literal["mean", "last", "cls"]

_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("float16", "fp16", "half"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
}


def _plain_dtype(value: Any) -> Any:
    return _DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


DType = Annotated[Literal["auto", "float32", "float16", "bfloat16"], BeforeValidator(_plain_dtype)]


class TransformersOptions(StrictBlock):
    """``model.transformers``: how the model is loaded, in the library's own names.

    Attributes:
        device_map: ``cpu``, ``cuda`` (the first GPU of the task), or spread over all of them:
            ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``. Without it, the GPU if the
            task has one.
        dtype: ``auto`` is what the weights were stored in.
        trust_remote_code: Run the repository's own code; the operator must allow it.
        low_cpu_mem_usage: Accepted for documents that have it; loading is always lean.
        load_in_8bit: Quantize with bitsandbytes while loading.
        load_in_4bit: As above.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2`` or another that the
            library knows.
        use_flash_attention_2: The older spelling of ``attn_implementation: flash_attention_2``.
        max_batch_size: Prompts that are answered at once at most; memory may allow fewer.
        chat_template: Jinja text that replaces the tokenizer's own template.
        pooling: How the vectors of a text's tokens become one; without it, what the model's
            files say, else ``mean``.
    """

    device_map: (
        Literal["cpu", "cuda", "auto", "balanced", "balanced_low_0", "sequential"] | None
    ) = None
    dtype: DType = "auto"
    trust_remote_code: bool = False
    low_cpu_mem_usage: bool = True
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    attn_implementation: str | None = None
    use_flash_attention_2: bool = False
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    chat_template: str | None = None
    pooling: Pooling | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> TransformersOptions:
        problems = []
        if self.load_in_8bit and self.load_in_4bit:
            problems.append("load_in_8bit and load_in_4bit exclude each other")
        if self.use_flash_attention_2 and self.attention != "flash_attention_2":
            problems.append(
                f"use_flash_attention_2 contradicts attn_implementation {self.attention!r}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def attention(self) -> str | None:
        """The attention that is asked for, in either spelling."""
        flash = "flash_attention_2" if self.use_flash_attention_2 else None
        return self.attn_implementation or flash


class TransformersModel(Model):
    """``model`` with the block of Transformers; other engines' blocks are ignored."""

    transformers: TransformersOptions = Field(default_factory=TransformersOptions)


class TransformersSpec(InferenceSpec, EmbeddingSpec):
    """Spec of ``inference`` and of ``embedding``, which reads ``normalize`` and no sampling."""

    model: TransformersModel = Field(default_factory=TransformersModel)

    @model_validator(mode="after")
    def _refuse_what_cannot_be(self) -> TransformersSpec:
        refuse_fields(self.inference, ["logprobs", "response_format"], engine="transformers")
        return self


class TransformersResult(RootModel[InferenceResult | EmbeddingResult]):
    """Result of ``inference`` or of ``embedding``."""


class TransformersSettings(BaseModel):
    """What the operator allows documents.

    Attributes:
        trust_remote_code: Whether they may have a repository's own code run; the variable that
            the core reads for ``model.source.trust_remote_code``.
    """

    trust_remote_code: bool = Field(default=False, alias="FLOWMESH_TRUST_REMOTE_CODE")
