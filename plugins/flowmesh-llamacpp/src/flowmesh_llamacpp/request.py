"""Turns sampling into llama.cpp's names; pure."""

from __future__ import annotations

from typing import Any

from flowmesh_core import InferenceParams

__all__ = ["build_sampling"]


def build_sampling(params: InferenceParams) -> dict[str, Any]:
    """Return the sampling fields that all prompts of a task share.

    Temperature comes before the cuts and the cuts in the order top-k, top-p, min-p, so that one
    document means the same here and in engines that do likewise. Penalties look at the whole
    context, prompt included.
    """
    cuts = {
        "top_k": params.top_k > 0,
        "top_p": params.top_p < 1,
        "min_p": params.min_p > 0,
    }
    penalties = params.presence_penalty or params.frequency_penalty
    penalized = bool(penalties) or params.repetition_penalty != 1
    sampling = {
        "max_tokens": params.max_tokens,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repeat_penalty": params.repetition_penalty,
        "stop": params.stop,
    }
    first = ["penalties"] if penalized else []
    if params.deterministic:
        return sampling | {"temperature": 0.0, "top_k": 1, "samplers": [*first, "top_k"]}
    return sampling | {
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "samplers": [*first, "temperature", *(name for name, used in cuts.items() if used)],
    }
