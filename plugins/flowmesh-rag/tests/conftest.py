"""Settings that keep embedded stores in the test's folder, and contexts to run tasks in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.spec import IndexSpec, RagSpec, VectorSpec

from flowmesh_core import Inputs, RunContext

Contexts = Callable[..., RunContext]

SPECS: dict[str, Any] = {"rag": RagSpec, "rag_index": IndexSpec, "embedding": VectorSpec}


@pytest.fixture
def settings(tmp_path: Path) -> RagSettings:
    """What an operator sets who wants embedded stores below the test's folder."""
    return RagSettings.model_validate({"FLOWMESH_RAG_DIR": tmp_path / "stores"})


@pytest.fixture
def make_context(tmp_path: Path, settings: RagSettings) -> Contexts:
    """Contexts by ``make_context({"taskType": "rag", ...}, rows=..., task_id=..., context={})``."""

    def make(
        spec: Mapping[str, Any],
        *,
        task_id: str = "task-1",
        context: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> RunContext:
        folder = tmp_path / task_id
        folder.mkdir(exist_ok=True)
        return RunContext(
            task_id=task_id,
            task_type=spec["taskType"],
            spec=SPECS[spec["taskType"]].model_validate(spec),
            raw_spec=spec,
            folder=folder,
            **{
                "clock": time.monotonic,
                "settings": settings,
                "inputs": Inputs(**inputs),
                **(context or {}),
            },
        )

    return make
