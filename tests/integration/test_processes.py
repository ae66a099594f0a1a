"""Executors in child processes: whatever they do, the worker's side goes on and nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh_core.config import load_settings
from flowmesh_core.errors import CrashError, DeadlineError, ExecutionError, FlowmeshError
from flowmesh_core.events import TaskEvent
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.telemetry.probes import Gpu, GpuReader
from flowmesh_core.testing import TaskRun, run_task
from flowmesh_core.workflow import PlannedTask

ROUGH = Path(__file__).parents[1] / "executors" / "rough.py"
GRACE_S = 0.5


def ours(folder: Path) -> dict[int, str]:
    """Return every process below this one, and every marked one that began below a folder.

    What was detached keeps the working folder of the engine from which it came; marked processes
    of other runs of these tests have another one.
    """
    found = {}
    below = {process.pid for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter(["pid", "cmdline", "status", "cwd"]):
        line = " ".join(process.info["cmdline"] or [])
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        marked = "flowmesh-rough" in line and (process.info["cwd"] or "").startswith(str(folder))
        if alive and (process.pid in below or marked):
            found[process.pid] = line
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    before = ours(tmp_path)
    yield
    left = {pid: line for pid, line in ours(tmp_path).items() if pid not in before}
    assert not left, left


def run(tmp_path: Path, do: str, *, executor: str = "rough", **spec: Any) -> TaskRun:
    settings = load_settings({}, results_dir=tmp_path, cancel_grace_s=GRACE_S)
    return run_task(
        executor,
        {"do": do, **spec},
        folder=tmp_path,
        settings=settings,
        plugin_files=[ROUGH],
    )


def run_all(
    tmp_path: Path,
    nodes: Mapping[str, Mapping[str, Any]],
    *,
    in_turn: bool = True,
    while_running: Callable[[LocalRun, PlannedTask, TaskEvent], None] = lambda *_: None,
    **settings: Any,
) -> dict[str, StageReport]:
    """Run several tasks in one worker, one after the other or all at once."""
    chosen = load_settings(
        {}, results_dir=tmp_path, worker_id="local", cancel_grace_s=GRACE_S, **settings
    )
    names = list(nodes)
    graph = [
        {
            "name": name,
            "spec": {"taskType": "rough", **nodes[name]},
            "dependsOn": names[:place][-1:] if in_turn else [],
        }
        for place, name in enumerate(names)
    ]
    workflow = plan({"spec": {"taskType": "rough", "graph": {"nodes": graph}}})
    plugins = load_plugins(chosen, files=[ROUGH])

    async def work() -> list[StageReport]:
        local = LocalRun(
            workflow,
            chosen,
            plugins,
            on_event=lambda task, event: while_running(local, task, event),
        )
        return await asyncio.wait_for(local.run(), 60)

    return {report.name: report for report in asyncio.run(work())}


def error_of(outcome: TaskRun) -> FlowmeshError:
    assert outcome.error is not None
    return outcome.error


def read_log(outcome: TaskRun, name: str) -> str:
    return (outcome.folder / "logs" / f"{name}.log").read_text()


# How it ends.


def test_a_task_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    outcome = run(tmp_path, "write")
    assert outcome.ok, outcome.error
    assert outcome.result["pid"] != os.getpid()
    assert (outcome.folder / "made.txt").read_text() == "by attempt 1"


def test_what_an_executor_raises_is_told_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    outcome = run(tmp_path, "fail")
    error = error_of(outcome)
    assert str(error) == "ValueError: no good"
    assert (error.code, error.retriable) == ("executor.failed", False)
    assert "in do_fail" in read_log(outcome, "task")


@pytest.mark.parametrize(
    ("do", "says", "exit_code", "signal_name"),
    [
        ("exit", "exit code 3", 3, None),
        ("segfault", "SIGSEGV", None, "SIGSEGV"),
        ("kill", "SIGKILL (killed), cause unknown", None, "SIGKILL"),
        ("close_everything", "connection to the worker is lost", 70, None),
    ],
)
def test_a_process_that_ends_is_a_crash_with_its_reason(
    do: str, says: str, exit_code: int | None, signal_name: str | None, tmp_path: Path
) -> None:
    error = error_of(run(tmp_path, do))
    assert isinstance(error, CrashError)
    assert says in str(error)
    assert (error.exit_code, error.signal, error.oom) == (exit_code, signal_name, False)
    assert error.code == "crash"
    assert error.retriable


def test_the_last_words_of_a_crash_are_in_its_message(tmp_path: Path) -> None:
    outcome = run(tmp_path, "exit")
    assert "going down" in read_log(outcome, "stderr")
    assert "Segmentation fault" in read_log(run(tmp_path, "segfault"), "stderr")


def test_a_class_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    error = error_of(run(tmp_path, "nothing", executor="rough.absent"))
    assert "NotThere" in str(error)
    assert error.code == "plugin.load"


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    outcome = run(tmp_path, "nothing", executor="rough.loads")
    assert "no such weights" in str(error_of(outcome))
    assert read_log(outcome, "stdout") == "loading\n"


@pytest.mark.parametrize("do", ["hold_gil", "sleep", "shell", "ignore_sigterm"])
def test_a_deadline_ends_what_does_not_listen_and_all_that_it_started(
    do: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    error = error_of(run(tmp_path, do, timeoutSec=1.0))
    assert isinstance(error, DeadlineError)
    assert time.monotonic() - started < 1.0 + GRACE_S + 5


def test_an_executor_that_listens_stops_before_the_grace_is_over(tmp_path: Path) -> None:
    outcome = run(tmp_path, "wait", timeoutSec=0.5)
    assert isinstance(outcome.error, DeadlineError)


def test_nothing_is_written_into_the_folder_once_a_task_was_given_up(tmp_path: Path) -> None:
    outcome = run(tmp_path, "write_after_stop", timeoutSec=1.0)
    assert isinstance(outcome.error, DeadlineError)
    written = sorted(path.name for path in outcome.folder.glob("late-*"))
    assert written
    time.sleep(0.2)
    assert sorted(path.name for path in outcome.folder.glob("late-*")) == written


@pytest.mark.parametrize("then", [None, "fail", "exit", "kill"])
def test_a_detached_grandchild_does_not_outlive_its_process(
    then: str | None, tmp_path: Path
) -> None:
    outcome = run(tmp_path, "detach", then=then)
    assert outcome.ok is (then is None)


# Memory.


def test_more_memory_than_the_document_asks_for_ends_the_task_as_out_of_memory(
    tmp_path: Path,
) -> None:
    error = error_of(run(tmp_path, "eat", resources={"hardware": {"memory": "256Mi"}}))
    assert isinstance(error, CrashError)
    assert error.oom
    assert error.code == "crash.out_of_memory"
    assert not error.retriable
    assert "resources.hardware.memory" in str(error)


def test_a_gpu_that_has_no_memory_left_is_out_of_memory_and_may_be_tried_again(
    tmp_path: Path,
) -> None:
    error = error_of(run(tmp_path, "cuda_oom"))
    assert (error.code, error.retriable) == ("crash.out_of_memory", True)


def test_an_executor_that_can_shrink_runs_once_more_with_half_the_batch(tmp_path: Path) -> None:
    outcome = run(tmp_path, "", executor="rough.shrinks")
    assert outcome.result["scale"] == 0.5
    assert "half the batch" in read_log(outcome, "task")
    error = error_of(run(tmp_path, "", executor="rough.shrinks", fits=0.1))
    assert error.code == "crash.out_of_memory"


# What goes in and out.


def test_output_arrives_whole_however_long_its_lines_are(tmp_path: Path) -> None:
    outcome = run(tmp_path, "print", size=10_000_000)
    assert outcome.ok
    assert (outcome.folder / "logs" / "stdout.log").stat().st_size == 10_000_000
    assert read_log(outcome, "stderr") == "to stderr\n"


def test_an_executor_may_close_its_output(tmp_path: Path) -> None:
    assert run(tmp_path, "close_stdout").ok


def test_standard_input_is_empty(tmp_path: Path) -> None:
    assert run(tmp_path, "read_stdin").result["told"] == ""


@pytest.mark.parametrize("size", [65_536, 10_000_000])
def test_large_documents_and_results_cross(size: int, tmp_path: Path) -> None:
    outcome = run(tmp_path, "huge", size=size, text="ü" * size)
    assert outcome.result["told"] == {"text": "y" * size, "asked": size}


def test_a_result_that_is_no_json_is_an_error_that_says_where(tmp_path: Path) -> None:
    error = error_of(run(tmp_path, "not_json"))
    assert isinstance(error, ExecutionError)
    assert "told.path" in str(error)


def test_a_child_sees_no_secret_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_TOKEN", "worker-secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "worker-secret")
    monkeypatch.setenv("HF_TOKEN", "worker-secret")
    monkeypatch.setenv("FLOWMESH_ROUGH_LEVEL", "high")
    seen = run(tmp_path, "environment").result["told"]
    assert "worker-secret" not in seen.values()
    assert seen["FLOWMESH_ROUGH_LEVEL"] == "high"
    assert seen["PATH"] == os.environ["PATH"]
    assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_settings_reach_the_process_under_whatever_name_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_ROUGH_SETTINGS_LEVEL", "high")
    monkeypatch.setenv("ACME_LICENCE", "paid")
    outcome = run(tmp_path, "", executor="rough.settings")
    assert outcome.result == {"level": "high", "licence": "paid"}


def test_every_report_is_a_line_and_subscribers_get_a_few_and_the_last(tmp_path: Path) -> None:
    heard: list[Any] = []

    def listen(_run: LocalRun, _task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_PROGRESS":
            heard.append(event.payload["fraction"])

    report = run_all(tmp_path, {"a": {"do": "report"}}, while_running=listen)["a"]
    assert report.folder is not None
    lines = (report.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))
    assert heard[-1] == 1.0
    assert len(heard) < 50


def test_a_task_may_run_another_one_and_sees_how_it_ended(tmp_path: Path) -> None:
    parent = run(tmp_path, "child", child={"taskType": "echo", "m": 1})
    told = parent.result["told"]
    assert told["result"]["echo"]["m"] == 1
    assert Path(told["folder"]) == parent.folder / "children" / "1"
    parent = run(tmp_path, "child", child={"taskType": "rough", "do": "exit"})
    told = parent.result["told"]
    assert "exit code 3" in told["error"]
    assert Path(told["folder"]) == parent.folder / "children" / "1"
    told = run(tmp_path, "child", child={"taskType": "nobody"}).result["told"]
    assert "'nobody' is not known" in told["error"]
    assert told["folder"] == "None"


# Warm processes.


def test_tasks_of_one_engine_share_a_process_and_load_once(tmp_path: Path) -> None:
    reports = run_all(
        tmp_path,
        {"a": {"model": "x"}, "b": {"model": "x"}, "c": {"model": "y"}, "d": {"model": "x"}},
    )
    pids = {name: report.result["pid"] for name, report in reports.items()}
    assert pids["a"] == pids["b"] == pids["d"] != pids["c"]
    assert [report.result["loads"] for report in reports.values()] == [1, 1, 1, 1]


def test_the_least_recently_used_engine_goes_when_there_are_too_many(tmp_path: Path) -> None:
    order = {"a": "x", "b": "y", "c": "x", "d": "z", "e": "x", "f": "y"}
    reports = run_all(
        tmp_path, {name: {"model": model} for name, model in order.items()}, warm_max=2
    )
    pids = {name: report.result["pid"] for name, report in reports.items()}
    assert pids["a"] == pids["c"] == pids["e"]
    assert pids["b"] != pids["f"], "y was the least recently used when z came"


def test_an_idle_engine_ends_when_its_time_is_over(tmp_path: Path) -> None:
    gone: list[bool] = []

    def look(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("b", "TASK_STARTED"):
            threading.Timer(1.5, lambda: gone.append(len(children()) == 1)).start()

    run_all(
        tmp_path,
        {"a": {"model": "x"}, "b": {"model": "y", "do": "wait", "timeoutSec": 2.5}},
        while_running=look,
        warm_idle_s=0.3,
    )
    assert gone == [True]


def children() -> list[psutil.Process]:
    """Return the processes in which executors run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if any("flowmesh_core.places.child" in word for word in line):
            found.append(process)
    return found


