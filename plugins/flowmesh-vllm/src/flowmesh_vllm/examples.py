"""Specs that take a tiny model, which is made on the spot; starting vLLM takes its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh_core.testing import build_tiny_llama

__all__ = ["embedding", "inference", "serve"]

_TEXTS = ["the quick brown fox", "seven wizards brew strong black tea"]


def inference(folder: Path) -> dict[str, Any]:
    """Return the spec of prompts to answer; the model is written below the folder."""
    return {
        **_ask("inference", folder),
        "inference": {"temperature": 0, "max_tokens": 8},
    }


def embedding(folder: Path) -> dict[str, Any]:
    """Return the spec of texts to turn into vectors, likewise."""
    return _ask("embedding", folder)


def serve(folder: Path) -> dict[str, Any]:
    """Return the spec of an endpoint, likewise."""
    return {"taskType": "serve", "model": _model(folder)}


def _ask(task_type: str, folder: Path) -> dict[str, Any]:
    data = {"type": "list", "items": _TEXTS}
    return {"taskType": task_type, "model": _model(folder), "data": data}


def _model(folder: Path) -> dict[str, Any]:
    path = folder / "model"
    if not path.exists():  # an engine may have it open
        build_tiny_llama(path)
    return {
        "source": {"type": "folder", "path": str(path)},
        "vllm": {
            "max_model_len": 256,
            "kv_cache_memory_bytes": 2**26,
            "enforce_eager": True,  # compiling takes longer than all else
            "distributed_executor_backend": "uni",  # one process less
        },
    }
