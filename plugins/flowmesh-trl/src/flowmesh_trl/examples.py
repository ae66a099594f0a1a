"""Specs of trainings that take seconds on any CPU, with a tiny model that is made on the spot."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from flowmesh_core.testing import build_tiny_llama

__all__ = ["dpo", "grpo", "kto", "lora_sft", "ppo", "reward", "sft"]

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
_PAIRS = [{"prompt": a, "chosen": f" {b}", "rejected": f" {a} {a}"} for a, b in pairwise(_WORDS)]
_TRIED: dict[str, Any] = {
    "reward": [{"name": "length", "options": {"target": 9, "unit": "chars"}}],
    "generation": {"max_new_tokens": 4},
}


def sft(folder: Path) -> dict[str, Any]:
    """Return the spec of learning texts; its model is written below the folder."""
    texts = [{"text": f"{row['prompt']}{row['chosen']}"} for row in _PAIRS]
    return _train("sft", folder, texts, gradient_checkpointing=False)


def lora_sft(folder: Path) -> dict[str, Any]:
    """Return the same with an adapter."""
    return {**sft(folder), "taskType": "lora_sft", "lora": {"r": 4}}


def dpo(folder: Path) -> dict[str, Any]:
    """Return the spec of learning preferences."""
    return _train("dpo", folder, _PAIRS)


def reward(folder: Path) -> dict[str, Any]:
    """Return the spec of a model that scores."""
    return _train("reward", folder, _PAIRS)


def kto(folder: Path) -> dict[str, Any]:
    """Return the spec of learning from single answers."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(_PAIRS)
    ]
    return _train("kto", folder, rows)


def grpo(folder: Path) -> dict[str, Any]:
    """Return the spec of comparing own answers."""
    return {**_train("grpo", folder, _queries(), num_generations=2, max_length=None), **_TRIED}


def ppo(folder: Path) -> dict[str, Any]:
    """Return the spec of scoring own answers."""
    return {**_train("ppo", folder, _queries(), max_steps=None, steps=2, ppo_epochs=1), **_TRIED}


def _queries() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in _PAIRS]


def _train(task_type: str, folder: Path, rows: Any, **training: Any) -> dict[str, Any]:
    """Return a spec of two steps; ``None`` leaves a field out that the type does not have."""
    model = folder / "model"
    if not model.exists():  # a training may have it open
        build_tiny_llama(model, initializer_range=0.02)
    given = {"max_steps": 2, "batch_size": 4, "max_length": 64, "logging_steps": 1, **training}
    return {
        "taskType": task_type,
        "model": {"source": {"type": "folder", "path": str(model)}},
        "data": {"examples": rows},
        "training": {name: value for name, value in given.items() if value is not None},
    }