def test_an_engine_that_died_while_idle_is_replaced_unnoticed(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("a", "TASK_SUCCEEDED"):
            killed.extend(process.pid for process in children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    reports = run_all(tmp_path, {"a": {}, "b": {}}, while_running=kill)
    assert reports["b"].ok, reports["b"].error
    assert killed == [reports["a"].result["pid"]]
    assert reports["b"].result["pid"] not in killed


def test_a_failed_task_leaves_its_engine_warm_and_a_stopped_one_takes_its_own_along(
    tmp_path: Path,
) -> None:
    reports = run_all(
        tmp_path,
        {"a": {}, "b": {"do": "fail"}},
    )
    assert not reports["b"].ok
    nodes = {"a": {}, "b": {"do": "sleep", "timeoutSec": 0.3}}
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=2)
    assert reports["a"].ok
    assert reports["b"].code == "deadline"


def test_a_detached_grandchild_ends_although_its_engine_stays_warm(tmp_path: Path) -> None:
    alive: list[bool] = []

    def look(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("b", "TASK_STARTED"):
            marked = lambda: any("flowmesh-rough" in line for line in ours(tmp_path).values())  # noqa: E731
            threading.Timer(2.5, lambda: alive.append(marked())).start()

    reports = run_all(
        tmp_path,
        {"a": {"do": "detach"}, "b": {"taskType": "rough.together", "s": 3.5}},
        while_running=look,
    )
    assert reports["b"].ok
    assert alive == [False]


def test_an_idle_engine_makes_room_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([10 << 30, 1 << 20, 10 << 30, 10 << 30])
    monkeypatch.setattr(
        "flowmesh_core.places.process.available_memory_bytes", lambda: next(readings)
    )
    order = {"a": "x", "b": "y", "c": "z", "d": "y"}
    memory = {"hardware": {"memory": "1Gi"}}
    reports = run_all(
        tmp_path,
        {name: {"model": model, "resources": memory} for name, model in order.items()},
    )
    pids = {name: report.result["pid"] for name, report in reports.items()}
    assert pids["b"] == pids["d"], "only the least recently used one had to go"
    assert len(set(pids.values())) == 3


# Devices.


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        Gpu(index=index, name="Acme X100", uuid=f"GPU-{index}", memory_bytes=16 << 30)
        for index in (0, 1)
    ]
    monkeypatch.setattr(GpuReader, "list_gpus", lambda _self: gpus)


@pytest.mark.usefixtures("two_gpus")
def test_each_task_sees_the_gpus_that_it_reserved_and_no_others(tmp_path: Path) -> None:
    one = {"hardware": {"gpu": {"count": 1, "type": "x100", "memory": "16Gi"}}}
    gpu = {"taskType": "rough.gpu", "do": "devices", "pause_s": 0.5}
    reports = run_all(
        tmp_path,
        {
            "a": {**gpu, "resources": one},
            "b": {**gpu, "resources": one},
            "both": {**gpu, "resources": {"hardware": {"gpu": {"count": 2}}}},
            "cpu": {**gpu, "enforce_cpu": True},
            "plain": {"do": "devices"},
            "three": {**gpu, "resources": {"hardware": {"gpu": {"count": 3}}}},
            "other": {**gpu, "resources": {"hardware": {"gpu": {"count": 1, "type": "h100"}}}},
        },
        in_turn=False,
        max_concurrent_tasks=8,
    )
    told = {name: report.result["told"] for name, report in reports.items() if report.ok}
    assert {told["a"]["visible"], told["b"]["visible"]} == {"0", "1"}
    assert told["both"] == {"devices": ["0", "1"], "visible": "0,1"}
    assert told["cpu"] == told["plain"] == {"devices": [], "visible": ""}
    for name in ("three", "other"):
        assert reports[name].code == "resource"
        assert "Acme X100" in reports[name].error or "2" in reports[name].error


# Several at once.


def test_coroutines_of_one_engine_run_side_by_side(tmp_path: Path) -> None:
    nodes = {f"t{n}": {"taskType": "rough.together", "s": 1.0} for n in range(4)}
    started = time.monotonic()
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=4)
    assert time.monotonic() - started < 3.5
    assert len({report.result["pid"] for report in reports.values()}) == 1


