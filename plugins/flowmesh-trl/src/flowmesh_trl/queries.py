"""What lets TRL's PPO be rewarded by rules and functions, not only by a model with a head.

Its trainer asks a reward model for hidden states of query and response, puts ``score`` on them and
takes one value per sequence (``get_reward`` of TRL 1.12). Where the response begins it does not
say, so all queries are padded to one width.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from datasets import Dataset

from flowmesh_core import ExecutionError, InputError
from flowmesh_trl.rewards import Reward

__all__ = ["QueryCollator", "QueryRewards", "query_width"]


def query_width(*queries: Dataset | None) -> int:
    """Return how many tokens the longest query has."""
    return max(len(ids) for rows in queries if rows is not None for ids in rows["input_ids"])


@attrs.frozen(kw_only=True)
class QueryCollator:
    """Pads queries at the left, all to one width; leaves out what is not theirs."""

    width: int
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` of shape (rows, width)."""
        padded = torch.full((len(rows), self.width), self.pad_token_id)
        for line, row in zip(padded, rows, strict=True):
            ids = row["input_ids"]
            line[self.width - len(ids) :] = torch.tensor(ids)
        return {"input_ids": padded}


class QueryRewards(torch.nn.Module):  # type: ignore[misc] # the engine is untyped
    """Rewards in the shape of a reward model.

    A row's columns reach the rewards by the tokens of its query, so two rows with the same query
    must have the same columns.

    Args:
        rewards: At least one; their weighted sum is the score.
        tokenizer: Of the policy, with the padding token that the trainer uses.
        queries: Datasets of ``build_dataset("ppo", ...)``; stay open.
        width: ``query_width`` of these, as the collator has it.

    Raises:
        InputError: Two rows have one query and different columns.
    """

    base_model_prefix = "read"

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        tokenizer: Any,
        queries: Sequence[Dataset],
        width: int,
    ) -> None:
        super().__init__()
        self._rewards = rewards
        self._tokenizer = tokenizer
        self._queries = queries
        self._width = width
        self._places = self._index()

    def read(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_arguments: Any
    ) -> SimpleNamespace:
        """Pass the tokens on where hidden states are expected; masked ones are padding again."""
        tokens = input_ids.masked_fill(~attention_mask.bool(), self._tokenizer.pad_token_id)
        return SimpleNamespace(hidden_states=(tokens,))

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return each sequence's reward, of shape (rows, tokens, 1), the same at every token.

        Raises:
            ExecutionError: A reward failed, or none had anything to say of a response.
        """
        lines = tokens.tolist()
        rows = [self._row(line[: self._width]) for line in lines]
        answers = [self._answer(line[self._width :]) for line in lines]
        totals = self._totals(rows, answers)
        scores = torch.tensor(totals, dtype=torch.float32, device=tokens.device)
        return scores[:, None, None].expand(*tokens.shape, 1)

    def _totals(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[list[int]]
    ) -> list[float]:
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        columns["prompts"] = columns.pop("prompt")
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        chat = not isinstance(columns["prompts"][0], str)
        columns["completions"] = (
            [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
        )
        columns["completion_ids"] = answers
        values = [(reward.weight, reward(**columns)) for reward in self._rewards]
        return [
            self._total([(weight, given[i]) for weight, given in values], texts[i])
            for i in range(len(rows))
        ]

    def _total(self, values: Iterable[tuple[float, float | None]], text: str) -> float:
        given = [weight * value for weight, value in values if value is not None]
        if not given:
            names = ", ".join(reward.name for reward in self._rewards)
            raise ExecutionError(f"none of the rewards {names} has a value for {text!r:.60}")
        return sum(given)

    def _answer(self, tokens: list[int]) -> list[int]:
        pad = self._tokenizer.pad_token_id
        return tokens[: tokens.index(pad)] if pad in tokens else tokens

    def _row(self, query: Sequence[int]) -> Mapping[str, Any]:
        source, index = self._places[self._key(query)]
        row: dict[str, Any] = dict(self._queries[source][index])
        del row["input_ids"]
        return row

    def _index(self) -> Mapping[bytes, tuple[int, int]]:
        places: dict[bytes, tuple[int, int]] = {}
        for source, rows in enumerate(self._queries):
            for index, ids in enumerate(rows["input_ids"]):
                known = places.setdefault(self._key(ids), (source, index))
                if known != (source, index):
                    self._check_same(known, (source, index))
        return places

    def _check_same(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        first, second = (self._queries[source][index] for source, index in (one, other))
        if first != second:
            raise InputError(
                f"spec.data: two rows ask the same and differ in another column: {first} and"
                f" {second}, so their answers cannot be told apart; drop one of them"
            )

    def _key(self, query: Iterable[int]) -> bytes:
        """Return a digest of the query without padding at its left, whatever its width."""
        ids = list(query)
        pad = self._tokenizer.pad_token_id
        start = next((i for i, token in enumerate(ids) if token != pad), len(ids))
        return hashlib.blake2b(array("q", ids[start:]).tobytes(), digest_size=16).digest()
