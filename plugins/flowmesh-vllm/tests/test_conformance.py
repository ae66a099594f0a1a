"""Both executors keep what the kit checks, with a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from flowmesh_vllm.examples import embedding, inference

from flowmesh_core.testing import ExecutorSuite

pytestmark = pytest.mark.slow  # each start of vLLM takes half a minute

NO_SUCH_OPTION = {"model": {"vllm": {"max_model_length": 256}}}


def answer_at_length(folder: Path) -> dict[str, Any]:
    data = {"type": "list", "items": ["the quick brown fox"] * 500}
    return {**inference(folder), "data": data, "inference": {"max_tokens": 200}}


class TestInference(ExecutorSuite):
    executor = "vllm"
    refused: ClassVar[Any] = [{"taskType": "inference", **NO_SUCH_OPTION}]
    long_spec = answer_at_length


class TestEmbedding(ExecutorSuite):
    executor = "vllm"
    spec = embedding
    refused: ClassVar[Any] = [{"taskType": "embedding", **NO_SUCH_OPTION}]


class TestServe(ExecutorSuite):
    executor = "vllm.serve"
    refused: ClassVar[Any] = [NO_SUCH_OPTION]