def test_a_crash_beside_others_is_everybodys_and_may_be_tried_again(tmp_path: Path) -> None:
    nodes: dict[str, dict[str, Any]] = {
        "good": {"taskType": "rough.together", "s": 30},
        "bad": {"taskType": "rough.together", "crash": True},
    }
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=2)
    assert [report.code for report in reports.values()] == ["crash", "crash"]
    assert "exit code 7" in reports["good"].error


def test_one_that_does_not_stop_costs_its_neighbours_a_retry(tmp_path: Path) -> None:
    nodes: dict[str, dict[str, Any]] = {
        "good": {"taskType": "rough.together", "s": 30},
        "deaf": {"taskType": "rough.together", "deaf": True, "timeoutSec": 0.5},
    }
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=2)
    assert reports["deaf"].code == "deadline"
    assert reports["good"].code == "crash"
    assert "did not stop" in reports["good"].error


def test_a_coroutine_that_does_not_look_is_cancelled_and_its_engine_stays(tmp_path: Path) -> None:
    nodes: dict[str, dict[str, Any]] = {
        "first": {"taskType": "rough.together", "s": 0.01},
        "long": {"taskType": "rough.together", "s": 30, "timeoutSec": 0.3},
        "other": {"taskType": "rough.together", "s": 1.5},
    }
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=3)
    assert reports["long"].code == "deadline"
    assert reports["other"].ok
    assert reports["first"].result["pid"] == reports["other"].result["pid"]


