"""Specs that run within seconds on any CPU, with a tiny model that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh_core.testing import build_tiny_llama

__all__ = ["embedding", "inference"]

_TEXTS = ["the quick brown fox", "seven wizards brew strong black tea", "a lazy dog"]


def inference(folder: Path) -> dict[str, Any]:
    """Return the spec of prompts to answer; the model is written below the folder."""
    return {
        "taskType": "inference",
        **_ask(folder),
        "inference": {"temperature": 0, "max_tokens": 8},
    }


def embedding(folder: Path) -> dict[str, Any]:
    """Return the spec of texts to turn into vectors, likewise."""
    return {"taskType": "embedding", **_ask(folder)}


def _ask(folder: Path) -> dict[str, Any]:
    model = folder / "model"
    if not model.exists():  # an engine may have it open
        build_tiny_llama(model)
    return {
        "model": {
            "source": {"type": "folder", "path": str(model)},
            "transformers": {"max_batch_size": 2},
        },
        "data": {"type": "list", "items": _TEXTS},
    }
