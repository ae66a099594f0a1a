"""What every inference engine writes alike: prompts, seeds, items and results; pure.

Engines that build them here answer in one shape, so that a task may go to another one without its
readers noticing. Sampling and tokens are the engine's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from flowmesh_core.errors import InputError
from flowmesh_core.models import ModelRef
from flowmesh_core.rows import Row

__all__ = [
    "Answer",
    "build_item",
    "build_messages",
    "build_result",
    "build_text",
    "build_vector_item",
    "derive_seed",
    "normalize",
]


@attrs.frozen(kw_only=True)
class Answer:
    """What the model said to one prompt, once.

    Attributes:
        text: Without the stop text and special tokens.
        finish_reason: ``length`` when a limit ended it, None when the engine does not tell.
        tokens: Number of tokens of the answer, its end mark included.
        logprobs: JSON data on each token of the answer, in order; None when nobody asked.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None
    tokens: int
    logprobs: Sequence[Mapping[str, Any]] | None = None


def build_messages(row: Row, system_prompt: str | None) -> list[dict[str, Any]]:
    """Return chat messages; those that begin with a system message of their own keep it."""
    single = isinstance(row.prompt, str)
    messages = [{"role": "user", "content": row.prompt}] if single else [*row.prompt]
    system = system_prompt if row.add_system_prompt else None
    if system and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def build_text(row: Row, system_prompt: str | None) -> str:
    """Return a plain prompt, with the system prompt as its first line.

    Raises:
        InputError: The row holds messages.
    """
    if not isinstance(row.prompt, str):
        raise InputError(
            "messages need a chat template: use prompt_format auto or chat with a model that has "
            "one, or set one in the engine's own block of model if it takes one"
        )
    system = system_prompt if row.add_system_prompt else None
    return f"{system}\n{row.prompt}" if system else row.prompt


def derive_seed(seed: int | None, row_index: int, choice: int) -> int | None:
    """Return the seed of one answer, at least 0 and below 2**32 - 1; None without a seed.

    Choice ``i`` under ``seed`` is the first choice under ``seed + i``. Each row has a seed of its
    own, whatever stands beside it, as far as a hash of 32 bits can tell rows apart: among 10,000
    rows two share one in one task of a hundred.
    """
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{seed + choice}:{row_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % (2**32 - 1)  # to some engines the largest means "random"


def normalize(vector: Sequence[float]) -> list[float]:
    """Return a vector of length 1 in the same direction; one of zeros stays as it is."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)


def build_item(row: Row, prompt: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return one entry of an inference result's ``items``.

    Args:
        row: What was asked.
        prompt: The text that the model was given, messages as the template rendered them.
        answers: All ``n`` of them in order of their choice, at least one; the first is the output.
    """
    choices = [_build_choice(answer) for answer in answers]
    item = {
        "index": row.index,
        "prompt": prompt,
        **choices[0],
        "metadata": {**row.metadata, "prompt": row.prompt, "rendered_prompt": prompt},
    }
    return item if len(choices) == 1 else {**item, "choices": choices}


def _build_choice(answer: Answer) -> dict[str, Any]:
    choice: dict[str, Any] = {"output": answer.text, "finish_reason": answer.finish_reason}
    if answer.logprobs is not None:
        choice["logprobs"] = [dict(token) for token in answer.logprobs]
    return choice


def build_vector_item(row: Row, vector: Sequence[float]) -> dict[str, Any]:
    """Return one entry of an embedding result's ``items``."""
    metadata = {**row.metadata, "prompt": row.prompt}
    return {"index": row.index, "embedding": list(vector), "metadata": metadata}


def build_result(
    model: ModelRef | None,
    items: Sequence[Mapping[str, Any]],
    *,
    prompt_tokens: int,
    completion_tokens: int,
    latency_s: float,
    **head: Any,
) -> dict[str, Any]:
    """Return the result of a task that asked a model about each row of ``data``.

    Args:
        model: The task's.
        items: One per row, in order of the rows.
        prompt_tokens: Of all rows, a prompt with several answers counted once, without padding.
        completion_tokens: Of all answers.
        latency_s: Wall time of the task in the engine.
        head: Further fields beside ``items``, such as ``dimensions`` of an embedding.
    """
    return {
        "ok": True,
        "model": model.identifier if model else "",
        **head,
        "items": list(items),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "latency_sec": latency_s,
            "num_requests": len(items),
        },
    }