# Cancel.


def test_a_cancelled_shell_is_gone_within_the_grace(tmp_path: Path) -> None:
    asked: list[float] = []

    def cancel(local: LocalRun, _task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_PROGRESS" and not asked:
            asked.append(time.monotonic())
            local.cancel()

    reports = run_all(tmp_path, {"a": {"do": "shell"}}, while_running=cancel)
    assert reports["a"].code == "cancelled"
    assert time.monotonic() - asked[0] < GRACE_S + 5


def test_cancelled_work_that_has_not_started_never_starts(tmp_path: Path) -> None:
    started: list[str] = []

    def cancel(local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_PROGRESS":
            local.cancel()

    reports = run_all(
        tmp_path,
        {"a": {"do": "wait"}, "b": {"do": "write"}, "c": {"do": "write"}},
        in_turn=False,
        while_running=cancel,
    )
    assert [report.code for report in reports.values()] == ["cancelled"] * 3
    assert not list(tmp_path.rglob("made.txt"))
    assert started == []


@pytest.mark.slow
def test_a_deadline_ends_the_fetching_of_inputs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and is mute
        port = silent.getsockname()[1]
        threading.Timer(0.8, silent.close).start()  # the thread that fetches is joined at the end
        outcome = run(
            tmp_path,
            "look_around",
            executor="rough.fetches",
            checkpoint={"load": {"type": "http", "url": f"http://127.0.0.1:{port}/model.tar"}},
            timeoutSec=0.5,
        )
    assert isinstance(outcome.error, DeadlineError)


# Services.


def test_a_service_stays_while_others_use_it_and_ends_with_the_workflow(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    seen: list[str] = []

    def look(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("user", "TASK_SUCCEEDED"):
            seen.append(marker.read_text())

    reports = run_all(
        tmp_path,
        {
            "service": {"taskType": "rough.serves", "marker": str(marker)},
            "user": {"do": "nothing"},
        },
        while_running=look,
    )
    assert all(report.ok for report in reports.values()), reports
    assert seen == ["up"]
    assert marker.read_text() == "down"


def test_a_service_that_nobody_uses_stays_until_its_time_is_over(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    started = time.monotonic()
    spec = {"taskType": "rough.serves", "marker": str(marker), "ttl_s": 1.5}
    reports = run_all(tmp_path, {"service": spec})
    assert reports["service"].ok
    assert time.monotonic() - started > 1.5
    assert marker.read_text() == "down"


def test_a_service_that_crashes_after_it_was_ready_hurts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"taskType": "rough.serves", "marker": str(tmp_path / "marker"), "crash": True}
    reports = run_all(tmp_path, {"service": spec, "user": {}})
    assert all(report.ok for report in reports.values())
    assert "exit code 9" in caplog.text


# What an executor itself had started.


def test_an_executor_whose_own_engine_died_gets_a_new_process(tmp_path: Path) -> None:
    nodes = {"a": {}, "lost": {"do": "lose_engine"}, "next": {}, "bad": {"do": "fail"}, "last": {}}
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=1)
    assert (reports["lost"].code, reports["lost"].error) == ("crash", "the engine has died")
    pids = {name: report.result["pid"] for name, report in reports.items() if report.ok}
    assert pids["next"] != pids["a"]
    assert pids["last"] == pids["next"], "any other failure leaves the process as it is"
    assert reports["next"].result["loads"] == 1


def test_neighbours_of_a_lost_engine_end_by_themselves_and_nobody_joins_them(
    tmp_path: Path,
) -> None:
    together = {"taskType": "rough.together"}
    nodes: dict[str, dict[str, Any]] = {
        "beside": {**together, "s": 1.5},
        "lost": {**together, "lose_engine": 0.3},
        "next": {**together, "s": 0.1},
    }
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=2)
    assert reports["lost"].code == "crash"
    assert reports["beside"].ok, reports["beside"].error
    assert reports["next"].result["pid"] != reports["beside"].result["pid"]


def test_a_group_whose_engine_died_gets_a_new_process_and_keeps_its_answers(
    tmp_path: Path,
) -> None:
    group = {"taskType": "rough.groups", "model": "m"}
    nodes: dict[str, dict[str, Any]] = {
        "a": group,
        "lost": {**group, "do": "lose_engine"},
        "b": group,
        "next": group,
        "last": group,
    }
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=1, group_max=3)
    assert reports["lost"].code == "crash"
    runs = {name: report.result["run"] for name, report in reports.items() if report.ok}
    assert runs == {"a": 1, "b": 1, "next": 1, "last": 1}, "a warm process would count two"
