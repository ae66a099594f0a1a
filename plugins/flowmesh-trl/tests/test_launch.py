from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.launch import check_launch, launch
from flowmesh_trl.plan import Plan, auto_deepspeed, plan_processes
from flowmesh_trl.resume import latest_whole

from flowmesh_core import (
    CancelledError,
    ContractError,
    CrashError,
    ExecutionError,
    ExecutorUnavailableError,
    InputError,
    Inputs,
)

HERE = Path(__file__).parent
SOURCE = Path(importlib.util.find_spec("flowmesh_trl").submodule_search_locations[0]).parent


def build_job(folder: Path, **spec: Any) -> TrainingJob:
    return TrainingJob(task_id="t1", task_type="sft", spec=spec, inputs=Inputs(), folder=folder)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Launch a function of ``rank_targets.py`` in two processes."""
    for needed in ("torch", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}{os.pathsep}{HERE}")

    def run(name: str, link: Link | None = None, **options: Any) -> dict[str, Any]:
        job = build_job(tmp_path, **options.pop("spec", {}))
        options = {"processes": 2, "devices": (), **options}
        return launch(job, link or Link(), target=f"rank_targets:{name}", **options)

    return run


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pids(folder: Path) -> list[list[int]]:
    """Return torchrun, rank and helper, of each rank."""
    return [json.loads((folder / f"pids-{rank}.json").read_text()) for rank in (0, 1)]


# Plans.


@pytest.mark.parametrize(
    ("training", "devices", "processes", "seen", "in_process"),
    [
        ({}, (), 1, (), True),
        ({}, ("3",), 1, ("3",), True),
        ({}, ("2", "3"), 2, ("2", "3"), False),
        ({"allow_multi_gpu": False}, ("2", "3"), 1, ("2",), False),
        ({"allow_multi_gpu": False, "primary_gpu": 1}, ("2", "3"), 1, ("3",), False),
        ({"visible_devices": ["3"]}, ("2", "3"), 1, ("3",), False),
        ({"visible_devices": ["3", "2"]}, ("2", "3", "4"), 2, ("3", "2"), False),
        ({"visible_devices": ["2", "4"], "primary_gpu": 1}, ("2", "3", "4"), 2, ("4", "2"), False),
        ({"nproc_per_node": 2}, ("2", "3", "4"), 2, ("2", "3"), False),
        ({"nproc_per_node": 1}, ("2", "3"), 1, ("2",), False),
        ({"nproc_per_node": 2}, (), 2, (), False),
        ({"deepspeed": {"zero_optimization": {}}}, ("0",), 1, ("0",), False),
    ],
)
def test_plan_follows_the_training_block(
    training: dict[str, Any],
    devices: tuple[str, ...],
    processes: int,
    seen: tuple[str, ...],
    in_process: bool,
) -> None:
    plan = plan_processes(training, devices)
    assert (plan.processes, plan.devices, plan.in_process) == (processes, seen, in_process)


def test_plan_on_cpu_leaves_gpus_alone() -> None:
    plan = plan_processes({"nproc_per_node": 3}, ("0", "1"), use_cpu=True)
    assert (plan.processes, plan.devices, plan.in_process) == (3, (), False)
    assert plan_processes({}, ("0", "1"), use_cpu=True).in_process


@pytest.mark.parametrize(
    ("training", "devices", "message"),
    [
        (
            {"visible_devices": ["0", "1"]},
            ("2", "3"),
            r"visible_devices must be among the task's own GPUs \(2, 3\), got \['0', '1'\]",
        ),
        ({"visible_devices": ["0"]}, (), r"own GPUs \(it has none\), got \['0'\]"),
        ({"visible_devices": []}, ("0",), r"visible_devices must be .* got \[\]"),
        ({"nproc_per_node": 3}, ("0", "1"), r"nproc_per_node is 3, but the task may use 2 GPU"),
        ({"visible_devices": ["1"], "nproc_per_node": 2}, ("0", "1"), r"is 2, .* may use 1 GPU"),
        ({"primary_gpu": 2}, ("0", "1"), r"primary_gpu must be a position among 2 GPU.*got 2"),
    ],
)
def test_plan_refuses_what_the_task_has_not(
    training: dict[str, Any], devices: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        plan_processes(training, devices)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package seem installed."""
    found = SimpleNamespace(find_spec=lambda name: name == "deepspeed" or None)
    monkeypatch.setattr("flowmesh_trl.plan.importlib", SimpleNamespace(util=found))


