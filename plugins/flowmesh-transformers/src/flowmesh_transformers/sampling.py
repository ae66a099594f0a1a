"""Chooses the next token of every row of a batch; what one row gets depends on no other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from flowmesh_core import ExecutionError
from flowmesh_transformers.prompts import Request

__all__ = ["Sampler"]


class Sampler:
    """The sampling of a batch: penalties, temperature, top-k, top-p, min-p, in this order.

    Penalties look at the whole context, prompt included. Each row draws from a stream of its own
    by inverting the distribution, so that the same logits give the same token in any batch.

    Args:
        requests: One per row.
        device: Where the logits are.
    """

    def __init__(self, requests: Sequence[Request], device: Any) -> None:
        self._requests = list(requests)
        params = [request.params for request in requests]
        self._streams = [random.Random(request.seed) for request in requests]  # noqa: S311
        self._is_greedy = all(one.deterministic for one in params)
        self._is_penalized = any(
            one.presence_penalty or one.frequency_penalty or one.repetition_penalty != 1
            for one in params
        )
        columns = {
            "temperature": [1.0 if one.deterministic else one.temperature for one in params],
            "top_k": [_top_k(one) for one in params],
            "top_p": [one.top_p for one in params],
            "min_p": [one.min_p for one in params],
            "presence": [one.presence_penalty for one in params],
            "frequency": [one.frequency_penalty for one in params],
            "repetition": [one.repetition_penalty for one in params],
        }
        self._columns: dict[str, Any] = {
            name: torch.tensor(values, device=device).unsqueeze(1)
            for name, values in columns.items()
        }

    def choose(self, logits: Any) -> list[int]:
        """Return the next token of each row.

        Args:
            logits: Rows by vocabulary.

        Raises:
            ExecutionError: The model gave no numbers.
        """
        scores = logits.float()
        best, tokens = scores.max(-1)
        if not bool(best.isfinite().all()):
            raise ExecutionError(
                "the model gives no numbers (NaN or infinite); with dtype float16 try bfloat16 or "
                "float32"
            )
        if self._is_penalized:
            scores = self._penalize(scores)
            tokens = scores.argmax(-1)
        if not self._is_greedy:
            tokens = self._draw(scores)
        if self._is_penalized:
            rows = torch.arange(len(tokens), device=tokens.device)
            self._columns["counts"][rows, tokens] += 1
        chosen: list[int] = tokens.tolist()
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._requests = [self._requests[row] for row in rows]
        self._streams = [self._streams[row] for row in rows]
        index = torch.tensor(rows, device=self._columns["top_p"].device)
        self._columns = {name: column[index] for name, column in self._columns.items()}

    def _penalize(self, scores: Any) -> Any:
        columns = self._columns
        if "counts" not in columns:
            columns["counts"] = _count_tokens(self._requests, scores)
        counts = columns["counts"]
        weak = torch.where(
            scores > 0, scores / columns["repetition"], scores * columns["repetition"]
        )
        seen = counts > 0
        scores = torch.where(seen, weak - columns["presence"], scores)
        return scores - counts * columns["frequency"]

    def _draw(self, scores: Any) -> Any:
        columns = self._columns
        scores = scores - scores.amax(-1, keepdim=True)  # so that no temperature overflows
        scores = scores / columns["temperature"].clamp(min=1e-6)
        ranked, order = scores.sort(descending=True, stable=True)
        ranks = torch.arange(ranked.shape[-1], device=ranked.device)
        odds = ranked.softmax(-1).masked_fill(ranks >= columns["top_k"], 0)
        odds /= odds.sum(-1, keepdim=True)
        before = odds.cumsum(-1) - odds
        cut = (before >= columns["top_p"]) | (odds < columns["min_p"] * odds[:, :1])
        odds = odds.masked_fill(cut & (ranks > 0), 0)
        reach = odds.cumsum(-1)
        points = torch.tensor([[one.random()] for one in self._streams], device=reach.device)
        place = (reach <= points * reach[:, -1:]).sum(-1, keepdim=True)
        place = place.minimum((odds > 0).sum(-1, keepdim=True) - 1)  # rounding may pass the end
        return order.gather(-1, place).squeeze(-1)


def _top_k(params: Any) -> int:
    if params.deterministic:
        return 1
    return params.top_k if params.top_k > 0 else 2**31 - 1


def _count_tokens(requests: Sequence[Request], scores: Any) -> Any:
    counts = torch.zeros_like(scores)
    for row, request in enumerate(requests):
        tokens = torch.tensor([*request.tokens], device=scores.device)
        counts[row] += torch.bincount(tokens, minlength=scores.shape[-1])
    return counts
