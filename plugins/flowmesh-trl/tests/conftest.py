"""A tiny Llama made on the spot, and jobs that train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_trl.job import TrainingJob

from flowmesh_core import Inputs, ModelRef, RowSource
from flowmesh_core.testing import build_tiny_llama

Jobs = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tmp_path: Path, tiny: Path) -> Jobs:
    """Make jobs on the CPU that train the tiny model."""

    def make(
        task_type: str = "sft",
        rows: Any = (),
        *,
        training: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        folder: str = "attempt",
        inputs: Mapping[str, Any] | None = None,
        model: Path | None = None,
        job: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> TrainingJob:
        records = [{"text": row} if isinstance(row, str) else row for row in rows]
        known: dict[str, Any] = {
            "rows": RowSource.from_records(records),
            "model": ModelRef(identifier="acme/small", path=model or tiny, format="hf"),
        }
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        return TrainingJob(
            task_id="task-1",
            task_type=task_type,
            spec={
                "taskType": task_type,
                "model": {"source": {"identifier": "acme/small"}},
                "data": {"examples": records, **(data or {})},
                "training": {"batch_size": 2, "logging_steps": 1, **(training or {})},
                **spec,
            },
            inputs=Inputs(**{**known, **(inputs or {})}),
            folder=place,
            use_cpu=True,
            **(job or {}),
        )

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # quick enough, and not slowed down by whatever else runs here
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.02)