TWO = Plan(processes=2, devices=("0", "1"), in_process=False)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_several_gpus_share_the_work_through_deepspeed(stage: int) -> None:
    config = auto_deepspeed("sft", {"auto_deepspeed_stage": stage}, TWO)
    assert config is not None
    assert config["zero_optimization"]["stage"] == stage
    gathered = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False)
    assert gathered is (stage == 3)
    filled = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[name] for name in filled} == {"auto"}
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("task_type", "training", "plan"),
    [
        ("ppo", {}, TWO),
        ("sft", {"auto_deepspeed": False}, TWO),
        ("sft", {"deepspeed": {"zero_optimization": {}}}, TWO),
        ("sft", {"fsdp": "full_shard"}, TWO),
        ("sft", {"fsdp_config": {"x": 1}}, TWO),
        ("sft", {"accelerate_config": "/etc/a.yaml"}, TWO),
        ("sft", {}, Plan(processes=2, devices=(), in_process=False)),
        ("sft", {}, Plan(processes=1, devices=("0",), in_process=True)),
    ],
)
def test_deepspeed_is_not_put_where_it_does_not_belong(
    task_type: str, training: dict[str, Any], plan: Plan
) -> None:
    assert auto_deepspeed(task_type, training, plan) is None


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is installed")
def test_without_deepspeed_several_gpus_train_as_pytorch_has_it() -> None:
    assert auto_deepspeed("sft", {}, TWO) is None


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is installed")
def test_missing_deepspeed_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ExecutorUnavailableError, match="pip install deepspeed") as caught:
        launch(
            build_job(tmp_path, training={"deepspeed": "zero2.json"}),
            Link(),
            processes=2,
            devices=(),
        )
    assert caught.value.needs == ("deepspeed",)
    assert list(tmp_path.iterdir()) == []
    check_launch({"deepspeed": None})


# Ranks.


