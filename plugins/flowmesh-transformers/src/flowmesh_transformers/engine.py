"""A loaded model that answers prompts or turns texts into vectors.

This file and those that it imports (loading, generation, sampling) are the one door to torch and
Transformers.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.utils import cached_file
from transformers.utils import logging as library_logging

from flowmesh_core import InputError
from flowmesh_transformers.batching import Budget
from flowmesh_transformers.generation import Reader, generate
from flowmesh_transformers.loading import load_adapters, load_model, load_tokenizer, readable
from flowmesh_transformers.memory import free_memory_bytes
from flowmesh_transformers.pooling import choose_pooling
from flowmesh_transformers.prompts import Answer, Request
from flowmesh_transformers.spec import Pooling, TransformersOptions
from flowmesh_transformers.weights import Origin, Weights

__all__ = ["TransformersEngine"]

_UNLIMITED = 10**9  # the library's own mark of "no limit" is 10**30


class TransformersEngine:
    """A model in memory, for one thread at a time.

    Args:
        weights: What to load.
        options: How to load it.
        embeds: Whether it turns texts into vectors; it answers prompts otherwise.
        gpus: How many GPUs the task may use.
        trust_remote_code: Whether the repository's own code may run.

    Attributes:
        context_tokens: Tokens of a prompt with its answer at most, or None.

    Raises:
        InputError: Something cannot be read or does not fit.
        ExecutorUnavailableError: A package or a GPU is wanted that is not here.
    """

    def __init__(
        self,
        weights: Weights,
        options: TransformersOptions,
        *,
        embeds: bool,
        gpus: int,
        trust_remote_code: bool,
    ) -> None:
        library_logging.disable_progress_bar()  # it would fill the task's log
        self._tokenizer: Any = load_tokenizer(
            weights.tokenizer, trust_remote_code=trust_remote_code
        )
        model = load_model(
            weights.model,
            options,
            embeds=embeds,
            gpus=gpus,
            trust_remote_code=trust_remote_code,
        )
        self._model: Any = load_adapters(model, weights.adapters)
        self._device = self._model.get_input_embeddings().weight.device
        self._rows = options.max_batch_size
        self._chat_template = options.chat_template or self._tokenizer.chat_template
        self._ends = _end_tokens(self._model, self._tokenizer)
        self.context_tokens = _context_tokens(self._model, self._tokenizer, embeds=embeds)
        if embeds:
            self._pooling = options.pooling or choose_pooling(_reader_of(weights.model))

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self._chat_template)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return chat messages as the model's template writes them, ready for its answer.

        Raises:
            InputError: The template refuses them.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as exc:
            raise InputError(f"the chat template refuses the messages: {exc}") from exc
        return text

    def encode(self, text: str, *, rendered: bool) -> list[int]:
        """Return the tokens of a text; what ``render`` wrote has its special tokens already."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=not rendered, verbose=False)[
            "input_ids"
        ]
        return tokens

    def budget(self) -> Budget:
        """Return what one batch may take of the memory that is free now."""
        return _measure(self._model, self._device, self._rows)

    def generate(
        self, requests: Sequence[Request], stopped: Callable[[int], bool]
    ) -> Iterator[tuple[int, Answer | None]]:
        """Answer requests together; see ``generation.generate``."""
        reader = Reader(self._tokenizer, self._ends)
        return generate(self._model, requests, reader, self._device, stopped)

    def embed(self, requests: Sequence[Request]) -> list[list[float]]:
        """Return one vector per request, not normalized."""
        lengths = torch.tensor([len(request.tokens) for request in requests])
        ids = torch.zeros(len(requests), int(lengths.max()), dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, : len(request.tokens)] = torch.tensor([*request.tokens])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        with torch.inference_mode():
            output = self._model(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
            )
            states = output.last_hidden_state.float().cpu()
            vectors: list[list[float]] = _pool(states, mask, lengths, self._pooling).tolist()
        return vectors

    def close(self) -> None:
        """Free the model; may come twice."""
        self._model = self._tokenizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _pool(states: Any, mask: Any, lengths: Any, pooling: Pooling) -> Any:
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states)), lengths - 1]
    weights = mask.unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)


def _reader_of(origin: Origin) -> Callable[[str], Any]:
    """Return what reads a JSON file beside the model, here or on the hub."""

    def read(name: str) -> Any:
        if origin.gguf_file:
            return None
        with readable(f"{name} of {origin.name}"):
            path = cached_file(
                origin.name,
                name,
                revision=origin.revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            return None if path is None else json.loads(Path(path).read_bytes())

    return read


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends = set(named) if isinstance(named, list) else {named}
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def _context_tokens(model: Any, tokenizer: Any, *, embeds: bool) -> int | None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # What a tokenizer says counts for texts to embed; of chat models it is often a guess.
    limits = (positions, tokenizer.model_max_length) if embeds else (positions,)
    known = [limit for limit in limits if limit and 0 < limit < _UNLIMITED]
    return int(min(known)) if known else None


def _measure(model: Any, device: Any, rows: int) -> Budget:
    """Work out what tokens take: their keys and values, and what one layer computes with.

    Half of the free memory is left for what the libraries allocate beside it.
    """
    config = model.config.get_text_config()
    layers, heads = _most(config, "num_hidden_layers"), _most(config, "num_attention_heads")
    hidden = _most(config, "hidden_size")
    if not (layers and heads and hidden):
        return Budget(rows=rows)
    head_size = _most(config, "head_dim") or hidden // heads
    size = model.dtype.itemsize
    cache = 2 * layers * (_most(config, "num_key_value_heads") or heads) * head_size * size
    layer = (8 * hidden + 3 * (_most(config, "intermediate_size") or 4 * hidden)) * size
    return Budget(
        rows=rows,
        memory_bytes=_free_bytes(device) // 2,
        row_bytes=32 * _most(config, "vocab_size"),  # sorted and unsorted scores and their order
        token_bytes=cache + layer,
    )


def _most(config: Any, name: str) -> int:
    value = getattr(config, name, None) or 0
    return int(max(value)) if isinstance(value, (list, tuple)) else int(value)


def _free_bytes(device: Any) -> int:
    if device.type != "cuda":
        return free_memory_bytes()
    # What torch keeps for itself is free to it.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(kept)
