"""The executor keeps what the kit checks, with answers and with vectors of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from flowmesh_transformers.examples import embedding, inference

from flowmesh_core.testing import ExecutorSuite

NO_SUCH_OPTION = {"model": {"transformers": {"max_batch": 2}}}


def answer_at_length(folder: Path) -> dict[str, Any]:
    data = {"type": "list", "items": ["the quick brown fox"] * 500}
    return {**inference(folder), "data": data, "inference": {"max_tokens": 200}}


def answer_nobody(folder: Path) -> dict[str, Any]:
    return {**inference(folder), "data": {"type": "list"}}


def read_at_length(folder: Path) -> dict[str, Any]:
    data = {"type": "list", "items": ["the quick brown fox " * 8] * 20_000}
    return {**embedding(folder), "data": data}


class TestInference(ExecutorSuite):
    executor = "transformers"
    refused: ClassVar[Any] = [{"taskType": "inference", **NO_SUCH_OPTION}, answer_nobody]
    long_spec = answer_at_length


class TestEmbedding(ExecutorSuite):
    executor = "transformers"
    spec = embedding
    refused: ClassVar[Any] = [{"taskType": "embedding", **NO_SUCH_OPTION}]
    long_spec = read_at_length
