"""Answers a batch of prompts token by token; a row that has ended leaves the batch at once.

Prompts are padded on the left, under an attention mask and with positions that do not count the
padding, as the library's own ``generate`` does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache

from flowmesh_core import InputError
from flowmesh_transformers.prompts import Answer, Request
from flowmesh_transformers.sampling import Sampler

__all__ = ["Reader", "generate"]


class Reader:
    """Reads tokens back as text and knows what ends an answer.

    Args:
        tokenizer: The model's.
        ends: Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens
        }
        self._ends = frozenset(ends)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text without special tokens."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def ends(self, stop: Sequence[str]) -> frozenset[int]:
        """Return the tokens that end an answer; special ones may be named in ``stop``."""
        return self._ends.union(self._special[text] for text in stop if text in self._special)


class _Row:
    """The answer to one request as it grows."""

    def __init__(self, number: int, request: Request, reader: Reader) -> None:
        self.number = number
        self._reader = reader
        self._limit = request.limit
        self._stop = request.params.stop
        self._ends = reader.ends(self._stop)
        # A character has at most four bytes, and a token at least one of them.
        self._tail = 8 + 4 * max(map(len, self._stop), default=0)
        self._tokens: list[int] = []

    def take(self, token: int) -> bool:
        """Add a token; return whether the answer has ended."""
        self._tokens.append(token)
        if token in self._ends or len(self._tokens) >= self._limit:
            return True
        return bool(self._stop) and self._has_stop(self._tokens[-self._tail :])

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self._reader.decode(tokens)
        return any(stop in text for stop in self._stop)

    def answer(self) -> Answer:
        """Return what was said so far, up to the first stop text."""
        ended = self._tokens[-1] in self._ends
        text = self._reader.decode(self._tokens[:-1] if ended else self._tokens)
        cuts = [text.index(stop) for stop in self._stop if stop in text]
        reason: Literal["stop", "length"] = "stop" if ended or cuts else "length"
        return Answer(
            text=text[: min(cuts)] if cuts else text,
            finish_reason=reason,
            tokens=len(self._tokens),
        )


class _Batch:
    """The tensors of a batch between two steps of the model."""

    def __init__(self, model: Any, requests: Sequence[Request], device: Any) -> None:
        lengths = [len(request.tokens) for request in requests]
        self._model = model
        self._known = inspect.signature(model.forward).parameters
        self._width = max(lengths)
        width = self._width + max(request.limit for request in requests)
        self._ids = torch.zeros(len(requests), self._width, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            self._ids[row, self._width - lengths[row] :] = torch.tensor([*request.tokens])
            mask[row, self._width - lengths[row] :] = 1
        self._ids, self._mask = self._ids.to(device), mask.to(device)
        self._positions = (self._mask[:, : self._width].cumsum(-1) - 1).clamp(min=0)
        self._is_first = True
        self._cache: Any = DynamicCache(config=model.config)

    def forward(self) -> Any:
        """Run the model over what it has not seen; return each row's logits for the next token."""
        cache = "past_key_values" if "past_key_values" in self._known else "cache_params"
        if cache not in self._known:
            raise InputError(
                f"model.source: {type(self._model).__name__} cannot answer token by token"
            )
        wanted = {"position_ids": self._positions, "logits_to_keep": 1}
        inputs = self._model.prepare_inputs_for_generation(  # where models differ, they say so here
            self._ids,
            attention_mask=self._mask[:, : self._width],
            use_cache=True,
            is_first_iteration=self._is_first,
            **{cache: self._cache},
            **{name: value for name, value in wanted.items() if name in self._known},
        )
        self._is_first = False
        output = self._model(**inputs)
        return output.logits[:, -1]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        self._ids = torch.tensor(tokens, device=self._mask.device).unsqueeze(1)
        self._positions = self._positions[:, -1:] + 1
        self._width += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self._positions = self._mask[index], self._positions[index]
        self._cache.reorder_cache(index)  # the only selection that every kind of layer has


def generate(
    model: Any,
    requests: Sequence[Request],
    reader: Reader,
    device: Any,
    stopped: Callable[[int], bool],
) -> Iterator[tuple[int, Answer | None]]:
    """Answer requests together.

    Args:
        model: A causal language model in evaluation mode.
        requests: All with a limit of at least 1.
        reader: The tokenizer's side.
        device: Where the model takes its input.
        stopped: Asked for each request after each step; a stopped one leaves the batch.

    Yields:
        The number of a request with its answer as soon as it has ended, None when stopped.
    """
    rows = [_Row(number, request, reader) for number, request in enumerate(requests)]
    batch, sampler = _Batch(model, requests, device), Sampler(requests, device)
    while True:
        with torch.inference_mode():  # around each step: it must not reach whoever iterates
            tokens = sampler.choose(batch.forward().to(device))
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if stopped(row.number):
                yield row.number, None
            elif row.take(token):
                yield row.number, row.answer()
            else:
                going.append(place)
        if not going:
            return
        with torch.inference_mode():
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                batch.keep(going)
                sampler.keep(going)
            batch.extend([tokens[place] for place in going])
