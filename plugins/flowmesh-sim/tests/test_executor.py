"""What a training leaves and reports, run in this process."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_sim.executor import SimulatedTraining
from flowmesh_sim.plugin import flowmesh_register_executors
from flowmesh_sim.profiles import measure
from flowmesh_sim.spec import EXAMPLE, SimulateSpec

from flowmesh_core import ExecutionError, RunContext
from flowmesh_core.testing import TaskRun, run_task

INFO = attrs.evolve(flowmesh_register_executors()[0], name="test.sim", places=["inline"])
FAST = {"time_scale": 0, "epochs": 6, "steps_per_epoch": 2, "seed": 5}
ERROR = {"kind": "error", "at_epoch": 4, "retriable": True}


def simulate(folder: Path | None = None, *, task_id: str = "task", **block: Any) -> TaskRun:
    spec = {"simulate": {**FAST, **block}, "timeoutSec": 60}
    return run_task(SimulatedTraining, spec, info=INFO, folder=folder, task_id=task_id)


def test_the_result_is_the_curve_with_the_names_of_a_real_training() -> None:
    result = dict(simulate(profile="a", model_type="xgboost").result)
    curve = [attrs.asdict(measure("exponential", "xgboost", 5, epoch)) for epoch in range(6)]
    assert result.pop("training_time_seconds") >= 0
    assert result == {
        "training_successful": True,
        "model_name": "exponential/xgboost",
        "seed": 5,
        "epochs": 6,
        "steps": 12,
        "train_loss": pytest.approx(sum(one["loss"] for one in curve) / 6, abs=1e-6),
        "metrics": {"loss": curve[-1]["loss"], "accuracy": curve[-1]["accuracy"]},
        "history": curve,
        "resume_from_path": None,
    }


def test_progress_tells_every_step_with_loss_and_accuracy() -> None:
    run = simulate(profile="worker")
    begin, *steps = run.progress
    assert begin["fraction"] == 0
    assert [report["step"] for report in steps] == [*range(1, 13)]
    assert [report["fraction"] for report in steps] == [step / 12 for step in range(1, 13)]
    told = [{key: report[key] for key in ("epoch", "loss", "accuracy")} for report in steps]
    assert told == [one for one in run.result["history"] for _ in range(2)]
    assert "epoch 5: loss " in (run.folder / "logs" / "task.log").read_text()


def test_time_passes_as_the_document_says() -> None:
    slow = simulate(epochs=2, epoch_seconds=[2, 2], time_scale=0.1)
    assert slow.result["training_time_seconds"] >= 0.4
    assert slow.result["history"] == simulate(epochs=2).result["history"]
    assert simulate(epochs=2, epoch_seconds=[9000, 9000]).ok  # time_scale is 0


def test_a_late_failure_only_takes_time() -> None:
    run = simulate(
        time_scale=0.1, epochs=1, epoch_seconds=[0, 0], failure={"kind": "late", "late_s": 3}
    )
    assert run.result["training_time_seconds"] >= 0.3


def test_weights_have_their_size_and_are_the_same_for_a_seed() -> None:
    runs = [simulate(artifact_mb=2.5), simulate(artifact_mb=2.5), simulate(artifact_mb=2.5, seed=6)]
    digests = []
    for run in runs:
        (artifact,) = run.outcome.artifacts
        assert (artifact.path, artifact.archive) == ("final_model", True)
        weights = run.folder / "final_model" / "weights.bin"
        assert weights.stat().st_size == 2_500_000
        digests.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    none = simulate()
    assert none.outcome.artifacts == ()
    assert not (none.folder / "final_model").exists()


def test_the_declared_example_runs() -> None:
    run = run_task(SimulatedTraining, EXAMPLE, info=INFO)
    assert run.ok, run.error
    assert (run.folder / "final_model" / "weights.bin").stat().st_size == 100_000


def test_a_second_attempt_goes_on_where_the_first_one_saved(tmp_path: Path) -> None:
    first = simulate(tmp_path, checkpoint_every=3, failure={**ERROR, "attempts": 1})
    assert first.error is not None
    second = simulate(tmp_path, checkpoint_every=3, failure={**ERROR, "attempts": 1})
    assert second.result["resume_from_path"] == str(first.folder / "checkpoints/checkpoint.json")
    assert second.progress[0]["fraction"] == 0.5  # epoch 3 of 6
    assert [report["epoch"] for report in second.progress[1:]] == [3, 3, 4, 4, 5, 5]
    assert second.result["history"] == simulate().result["history"]


def test_an_attempt_that_saves_nothing_of_its_own_hands_on_what_it_found(tmp_path: Path) -> None:
    runs = [
        simulate(tmp_path, checkpoint_every=3, failure={**ERROR, "attempts": attempts})
        for attempts in (2, 2, 2)
    ]
    assert [run.ok for run in runs] == [False, False, True]
    assert runs[2].progress[0]["fraction"] == 0.5


def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    simulate(tmp_path, failure={**ERROR, "attempts": 1})
    other = simulate(tmp_path, seed=9)
    assert other.progress[0]["fraction"] == 0
    assert other.result["resume_from_path"] is None
    assert other.result["history"] == simulate(seed=9).result["history"]
    assert "begun anew" in (other.folder / "logs" / "task.log").read_text()


def test_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    run = simulate(tmp_path, checkpoint_every=4)
    saved = json.loads((run.folder / "checkpoints" / "checkpoint.json").read_text())
    assert saved["done"] == 4
    assert not [*run.folder.rglob("*.tmp")]
    assert not (simulate(checkpoint_every=0).folder / "checkpoints").exists()


@pytest.mark.parametrize("retriable", [True, False])
def test_an_error_is_retriable_or_not(retriable: bool) -> None:
    run = simulate(failure={**ERROR, "retriable": retriable})
    assert run.error is not None
    assert (run.error.code, run.error.retriable) == ("executor.failed", retriable)
    assert str(run.error) == "error on demand before epoch 4"
    assert run.progress[-1]["step"] == 8  # epochs 0 to 3 were done


def test_a_failure_is_a_matter_of_chance_that_its_seed_decides() -> None:
    def failed(seed: int, attempt: int = 1) -> list[str]:
        failure = {"kind": "error", "probability": 0.3, "seed": seed}
        names = [f"task-{number}" for number in range(300)]
        return [name for name in names if _fails(name, failure, attempt)]

    assert 60 <= len(failed(1)) <= 120
    assert failed(1) == failed(1)
    assert failed(1) != failed(2)
    assert failed(1) != failed(1, attempt=2)


def _fails(task_id: str, failure: dict[str, Any], attempt: int) -> bool:
    spec = {"simulate": {"epochs": 1, "steps_per_epoch": 1, "time_scale": 0, "failure": failure}}
    ctx = RunContext(
        task_id=task_id,
        task_type="simulate",
        spec=SimulateSpec.model_validate(
            {**spec, "simulate": {**spec["simulate"], "checkpoint_every": 0}}
        ),
        raw_spec=spec,
        folder=Path("/nowhere"),
        attempt=attempt,
        clock=itertools.count().__next__,
    )
    try:
        asyncio.run(SimulatedTraining().run(ctx))
    except ExecutionError:
        return True
    return False
