"""Trainings as a worker runs them: in processes of their own, cut off by real signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh_core.testing import StandInOrchestrator, TaskRun, WorkerProcess, run_task, wait_for

pytest.importorskip("torch")
pytest.importorskip("trl")

ROWS = [{"prompt": f"count {n}", "response": f"{n} and {n + 1}"} for n in range(16)]
LONG: dict[str, Any] = {"max_steps": 100_000, "save_steps": 2, "logging_steps": 1, "batch_size": 2}


def spec_of(tiny: Path, **changes: Any) -> dict[str, Any]:
    training = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "batch_size": 2}
    return {
        "taskType": "sft",
        "model": {"source": {"type": "folder", "path": str(tiny)}},
        "data": {"examples": ROWS},
        **changes,
        "training": {**training, **changes.get("training", {})},
    }


class Background:
    """A task in a thread of its own, and what its process tree holds meanwhile."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self._before = set(psutil.Process().children(recursive=True))
        self.run: TaskRun | None = None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        self.run = run_task(f"trl.{self._spec['taskType']}", self._spec, folder=self._folder)

    def processes(self, part: str) -> list[psutil.Process]:
        """Return those whose command line has a part."""
        found = []
        for process in self._started():
            try:
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """Kill the process that trains: the one that holds the libraries."""
        child = max(self._started(), key=lambda process: process.memory_info().rss)
        child.send_signal(signal.SIGKILL)

    def _started(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - self._before

    def join(self) -> TaskRun:
        self._thread.join(120)
        assert self.run is not None, "the task hangs"
        return self.run


def saved(folder: Path) -> list[int]:
    """Return the steps of the checkpoints below a folder that were written to their end."""
    states = folder.glob("**/checkpoint-*/trainer_state.json")
    return sorted(int(state.parent.name.split("-")[1]) for state in states)


def test_a_training_in_a_process_of_its_own_leaves_all_that_the_contract_names(
    tiny: Path, tmp_path: Path
) -> None:
    run = run_task("trl.sft", spec_of(tiny), folder=tmp_path)
    assert run.error is None
    result = run.result
    assert result["training_successful"] is True
    assert (result["task_id"], result["dataset_size"], result["steps"]) == ("task", 16, 4)
    assert result["output_dir"] == str(tmp_path / "task")
    assert [artifact.path for artifact in run.outcome.artifacts] == ["final_model"]
    for name in ("final_model/config.json", "final_model/model.safetensors", "artifacts/loss.png"):
        assert (run.folder / name).stat().st_size > 0
    steps = [report for report in run.progress if report.get("loss") is not None]
    assert [report["step"] for report in steps] == [1, 2, 3, 4]
    assert {"learning_rate", "eta_s"} <= steps[0].keys()
    assert run.progress[-1]["fraction"] == 1


def test_a_killed_training_goes_on_from_its_checkpoint(tiny: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, training=LONG)
    first = Background(spec, tmp_path)
    wait_for(lambda: saved(tmp_path)[-1:] >= [4])
    first.kill()
    error = first.join().error
    assert error is not None
    assert (error.code, "SIGKILL" in str(error)) == ("crash", True)
    reached = max(saved(tmp_path))
    # As another worker would get it: the same document, from the checkpoint to a nearer end.
    again = Background(spec, tmp_path)
    wait_for(lambda: max(saved(tmp_path)) > reached)
    log = (tmp_path / ".task.attempt-2" / "logs" / "task.log").read_text()
    assert "going on from checkpoint-" in log
    again.kill()
    again.join()


def test_a_training_whose_delivery_failed_is_not_made_again(tiny: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, data={"examples": ROWS[:8]})
    assert run_task("trl.sft", spec, folder=tmp_path).error is None
    run = run_task("trl.sft", spec, folder=tmp_path)
    assert run.error is None
    assert run.result["resume_from_path"].endswith("checkpoint-4")
    assert run.result["steps"] == 4
    assert (run.folder / "final_model" / "model.safetensors").exists()


def test_a_cancelled_training_saves_a_checkpoint_and_ends(tiny: Path, tmp_path: Path) -> None:
    training = {**LONG, "save_steps": 1000}
    run = run_task("trl.sft", spec_of(tiny, training=training, timeoutSec=15), folder=tmp_path)
    assert run.error is not None
    assert run.error.code == "deadline"
    assert saved(tmp_path), "the work so far is kept"


def test_two_ranks_train_as_one(tiny: Path, tmp_path: Path) -> None:
    run = run_task("trl.sft", spec_of(tiny, training={"nproc_per_node": 2}), folder=tmp_path)
    assert run.error is None
    assert run.result["steps"] == 4
    assert (run.folder / "final_model" / "model.safetensors").exists()
    assert (run.folder / "logs" / "rank-1.log").exists()
    assert not (run.folder / ".launch").exists()


def test_a_killed_rank_ends_the_training_with_its_number(tiny: Path, tmp_path: Path) -> None:
    training = {**LONG, "nproc_per_node": 2}
    task = Background(spec_of(tiny, training=training), tmp_path)
    wait_for(lambda: saved(tmp_path))
    ranks = wait_for(lambda: len(found := task.processes("flowmesh_trl.rank")) >= 2 and found)
    ranks = [rank for rank in ranks if "agent" not in " ".join(rank.cmdline())]
    ranks[-1].send_signal(signal.SIGKILL)
    error = task.join().error
    assert error is not None
    assert error.code == "crash"
    assert "rank" in str(error)
    assert "SIGKILL" in str(error)
    wait_for(lambda: not any(rank.is_running() for rank in ranks), 20)


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "results"
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert not left, f"left running: {[p.info['cmdline'] for p in left]}"


def test_a_killed_worker_leaves_nothing_running_and_the_next_one_goes_on(
    tiny: Path, results: Path, flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str
) -> None:
    host = flowmesh_orchestrator
    spec = spec_of(tiny, training={**LONG, "max_steps": 24, "save_steps": 1})
    spec["output"] = {"destination": {"type": "http", "url": host.results_url}}
    with WorkerProcess(flowmesh_redis_url, results) as worker:
        task_id = host.submit({"metadata": {"name": "t"}, "spec": spec})
        wait_for(lambda: saved(results)[-1:] >= [3])
        tree = worker.process.children(recursive=True)
        worker.signal(signal.SIGKILL)
        worker.wait()
        wait_for(lambda: not any(process.is_running() for process in tree), 20)
    held_by = host.task(task_id).assigned_worker
    assert held_by is not None
    reached = max(saved(results))
    with WorkerProcess(flowmesh_redis_url, results, worker_id="w2"):
        host.expire_heartbeat(held_by)
        assert host.wait_task(task_id, 120).status == "DONE"
    result = host.result(task_id)["result"]
    assert result["steps"] == 24
    assert int(result["resume_from_path"].rsplit("-", 1)[1]) == reached
    (archive,) = host.folder(task_id).rglob("final_model.tar.gz")
    assert archive.stat().st_size == result["final_model_archive_bytes"]
