"""The installed executor in a process of its own, as a worker runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.testing import run_task

pytest.importorskip("torch")


def test_the_installed_executor_answers_in_its_own_process(tiny: Path, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "taskType": "inference",
        "model": {"source": {"type": "folder", "path": str(tiny)}},
        "data": {"type": "list", "items": ["the quick", "brown fox"]},
        "inference": {"temperature": 0, "max_tokens": 6},
        "postprocess": {"jsonl_export": {"path": "said.jsonl"}},
    }
    run = run_task("transformers", spec, folder=tmp_path)
    assert run.error is None
    assert [item["index"] for item in run.result["items"]] == [0, 1]
    assert run.progress[-1]["fraction"] == 1
    bad = run_task("transformers", {**spec, "inference": {"logprobs": 1}}, folder=tmp_path)
    assert "cannot honour logprobs" in str(bad.error)
