"""Turns a row into what the model is asked, and says what an engine gets and gives; pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import attrs

from flowmesh_core import InferenceParams, Row

__all__ = ["Answer", "Request", "build_messages", "build_text", "derive_seed"]


@attrs.frozen(kw_only=True)
class Request:
    """One text for the model.

    Attributes:
        tokens: Of the prompt, at least one.
        limit: Tokens that may be answered; 0 for a text to embed.
        params: How to choose them.
        seed: Names the stream of random numbers; None takes one that nobody can repeat.
    """

    tokens: Sequence[int]
    limit: int = 0
    params: InferenceParams = attrs.field(factory=InferenceParams)
    seed: str | None = None


@attrs.frozen(kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: Without the stop text and special tokens.
        finish_reason: ``length`` when the request's limit ended it.
        tokens: Number of tokens of the answer, its end mark included.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


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
        ValueError: The row holds messages.
    """
    if not isinstance(row.prompt, str):
        raise ValueError(  # noqa: TRY004 - the document is wrong, not a type
            "messages need a chat template: use prompt_format auto or chat with a model that has "
            "one, or set model.transformers.chat_template"
        )
    system = system_prompt if row.add_system_prompt else None
    return f"{system}\n{row.prompt}" if system else row.prompt


def derive_seed(seed: int | None, row_index: int, choice: int) -> str | None:
    """Name the stream of one answer: no two rows share one, whatever stands beside them.

    Choice ``i`` under ``seed`` is the first choice under ``seed + i``.
    """
    return None if seed is None else f"{seed + choice}:{row_index}"
