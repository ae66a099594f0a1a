from __future__ import annotations

import json
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from flowmesh_trl.executor import TrlExecutor
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.resume import adopt, fingerprint, mark
from flowmesh_trl.spec import SPECS

from flowmesh_core import InputError, RunContext

Jobs = Callable[..., TrainingJob]


def write_checkpoint(attempt: Path, step: int) -> Path:
    """Write the least that is whole."""
    folder = attempt / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        zipfile.ZipFile(folder / name, "w").close()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., RunContext]:
    """Make contexts of the third attempt, on two GPUs."""

    def make(
        training: dict[str, Any] | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> RunContext:
        block = {"batch_size": 2, "gradient_accumulation_steps": 3, **(training or {})}
        raw = {
            "taskType": options.get("task_type", "sft"),
            "model": {"source": {"identifier": "acme/small"}},
            "data": {"examples": [{"text": "a"}]},
            "training": block,
            **more,
        }
        folder = tmp_path / ".t.attempt-3"
        folder.mkdir(exist_ok=True)
        known: dict[str, Any] = {
            "task_id": "t",
            "task_type": "sft",
            "spec": SPECS[raw["taskType"]].model_validate(raw),
            "raw_spec": raw,
            "folder": folder,
            "final_folder": tmp_path / "t",
            "attempt": 3,
            "previous": tmp_path / ".t.attempt-2",
            "devices": ("0", "1"),
            "clock": time.monotonic,
        }
        return RunContext(**{**known, **options})

    return make


@pytest.fixture
def run(make_context: Callable[..., RunContext], monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Run a context, and return the job that the ranks would have got."""
    jobs: list[TrainingJob] = []

    def keep(job: TrainingJob, _link: Link, **_options: Any) -> dict[str, Any]:
        jobs.append(job)
        return {}

    monkeypatch.setattr("flowmesh_trl.executor.launch", keep)

    def work(training: dict[str, Any] | None = None, **options: Any) -> TrainingJob:
        TrlExecutor().run(make_context(training, **options))
        return jobs[-1]

    return work


@pytest.fixture
def leave(tmp_path: Path, make_context: Callable[..., RunContext]) -> Callable[..., Path]:
    """Leave a checkpoint of the default training in an attempt's folder."""

    def write(number: int, step: int, *, batch: int = 12, **training: Any) -> Path:
        folder = tmp_path / f".t.attempt-{number}"
        mark(folder, fingerprint(make_context(training).raw_spec), batch=batch)
        return write_checkpoint(folder, step)

    return write


def accumulation(job: TrainingJob) -> Any:
    return job.spec["training"]["gradient_accumulation_steps"]


def test_checkpoint_of_as_many_processes_is_gone_on_with(
    run: Jobs, leave: Callable[..., Path], tmp_path: Path
) -> None:
    leave(2, 8)
    job = run()
    assert job.resume == tmp_path / ".t.attempt-3" / "checkpoints" / "checkpoint-8"
    assert accumulation(job) == 3


@pytest.mark.parametrize(("before", "parts"), [(24, 6), (4, 1)])
def test_other_number_of_processes_keeps_the_effective_batch(
    run: Jobs, leave: Callable[..., Path], tmp_path: Path, before: int, parts: int
) -> None:
    leave(2, 8, batch=before)
    job = run()
    assert job.resume is not None
    assert accumulation(job) == parts
    assert f'"batch": {before}' in (tmp_path / ".t.attempt-3/checkpoints/flowmesh.json").read_text()


@pytest.mark.parametrize("before", [6, 2, 0])
def test_batch_that_cannot_be_shared_out_begins_anew_and_says_why(
    run: Jobs, leave: Callable[..., Path], before: int
) -> None:
    leave(2, 8, batch=before)
    lines: list[str] = []
    job = run(on_log=lambda _level, line: lines.append(line))
    assert job.resume is None
    assert accumulation(job) == 3
    assert "instead of going on from checkpoint-8: its batch cannot be shared out" in lines[0]


def test_batch_that_the_document_does_not_allow_begins_anew(
    run: Jobs, leave: Callable[..., Path], make_context: Callable[..., RunContext]
) -> None:
    ppo: dict[str, Any] = {
        "training": {"mini_batch_size": 3},
        "task_type": "ppo",
        "more": {"reward": "length"},
    }
    attempt = leave(2, 8).parents[1]
    mark(attempt, fingerprint(make_context(**ppo).raw_spec), batch=16)
    assert run(**ppo).resume is None  # 8 rows of each process are no whole number of 3
    mark(attempt, fingerprint(make_context(**ppo).raw_spec), batch=24)
    assert run(**ppo).resume is not None


@pytest.mark.parametrize(
    ("saved", "wanted", "before", "goes_on"),
    [
        (True, True, 12, True),
        (True, True, 24, False),  # another number of processes
        (True, False, 12, False),
        (False, True, 12, False),
        (False, False, 24, True),
    ],
)
def test_deepspeed_checkpoint_needs_deepspeed_and_as_many_processes(
    run: Jobs,
    leave: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    saved: bool,
    wanted: bool,
    before: int,
    goes_on: bool,
) -> None:
    sharing = {"a": 1} if wanted else None
    monkeypatch.setattr("flowmesh_trl.executor.auto_deepspeed", lambda *_: sharing)
    checkpoint = leave(2, 8, batch=before)
    if saved:
        (checkpoint / "latest").write_text("global_step8")
    job = run()
    assert (job.resume is not None) is goes_on
    assert job.spec["training"].get("deepspeed") == sharing


def test_older_attempts_are_looked_through_too(
    run: Jobs, leave: Callable[..., Path], tmp_path: Path
) -> None:
    leave(1, 8)
    (tmp_path / ".t.attempt-2").mkdir()
    resume = run().resume
    assert resume is not None
    assert resume.name == "checkpoint-8"


def test_second_run_of_an_attempt_goes_on_where_its_own_first_run_was(
    run: Jobs, leave: Callable[..., Path], tmp_path: Path
) -> None:
    adopt(leave(2, 8), tmp_path / ".t.attempt-3")
    own = write_checkpoint(tmp_path / ".t.attempt-3", 9)
    broken = write_checkpoint(tmp_path / ".t.attempt-3", 10)
    (broken / "optimizer.pt").unlink()
    assert run(batch_scale=0.5).resume == own
    assert not broken.exists()


def test_beginning_anew_leaves_no_checkpoint_to_be_mistaken(
    run: Jobs, leave: Callable[..., Path], tmp_path: Path
) -> None:
    broken = leave(3, 10)
    (broken / "optimizer.pt").unlink()
    assert run().resume is None
    assert not broken.exists()


def test_relative_paths_are_refused_together(make_context: Callable[..., RunContext]) -> None:
    ctx = make_context(
        {"resume_from_path": "ckpt", "accelerate_config": "a.yaml", "deepspeed": "z.json"}
    )
    with pytest.raises(
        InputError,
        match=r"^task t: spec\.training\.resume_from_path must be an absolute path on the worker,"
        r" got 'ckpt'; spec\.training\.deepspeed .*, or an object, got 'z\.json'; .*'a\.yaml'$",
    ):
        TrlExecutor().run(ctx)


def test_absolute_paths_and_json_are_taken(run: Jobs, tmp_path: Path) -> None:
    job = run({"deepspeed": '{"a": 1}', "resume_from_path": str(tmp_path)})
    assert job.inputs.checkpoint == tmp_path
