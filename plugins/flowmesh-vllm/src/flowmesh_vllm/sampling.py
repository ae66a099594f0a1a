"""Turns the block ``inference`` into vLLM's sampling parameters; pure."""

from __future__ import annotations

from typing import Any

from flowmesh_core import InferenceParams

__all__ = ["build_sampling"]


def build_sampling(params: InferenceParams, seed: int | None) -> dict[str, Any]:
    """Return the fields of vLLM's ``SamplingParams`` for one answer.

    vLLM applies penalties, temperature, min-p, top-k and top-p in this order. When the answer is
    bound to a form, ``structured_outputs`` holds the fields of ``StructuredOutputsParams``.
    """
    sampling: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "stop": params.stop,
        "logprobs": params.logprobs,
        "structured_outputs": _form(params),
        "temperature": 0.0,
    }
    if params.deterministic:
        return sampling
    return sampling | {
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": seed,
    }


def _form(params: InferenceParams) -> dict[str, Any] | None:
    form = params.response_format
    if form.type == "json_object":
        return {"json_object": True}
    if form.type == "json_schema":
        return {"json": form.schema_object}
    if form.type == "regex":
        return {"regex": form.regex}
    return {"choice": form.choice} if form.type == "choice" else None
