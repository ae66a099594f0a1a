"""What an engine gets and gives; pure."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from flowmesh_core import Answer, InferenceParams

__all__ = ["Answer", "Request"]


@attrs.frozen(kw_only=True)
class Request:
    """One text for the model.

    Attributes:
        tokens: Of the prompt, at least one.
        limit: Tokens that may be answered; 0 for a text to embed.
        params: How to choose them.
        seed: Of the stream of random numbers; None takes one that nobody can repeat.
    """

    tokens: Sequence[int]
    limit: int = 0
    params: InferenceParams = attrs.field(factory=InferenceParams)
    seed: int | None = None
