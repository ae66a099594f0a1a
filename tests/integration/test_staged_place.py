"""A place under another root: ``stage_in`` and ``collect`` are all that a remote place needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stevedore.extension import ExtensionManager

from flowmesh_core.config import load_settings
from flowmesh_core.testing import TaskRun, run_task

EXECUTORS = Path(__file__).parents[1] / "executors"
ENTRY_POINTS = "[flowmesh.places]\nstaged = staged_place:StagedPlace\n"


@pytest.fixture(autouse=True)
def staged_place_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site" / "staged_place-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: staged-place\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(EXECUTORS))
    monkeypatch.syspath_prepend(str(installed.parent))
    # Each process looks for drivers once.
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})


def run(results: Path, **spec: Any) -> TaskRun:
    return run_task(
        "rough.elsewhere",
        {"do": "look_around", **spec},
        folder=results,
        settings=load_settings({}, results_dir=results, cancel_grace_s=0.5),
        plugin_files=[EXECUTORS / "rough.py"],
    )


def test_an_executor_under_another_root_reads_its_inputs_and_its_files_come_back(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    weights = results / "trained" / "final_model"
    weights.mkdir(parents=True)
    (weights / "weights").write_text("1 2 3")
    rows = results / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    outcome = run(
        results,
        data={"type": "jsonl", "path": str(rows)},
        checkpoint={"load": {"path": str(weights)}},
    )
    assert outcome.ok, outcome.error
    told = outcome.result["told"]
    assert told["prompts"] == ["a", "b"]
    assert told["weights"] == "1 2 3"
    assert "flowmesh-elsewhere-" in told["folder"]
    assert "flowmesh-elsewhere-" in told["file"]
    assert (outcome.folder / "made.txt").read_text() == "by attempt 1"
    assert not list(results.rglob("flowmesh-elsewhere-*")), "the place cleans up"


def test_what_a_failed_attempt_left_comes_back_and_reaches_the_next_one(tmp_path: Path) -> None:
    results = tmp_path / "results"
    failed = run(results, fail=True)
    assert "after writing" in str(failed.error)
    assert (failed.folder / "made.txt").read_text() == "by attempt 1"
    second = run(results)
    assert second.result["told"]["before"] == "by attempt 1"
    assert Path(second.result["told"]["final"]).name == second.folder.name.split(".")[1]
    assert (second.folder / "made.txt").read_text() == "by attempt 2"


READER = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl

class Reads(Executor):
    def run(self, ctx):
        files = [[file.name, str(file.path), file.path.read_text()] for file in ctx.inputs.files]
        return {"ok": True, "files": files}

@hookimpl
def flowmesh_register_executors():
    target = f"{__name__}:Reads"
    return [
        ExecutorInfo(
            name="acme.reads",
            task_types={"acme.reads"},
            target=target,
            places=["staged"],
            inputs={"files"},
        )
    ]
"""


def test_files_of_a_folder_are_read_where_they_were_brought(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (docs / "a.md").write_text("one")
    (docs / "sub" / "a.md").write_text("two")
    plugin = tmp_path / "acme.py"
    plugin.write_text(READER)
    outcome = run_task(
        "acme.reads",
        {"files": {"paths": [str(docs)]}},
        folder=results,
        settings=load_settings({}, results_dir=results),
        plugin_files=[plugin],
    )
    assert outcome.ok, outcome.error
    names, paths, texts = zip(*outcome.result["files"], strict=True)
    assert names == ("a.md", "sub/a.md")
    assert texts == ("one", "two")
    assert all("flowmesh-elsewhere-" in path for path in paths)