def test_ranks_reduce_and_rank_0_reports(
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PET_NNODES", "7")  # torchrun would take it as its --nnodes
    seen: list[dict[str, Any]] = []
    lines: list[str] = []
    link = Link(report=lambda **values: seen.append(values), say=lines.append)
    summary = train("reduce", link, devices=("4", "6"), spec={"lora": {"r": 8}})
    assert summary["sum"] == 3.0
    assert summary["spec"] == {"lora": {"r": 8}}
    assert summary["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert summary["WORLD_SIZE"] == "2"
    assert summary["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {address.removeprefix("::ffff:") for address in summary["remote"]} == {"127.0.0.1"}
    assert seen == [{"step": 1, "total": 2, "loss": 1.5, "kind": "numbers"}]
    assert lines == ["rank 0 logs"]
    assert "rank 0 prints" in capfd.readouterr().out
    logs = tmp_path / "logs"
    assert "rank 0 prints" in (logs / "rank-0.log").read_text()
    assert {"rank 1 prints", "rank 1 logs"} <= {*(logs / "rank-1.log").read_text().split("\n")}
    assert not (tmp_path / ".launch").exists()


def test_ranks_get_no_secret_that_they_do_not_need(train: Callable[..., dict[str, Any]]) -> None:
    jsonl = {"url": "http://host/rows", "headers": {"Authorization": "s3cret"}}
    spec = {
        "data": {
            "jsonl": {**jsonl, "download_headers": {"a": "s3cret"}},
            "examples": [{"headers": 1}],
        },
        "output": {"destination": {"headers": {"Authorization": "s3cret"}}},
        "checkpoint": {"load": {"type": "http", "headers": {"Authorization": "s3cret"}}},
        "training": {"seed": 1},
    }
    told = train("tell_job", spec=spec, processes=1)
    assert "s3cret" not in told["text"]
    assert told["mode"] == 0o600
    kept = {"jsonl": {"url": "http://host/rows"}, "examples": [{"headers": 1}]}
    assert json.loads(told["text"])["spec"] == {"data": kept, "training": {"seed": 1}}


def test_error_of_the_rank_that_failed_first_is_rebuilt(
    train: Callable[..., dict[str, Any]],
) -> None:
    lines: list[str] = []
    with pytest.raises(InputError, match=r"^rank 1 of 2: no rows in rows\.jsonl$") as caught:
        train("refuse", Link(say=lines.append))
    assert caught.value.retriable
    assert "the file is not there" in lines[0]
    assert "logs/rank-1.log" in lines[0]


def test_a_rank_has_failed_before_its_traceback_is_written(tmp_path: Path) -> None:
    folder = tmp_path / ".launch"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(build_job(tmp_path).to_dict()))
    command = [sys.executable, "-m", "flowmesh_trl.rank", str(folder)]
    with subprocess.Popen(
        [*command, "--target", "rank_targets:fail_at_length"],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{HERE}"},
        stdin=subprocess.PIPE,
        start_new_session=True,
    ) as rank:
        assert rank.wait(60) == 1
    error = json.loads((folder / "rank-0.error.json").read_text())
    assert error["error"]["message"] == "LongError: much to tell"
    assert error["at"] <= float((tmp_path / "told-at").read_text())


def test_killed_rank_ends_the_job_with_its_signal_and_its_own_log(
    train: Callable[..., dict[str, Any]],
) -> None:
    begun = time.monotonic()
    with pytest.raises(
        CrashError, match=r"rank 1 of 2 was ended by SIGKILL.*: last words"
    ) as caught:
        train("die")
    assert (caught.value.signal, caught.value.exit_code) == ("SIGKILL", None)
    assert caught.value.retriable
    assert time.monotonic() - begun < 30


def test_rank_that_exits_without_a_word_ends_the_job(train: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CrashError, match="rank 1 of 2 exited with code 3") as caught:
        train("exit_quietly")
    assert (caught.value.signal, caught.value.exit_code) == (None, 3)


def test_rank_without_memory_is_told_apart(train: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CrashError, match="rank 0 of 2: MemoryError: cannot allocate") as caught:
        train("run_out_of_memory")
    assert caught.value.oom
    assert caught.value.code == "crash.out_of_memory"


def test_unknown_target_is_an_error_of_the_rank(train: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ExecutionError, match=r"rank 0 of 1: AttributeError: .*no_such_function"):
        train("no_such_function", processes=1)


def test_cancelled_ranks_may_save_as_long_as_they_need(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = SimpleNamespace(monotonic=lambda: time.monotonic() * 1000)  # a second is a quarter hour
    monkeypatch.setattr("flowmesh_trl.launch.time", quick)
    seen: list[dict[str, Any]] = []
    link = Link(report=lambda **values: seen.append(values), must_stop=lambda: bool(seen))
    with pytest.raises(CancelledError, match=r"^stopped at step 1$"):
        train("stop_when_asked", link)
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_ranks_that_do_not_stop_are_ended_with_all_they_started(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_trl.launch._TERM_S", 0.5)
    seen: list[dict[str, Any]] = []
    link = Link(report=lambda **values: seen.append(values), must_stop=lambda: bool(seen))
    with pytest.raises(CancelledError, match=r"did not stop within 0\.5 s and were ended"):
        train("never_stop", link, grace_s=0.5)
    assert living([pid for pids in read_pids(tmp_path) for pid in pids]) == []
    assert not (tmp_path / ".launch").exists()


@pytest.mark.parametrize("helper", [False, True])
def test_killed_torchrun_takes_its_ranks_along(
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    helper: bool,
) -> None:
    monkeypatch.setattr("flowmesh_trl.launch._PATIENCE_S", 1.5)
    lines: list[str] = []

    def kill_torchrun(**_values: Any) -> None:
        os.kill(read_pids(tmp_path)[0][0], signal.SIGKILL)

    link = Link(report=kill_torchrun, say=lines.append)
    with pytest.raises(CrashError, match="torchrun was ended by SIGKILL"):
        train("never_stop", link, spec={"helper": helper})
    (agent, first, *helpers), (_, second, *others) = read_pids(tmp_path)
    try:
        assert living([agent, first, second]) == []
        left = ["some processes of the training did not end when killed"]
        assert lines == (left if helper else [])
    finally:
        end_helpers(*helpers, *others)


def test_ranks_die_with_the_process_that_launched_them(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    script = f"""
from pathlib import Path
from flowmesh_core import Inputs
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.launch import launch
folder = Path({str(tmp_path)!r})
job = TrainingJob(task_id="t1", task_type="sft", spec={{}}, inputs=Inputs(), folder=folder)
launch(job, Link(), processes=2, devices=(), target="rank_targets:never_stop")
"""
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        try:
            wait_until(lambda: len([*tmp_path.glob("pids-*.json")]) == 2)
        finally:
            parent.kill()
    (agent, first, helper), (_, second, other) = read_pids(tmp_path)
    try:
        wait_until(lambda: not living([agent, first, second]))
    finally:
        end_helpers(helper, other)


def test_torchrun_dies_with_the_process_that_launched_it_before_there_are_ranks(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = str(tmp_path / "failures.json")
    waits = ("--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0")
    command = [sys.executable, "-m", "flowmesh_trl.agent", report, "torchrun", *waits, "none.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as agent:
        try:
            wait_until(lambda: len(psutil.Process(agent.pid).net_connections()) > 0)
            assert agent.stdin is not None
            agent.stdin.close()
            wait_until(lambda: agent.poll() is not None, 10)
        finally:
            agent.kill()
    assert agent.returncode == -signal.SIGKILL


def test_tiny_model_trains_in_two_processes(
    train: Callable[..., dict[str, Any]], make_job: Callable[..., TrainingJob]
) -> None:
    pytest.importorskip("trl")
    seen: list[dict[str, Any]] = []
    rows = [f"the quick brown fox number {number}" for number in range(16)]
    job = make_job("sft", rows, training={"max_steps": 2, "save_steps": 2})
    link = Link(report=lambda **values: seen.append(values))
    summary = launch(job, link, processes=2, devices=())
    assert summary["steps"] == 2
    assert summary["train_loss"] > 0
    assert [report["step"] for report in seen][-1] == 2
    metrics = json.loads((job.folder / "training_metrics.json").read_text())
    assert '"processes": 2' in json.dumps(metrics)
    assert (job.folder / "final_model" / "model.safetensors").is_file()
    found = latest_whole(job.folder / "checkpoints")
    assert found is not None
    assert {path.name for path in found.glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def end_helpers(*pids: int) -> None:
    """End those that only a keeper would find: they left the group of their rank."""
    for pid in living([*pids]):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_raising_listener_leaves_nothing_running(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def refuse(**_values: Any) -> None:
        raise OSError("the worker is gone")

    with pytest.raises(OSError, match="the worker is gone"):
        train("never_stop", Link(report=refuse))
    assert living([pid for pids in read_pids(tmp_path) for pid in pids]) == []


def test_missing_summary_is_a_crash_not_a_success(train: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(CrashError, match="torchrun ended without a summary"):
        train("end_early", processes=1)


def test_accelerate_configuration_reaches_the_ranks(train: Callable[..., dict[str, Any]]) -> None:
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"},
        "num_processes": 8,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
        "use_cpu": False,
    }
    summary = train("tell_environment", spec={"training": {"accelerate_config": config}})
    assert summary["ACCELERATE_USE_FSDP"] == "true"
    assert summary["WORLD_SIZE"] == "2"
