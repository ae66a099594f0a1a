"""A tiny Llama made on the spot, relatives of it, and contexts to run tasks in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.executor import TransformersExecutor
from flowmesh_transformers.spec import TransformersSpec

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext
from flowmesh_core.testing import build_tiny_llama

Contexts = Callable[..., RunContext]


@pytest.fixture
def make_context(tmp_path: Path) -> Contexts:
    def make(
        prompts: Any = ("hello",),
        model: Path | None = None,
        *,
        task_id: str = "task-1",
        task_type: str = "inference",
        options: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        normalize: bool = True,
        **inference: Any,
    ) -> RunContext:
        raw = {
            "taskType": task_type,
            "model": {"transformers": options or {}},
            "inference": inference,
            "normalize": normalize,
        }
        known: dict[str, Any] = {
            "rows": RowSource.from_prompts(prompts),
            "model": ModelRef(identifier="acme/small", path=model, format="hf"),
        }
        return RunContext(
            task_id=task_id,
            task_type=task_type,
            spec=TransformersSpec.model_validate(raw),
            raw_spec=raw,
            folder=tmp_path,
            clock=time.monotonic,
            inputs=Inputs(**{**known, **(inputs or {})}),
            **(context or {}),
        )

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # quick enough, and not slowed down by whatever else runs here
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def executor(tiny: Path, make_context: Contexts) -> Any:
    """An executor with the tiny model loaded."""
    executor = TransformersExecutor()
    executor.load(make_context(model=tiny))
    yield executor
    executor.unload()
