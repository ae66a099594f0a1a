"""Turns a row and its sampling into one request to llama.cpp; pure."""

from __future__ import annotations

import hashlib
from typing import Any

from flowmesh_core import InferenceParams, Row

__all__ = ["build_prompt", "build_sampling", "derive_seed"]


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


def build_prompt(row: Row, system_prompt: str | None, *, chat: bool) -> dict[str, Any]:
    """Return ``messages`` for the model's chat template, or a plain ``prompt``.

    Messages that begin with a system message of their own keep it.

    Raises:
        ValueError: The row holds messages and there is no chat template.
    """
    system = system_prompt if row.add_system_prompt else None
    if not chat:
        if not isinstance(row.prompt, str):
            raise ValueError(
                "messages need a chat template: use prompt_format auto or chat with a model "
                "that has one, or set model.llamacpp.chat_template"
            )
        return {"prompt": f"{system}\n{row.prompt}" if system else row.prompt}
    single = isinstance(row.prompt, str)
    messages = [{"role": "user", "content": row.prompt}] if single else [*row.prompt]
    if system and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages}


def derive_seed(seed: int, row_index: int, choice: int) -> int:
    """Return llama.cpp's seed for one answer.

    Two rows never share a stream of random numbers, and choice ``i`` under ``seed`` is the first
    choice under ``seed + i``.
    """
    digest = hashlib.blake2b(f"{seed + choice}:{row_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % (2**32 - 1)  # the largest means "random" to llama.cpp
