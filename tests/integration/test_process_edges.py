"""The edges of a process's life: what is rare, late, or at the same time as something else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh_core.config import Settings, load_settings
from flowmesh_core.errors import CrashError, DeadlineError, ExecutionError
from flowmesh_core.events import TaskEvent
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.testing import TaskRun, run_task
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.worker import Worker
from flowmesh_core.workflow import PlannedTask

EDGES = Path(__file__).parents[1] / "executors" / "rough_edges.py"
GRACE_S = 0.5
LIMIT_S = 25.0
SECRET = "hunter2-hunter2"

Listen = Callable[[LocalRun, PlannedTask, TaskEvent], None]


def open_files() -> dict[str, str]:
    """Return what each of this process's descriptors is."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found[link.name] = str(link.readlink())
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    processes = {process.pid for process in psutil.Process().children(recursive=True)}
    files = open_files()
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in processes]
    assert not left
    gc.collect()
    new = {fd: what for fd, what in open_files().items() if files.get(fd) != what}
    assert not new


def run(
    tmp_path: Path, do: str, *, executor: str = "edge", grace_s: float = GRACE_S, **spec: Any
) -> TaskRun:
    settings = choose(tmp_path, cancel_grace_s=grace_s)
    return run_task(
        executor, {"do": do, **spec}, folder=tmp_path, settings=settings, plugin_files=[EDGES]
    )


def choose(tmp_path: Path, **settings: Any) -> Settings:
    defaults = {"worker_id": "local", "cancel_grace_s": GRACE_S, "drain_timeout_s": 1.0}
    return load_settings({}, results_dir=tmp_path, **{**defaults, **settings})


def run_all(
    tmp_path: Path,
    nodes: Mapping[str, Mapping[str, Any]],
    *,
    in_turn: bool = True,
    listen: Listen = lambda *_: None,
    limit_s: float = LIMIT_S,
    **settings: Any,
) -> dict[str, StageReport]:
    """Run several tasks in one worker, one after the other or all at once."""
    chosen = choose(tmp_path, **settings)
    names = list(nodes)
    graph = [
        {
            "name": name,
            "spec": {"taskType": "edge", **nodes[name]},
            "dependsOn": names[:place][-1:] if in_turn else [],
        }
        for place, name in enumerate(names)
    ]
    workflow = plan({"spec": {"taskType": "edge", "graph": {"nodes": graph}}})
    plugins = load_plugins(chosen, files=[EDGES])

    async def work() -> list[StageReport]:
        local = LocalRun(
            workflow, chosen, plugins, on_event=lambda task, event: listen(local, task, event)
        )
        return await asyncio.wait_for(local.run(), limit_s)

    return {report.name: report for report in asyncio.run(work())}


def children() -> list[int]:
    """Return the processes in which executors run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("flowmesh_core.places.child" in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def later(wait_s: float, call: Callable[[], Any]) -> None:
    asyncio.get_running_loop().call_later(wait_s, call)


def cancel_one(local: LocalRun, task: PlannedTask, wait_s: float) -> None:
    later(wait_s, lambda: local._worker.cancel(task.task_id, "changed my mind"))


# Answers that are none.


# Beside others the task hangs for ever; alone it is a crash that may be tried again.
@pytest.mark.parametrize("executor", ["edge", "edge.together"])
@pytest.mark.parametrize("do", ["artifact_text", "foreign_error", "odd", "replace_stdout"])
def test_an_answer_that_is_none_is_an_error_and_no_hang(
    executor: str, do: str, tmp_path: Path
) -> None:
    outcome = run(tmp_path, do, executor=executor, timeoutSec=4)
    if do != "replace_stdout":
        assert isinstance(outcome.error, ExecutionError), outcome.error
    else:
        assert outcome.ok, outcome.error


# The worker ends the process over a level or message that is no text.
@pytest.mark.parametrize("do", ["log_number", "log_level", "progress_object"])
def test_what_is_logged_or_reported_loosely_harms_no_task(
    do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_TOKEN", SECRET)
    settings = choose(tmp_path, env_allow=("EDGE_TOKEN",))
    outcome = run_task(
        "edge",
        {"do": do, "token": "${env.EDGE_TOKEN}"},
        folder=tmp_path,
        settings=settings,
        plugin_files=[EDGES],
    )
    assert not isinstance(outcome.error, CrashError), outcome.error
    assert outcome.ok, outcome.error


def test_an_error_that_utf8_cannot_hold_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What a test logs crosses between the test run's own processes, which takes UTF-8 alone.
    with caplog.at_level(logging.CRITICAL, logger="flowmesh_core"):
        reports = run_all(tmp_path, {"a": {"do": "surrogate"}})
    assert "cannot read caf" in reports["a"].error


def test_a_result_that_utf8_cannot_hold_is_written(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {"do": "result_surrogate"}})
    assert reports["a"].ok, reports["a"].error
    assert reports["a"].result["told"] == {"name": "caf\udce9", "nan": None, "inf": None}


def test_output_that_is_no_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    report = run_all(tmp_path, {"a": {"do": "bytes"}})["a"]
    assert report.folder is not None
    assert (report.folder / "logs" / "stdout.log").read_bytes() == b"\xff\xfe caf\xe9 \xc3"
    assert (report.folder / "logs" / "stderr.log").read_bytes() == bytes(range(256)) * 100


def test_a_list_as_result_fails_that_task_alone(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {"do": "list"}, "b": {}}, in_turn=False)
    assert not reports["a"].ok
    assert reports["b"].ok


# Every such task leaves a copy of the process.
@pytest.mark.slow
def test_a_fork_that_returns_from_run_answers_nothing_and_goes(tmp_path: Path) -> None:
    alive: list[int] = []

    def look(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("b", "TASK_STARTED"):
            threading.Timer(2.5, lambda: alive.append(len(children()))).start()

    reports = run_all(tmp_path, {"a": {"do": "fork"}, "b": {"do": "sleep", "s": 3.5}}, listen=look)
    assert reports["b"].ok
    assert alive == [1]


# The listener.


# The listener dies of an InvalidStateError, and the engine is deaf.
def test_an_engine_whose_task_gave_up_on_a_child_takes_the_next_task(tmp_path: Path) -> None:
    child = {"taskType": "edge", "do": "sleep", "s": 1.0}
    reports = run_all(
        tmp_path,
        {
            "impatient": {"taskType": "edge.together", "do": "impatient", "child": child},
            "next": {"taskType": "edge.together", "s": 0.1, "timeoutSec": 5},
        },
    )
    assert reports["impatient"].ok
    assert reports["next"].ok, reports["next"].error


def test_a_child_task_that_nobody_awaits_any_more_ends_before_its_parent(tmp_path: Path) -> None:
    child = {"taskType": "edge", "do": "tick", "marker": str(tmp_path / "marker")}
    outcome = run(tmp_path, "gives_up", executor="edge.together", child=child, timeoutSec=20)
    assert outcome.ok, outcome.error
    assert outcome.result["after"] == outcome.result["before"] > 0


# Load and start.


# A run that has not begun cannot be interrupted.
def test_cancelling_one_that_waits_for_the_load_spares_the_one_that_loads(tmp_path: Path) -> None:
    def listen(local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("second", "TASK_STARTED"):
            cancel_one(local, task, 1.0)

    reports = run_all(
        tmp_path,
        {
            "first": {"taskType": "edge.slow_load"},
            "second": {"taskType": "edge.slow_load", "s": 30},
        },
        in_turn=False,
        listen=listen,
        max_concurrent_tasks=2,
    )
    assert reports["second"].code == "cancelled"
    assert reports["first"].ok, reports["first"].error


# Whoever waited behind the first hears of exit code 0 only.
def test_every_task_of_an_engine_that_cannot_load_hears_why(tmp_path: Path) -> None:
    nodes = {name: {"taskType": "edge.no_load"} for name in "ab"}
    reports = run_all(tmp_path, nodes, in_turn=False, max_concurrent_tasks=2)
    for report in reports.values():
        assert "no such weights" in report.error


# The wish is lost when nobody talks about the task yet.
def test_a_task_that_is_cancelled_while_its_process_starts_never_begins(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def listen(local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_STARTED":
            cancel_one(local, task, 0.001)

    spec = {"do": "begin", "marker": str(marker)}
    started = time.monotonic()
    reports = run_all(tmp_path, {"a": spec}, listen=listen, cancel_grace_s=4)
    assert reports["a"].code == "cancelled"
    assert not marker.exists(), marker.read_text()
    assert time.monotonic() - started < 3.5


def test_a_task_whose_time_is_over_before_its_process_is_there_never_begins(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    outcome = run(tmp_path, "begin", marker=str(marker), timeoutSec=0.02, grace_s=3)
    assert isinstance(outcome.error, DeadlineError)
    assert not marker.exists(), marker.read_text()


def test_no_grace_still_means_that_all_has_ended(tmp_path: Path) -> None:
    left: list[list[int]] = []

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_FAILED":
            left.append(children())

    reports = run_all(
        tmp_path, {"a": {"do": "sleep", "timeoutSec": 1.5}}, listen=listen, cancel_grace_s=0
    )
    assert reports["a"].code == "deadline"
    assert left == [[]]


# A descriptor and a folder for each.
def test_starts_that_fail_leave_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    before = len(open_files())
    reports = run_all(tmp_path, {f"t{n}": {"model": n} for n in range(10)}, in_turn=False)
    assert not any(report.ok for report in reports.values())
    assert len(open_files()) <= before
    assert not list(tmp_path.glob(".workers/local/engines/*"))


def test_a_group_whose_process_cannot_start_hears_why_and_nothing_is_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    nodes = {name: {"taskType": "edge.groups"} for name in "ab"}
    reports = run_all(tmp_path, nodes, in_turn=False)
    assert ["no-python" in report.error for report in reports.values()] == [True, True]
    futures = [found for found in gc.get_objects() if isinstance(found, asyncio.Future)]
    assert not [found for found in futures if found.done() and found._log_traceback]


def test_an_engine_that_was_taken_while_others_end_for_memory_is_spared(tmp_path: Path) -> None:
    def node(name: str, *after: str, **spec: Any) -> dict[str, Any]:
        return {"name": name, "dependsOn": after, "spec": {"taskType": "edge.slow_end", **spec}}

    nodes = [
        node("p", model="p"),
        node("q", "p", model="q"),
        node("short", "q", taskType="edge", do="oom"),  # p is unloaded for a second, then q
        node("tick", "q", taskType="edge", do="sleep", s=0.7, model="t"),
        node("again", "tick", model="q", s=2.5),
    ]
    chosen = choose(tmp_path, max_concurrent_tasks=2)
    workflow = plan({"spec": {"taskType": "edge", "graph": {"nodes": nodes}}})

    async def work() -> list[StageReport]:
        local = LocalRun(workflow, chosen, load_plugins(chosen, files=[EDGES]))
        return await asyncio.wait_for(local.run(), LIMIT_S)

    reports = {report.name: report for report in asyncio.run(work())}
    assert reports["short"].code == "crash.out_of_memory"
    assert reports["again"].ok, reports["again"].error
    assert reports["again"].result["pid"] == reports["q"].result["pid"]


# Children of tasks.


# Nobody ends it, and close waits ten seconds for its process.
@pytest.mark.slow
def test_a_child_task_ends_with_the_task_that_started_it(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    seen: list[int] = []

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("a", "TASK_SUCCEEDED"):
            later(0.7, lambda: seen.append(marker.stat().st_size))
            later(1.4, lambda: seen.append(marker.stat().st_size))

    child = {"taskType": "edge", "do": "tick", "marker": str(marker)}
    reports = run_all(
        tmp_path,
        {"a": {"do": "leave_child", "child": child}, "b": {"do": "sleep", "s": 2}},
        listen=listen,
    )
    assert reports["b"].ok
    assert seen[0] == seen[1]


@pytest.mark.slow
def test_an_inline_task_that_gives_up_on_a_child_ends_it(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    child = {"taskType": "edge", "do": "tick", "marker": str(marker)}
    seen: list[int] = []

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("a", "TASK_SUCCEEDED"):
            later(0.7, lambda: seen.append(marker.stat().st_size))
            later(1.4, lambda: seen.append(marker.stat().st_size))

    reports = run_all(
        tmp_path,
        {"a": {"taskType": "edge.inline_together", "child": child}, "b": {"do": "sleep", "s": 2}},
        listen=listen,
    )
    assert reports["a"].ok
    assert seen[0] == seen[1]


# The lease gives back a grant that is its parent's.
@pytest.mark.slow
def test_the_end_of_a_child_service_does_not_free_its_parents_slot(tmp_path: Path) -> None:
    started: dict[str, float] = {}

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_STARTED":
            started[task.name] = time.monotonic()

    child = {"taskType": "edge.serves", "ttl_s": 0.2}
    reports = run_all(
        tmp_path,
        {"a": {"do": "child", "child": child, "s": 3}, "b": {}},
        in_turn=False,
        listen=listen,
        max_concurrent_tasks=1,
    )
    assert all(report.ok for report in reports.values()), reports
    assert started["b"] - started["a"] > 2.5


# Secrets.


def secret_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> tuple[dict[str, StageReport], str]:
    """Run tasks that may name a secret; return the reports, and all that is on disk."""
    monkeypatch.setenv("EDGE_TOKEN", SECRET)
    reports = run_all(tmp_path, nodes, env_allow=("EDGE_TOKEN",), **more)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    return reports, "".join(path.read_text(errors="replace") for path in files)


# What the engine printed last, for whomever it was.
def test_a_secret_that_one_task_printed_is_not_in_anothers_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, _ = secret_run(
        tmp_path,
        monkeypatch,
        {"a": {"do": "say", "text": "error: bad token ${env.EDGE_TOKEN}"}, "b": {"do": "exit"}},
    )
    assert reports["b"].code == "crash"
    assert "hunter2" not in reports["b"].error
    assert "bad token" not in reports["b"].error


# A line is cut first and masked afterwards.
def test_a_secret_that_is_cut_off_in_a_crash_is_masked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, _ = secret_run(
        tmp_path, monkeypatch, {"a": {"do": "long_line", "text": "${env.EDGE_TOKEN}"}}
    )
    assert reports["a"].code == "crash"
    assert "xhunt" not in reports["a"].error


# The child's document holds the value, so its run knows of no secret.
def test_a_secret_that_a_child_task_prints_is_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = {"taskType": "edge", "do": "say", "text": "token ${env.EDGE_TOKEN}"}
    _, disk = secret_run(tmp_path, monkeypatch, {"a": {"do": "child", "child": child}})
    assert "hunter2" not in disk


# The engine's log has no mask.
def test_a_secret_of_tasks_that_run_at_once_is_masked_in_the_engines_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: dict[str, Any] = {"taskType": "edge.together", "do": "sleep", "s": 2}
    nodes: dict[str, dict[str, Any]] = {
        "a": one,
        "b": {"taskType": "edge.together", "do": "say", "text": "token ${env.EDGE_TOKEN}"},
        "c": {**one, "s": 1},
        "d": {"taskType": "edge.together", "do": "exit"},
    }
    _, disk = secret_run(tmp_path, monkeypatch, nodes, in_turn=False, max_concurrent_tasks=4)
    assert "hunter2" not in disk


# Services.


# It is an outcome by then and no exception.
def test_a_service_that_fails_after_it_was_ready_is_an_error_in_the_workers_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_all(tmp_path, {"a": {"taskType": "edge.serves", "then": "fail"}})
    assert "the service broke" in caplog.text


def test_a_service_may_start_tasks_after_it_was_ready(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    service = {"taskType": "edge.serves", "then": "child", "marker": str(marker)}
    run_all(tmp_path, {"a": service, "b": {"do": "sleep", "s": 1.5}})
    assert marker.read_text() == "answered"
    assert not list(tmp_path.glob(".*attempt*"))


# Settings.


# The context of `load` is made before the settings are read.
def test_a_child_reads_the_settings_that_the_worker_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_EDGE_SETTINGS_LEVEL", "high")
    outcome = run(tmp_path, "", executor="edge.settings")
    assert outcome.ok, outcome.error
    assert (outcome.result["load"], outcome.result["run"]) == ("high", "high")


# Inline.


# Abandoned threads fill the loop's pool, and the worker cannot even write a result.
def test_threads_that_never_end_leave_room_for_other_tasks(tmp_path: Path) -> None:
    stuck = {"taskType": "edge.inline", "do": "stuck", "timeoutSec": 0.2}
    started = time.monotonic()
    ended: list[float] = []

    def let_go() -> None:
        sys.modules["flowmesh_plugin_rough_edges"].GATE.set()

    opening = threading.Timer(6, let_go)

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("last", "TASK_SUCCEEDED"):
            ended.append(time.monotonic() - started)
            let_go()

    opening.start()
    run_all(
        tmp_path,
        {**{f"t{n}": stuck for n in range(40)}, "last": {"taskType": "echo"}},
        in_turn=False,
        max_concurrent_tasks=10,
        cancel_grace_s=0.05,
        listen=listen,
    )
    opening.cancel()
    assert ended[0] < 5


# Neither gets an outcome.
@pytest.mark.parametrize("do", ["stop_iteration", "odd"])
def test_whatever_an_inline_executor_raises_is_a_failed_task(do: str, tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {"taskType": "edge.inline", "do": do}}, limit_s=4)
    assert reports["a"].code == "executor.failed"


# It ends the worker.
def test_a_keyboard_interrupt_of_an_inline_executor_is_a_failed_task(tmp_path: Path) -> None:
    document = tmp_path / "document.json"
    document.write_text(json.dumps({"spec": {"taskType": "edge.inline", "do": "interrupt"}}))
    command = [sys.executable, "-m", "flowmesh_core", "run", str(document)]
    options = ["--plugin", str(EDGES), "--out", str(tmp_path)]
    ended = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=30, check=False
    )
    assert "KeyboardInterrupt" in ended.stderr
    assert ended.returncode == 1


# Floods.


@pytest.mark.parametrize(
    "do",
    [
        *("flood_log", "garbage", "close_control"),
        pytest.param("flood_progress", marks=pytest.mark.slow),
        pytest.param("flood_output", marks=pytest.mark.slow),
    ],
)
def test_a_flood_is_cancelled_like_any_task(do: str, tmp_path: Path) -> None:
    asked: list[float] = []

    def listen(local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("a", "TASK_STARTED"):
            asked.append(time.monotonic())
            cancel_one(local, task, 2.0)

    reports = run_all(
        tmp_path, {"a": {"do": do}, "b": {}}, in_turn=False, listen=listen, task_log_max_bytes=10**7
    )
    assert reports["a"].code in ("cancelled", "crash")
    assert reports["b"].ok
    assert time.monotonic() - asked[0] < 12


# Several workers.


# The first one to end removes the folder in which the other works.
@pytest.mark.slow
def test_two_runs_at_once_with_the_same_results_do_not_share_a_working_folder(
    tmp_path: Path,
) -> None:
    chosen = choose(tmp_path)
    plugins = load_plugins(chosen, files=[EDGES])

    async def one(s: float) -> list[StageReport]:
        workflow = plan({"spec": {"taskType": "edge", "do": "cwd", "s": s}})
        return await LocalRun(workflow, chosen, plugins).run()

    async def both() -> tuple[list[StageReport], list[StageReport]]:
        return await asyncio.gather(one(0.2), one(3))

    (first,), (second,) = asyncio.run(both())
    assert first.ok
    assert second.ok, second.error
    assert first.result["told"] != second.result["told"]


def test_results_may_lie_in_a_relative_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reports = run_all(Path("results"), {"a": {"do": "chdir"}, "b": {"do": "cwd"}})
    assert reports["a"].ok, reports["a"].error


@pytest.mark.parametrize(
    ("warm_max", "warm_idle_s"),
    [(0, 600.0), (4, 0.0), pytest.param(0, 0.0, marks=pytest.mark.slow)],
)
def test_nothing_is_kept_warm_when_the_operator_says_so(
    warm_max: int, warm_idle_s: float, tmp_path: Path
) -> None:
    seen: list[list[int]] = []

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("b", "TASK_STARTED"):
            later(1.0, lambda: seen.append(children()))

    reports = run_all(
        tmp_path,
        {"a": {}, "b": {"do": "sleep", "s": 2, "model": "y"}},
        listen=listen,
        warm_max=warm_max,
        warm_idle_s=warm_idle_s,
    )
    assert reports["b"].ok
    assert [len(pids) for pids in seen] == [1]


# An engine that is of no use any more while others still run in it.


# An engine that was forgotten is told nothing.
def test_a_neighbour_of_one_that_ran_out_of_memory_is_still_told_to_stop(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def listen(local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if (task.name, event.type) == ("next", "TASK_SUCCEEDED"):
            good = next(t for t in local.workflow.tasks if t.name == "good")
            cancel_one(local, good, 0.1)

    nodes: dict[str, dict[str, Any]] = {
        "good": {"taskType": "edge.together", "do": "polite", "marker": str(marker)},
        "bad": {"taskType": "edge.together", "do": "oom"},
        "next": {"taskType": "edge.together", "s": 1.5},
    }
    reports = run_all(tmp_path, nodes, in_turn=False, listen=listen, max_concurrent_tasks=2)
    assert reports["good"].code == "cancelled"
    assert marker.exists()


# Cancel between the moments.


# A task between submit and receive is not here yet.
def test_a_cancel_reaches_a_task_that_was_just_submitted(tmp_path: Path) -> None:
    for turns in range(1, 9):

        def hop(local: LocalRun, left: int) -> None:
            if left:
                asyncio.get_running_loop().call_soon(hop, local, left - 1)
            else:
                local.cancel()

        def listen(
            local: LocalRun, task: PlannedTask, event: TaskEvent, turns: int = turns
        ) -> None:
            if (task.name, event.type) == ("a", "TASK_SUCCEEDED"):
                hop(local, turns)

        started = time.monotonic()
        reports = run_all(
            tmp_path / str(turns),
            {"a": {"taskType": "echo"}, "b": {"do": "sleep", "s": 3}},
            listen=listen,
        )
        assert not reports["b"].ok, turns
        assert time.monotonic() - started < 2.9, turns


# Each look at `KeptProcess.ended` leaves a future behind.
def test_a_warm_engine_holds_no_more_after_many_tasks_than_after_few(tmp_path: Path) -> None:
    counts: list[int] = []

    def listen(_local: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_SUCCEEDED" and task.name in ("t20", "t119"):
            gc.collect()
            counts.append(sum(isinstance(o, asyncio.Future) for o in gc.get_objects()))

    reports = run_all(tmp_path, {f"t{n}": {} for n in range(120)}, listen=listen, limit_s=100)
    assert all(report.ok for report in reports.values())
    assert counts[1] - counts[0] < 50, counts


def work_with(
    tmp_path: Path, drive: Callable[[Worker, LocalTransport], Awaitable[None]]
) -> list[TaskEvent]:
    """Run a worker under a driver that ends it; return what was said of tasks."""
    chosen = choose(tmp_path, drain_timeout_s=0.0)
    transport = LocalTransport(chosen)
    worker = Worker(chosen, transport=transport, plugins=load_plugins(chosen, files=[EDGES]))
    said: list[TaskEvent] = []
    transport.listen(lambda event: said.append(event) if isinstance(event, TaskEvent) else None)

    async def work() -> None:
        working = asyncio.ensure_future(worker.run())
        await asyncio.sleep(0.3)
        await drive(worker, transport)
        worker.stop()
        worker.stop()
        await asyncio.wait_for(working, LIMIT_S)

    asyncio.run(work())
    return said


def message(task_id: str, spec: Mapping[str, Any], *members: Mapping[str, Any]) -> bytes:
    children = [{"task_id": f"{task_id}-{n}", "spec": spec} for n, spec in enumerate(members)]
    return json.dumps(
        {
            "task_id": task_id,
            "task": {"spec": spec},
            "assigned_worker": "local",
            "merged_children": children,
        }
    ).encode()


# Only leaders are cancelled, and each member still begins.
def test_a_worker_that_must_hurry_starts_no_further_member(tmp_path: Path) -> None:
    asked: list[float] = []
    slow = {"taskType": "edge", "do": "sleep", "s": 3}

    async def drive(_worker: Worker, transport: LocalTransport) -> None:
        transport.submit(message("a", {"taskType": "edge"}, slow, {**slow, "n": 1}))
        await asyncio.sleep(1.5)
        asked.append(time.monotonic())

    work_with(tmp_path, drive)
    assert time.monotonic() - asked[0] < 2.5


# The second lease takes the first one's place.
@pytest.mark.slow
def test_a_service_that_is_dispatched_again_while_it_is_up_can_still_be_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = {"taskType": "edge.serves"}

    async def drive(worker: Worker, transport: LocalTransport) -> None:
        transport.submit(message("a", service))
        await asyncio.sleep(1.5)
        transport.submit(message("a", service, {"taskType": "echo"}))
        await asyncio.sleep(1.5)
        worker.cancel("a")
        await asyncio.sleep(1.5)
        assert not worker.services

    work_with(tmp_path, drive)
    assert "KeyError" not in caplog.text


# The reason goes to the worker's log as it is.
def test_a_secret_in_the_end_of_a_service_is_masked_in_the_workers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"taskType": "edge.serves", "then": "crash", "text": "error: ${env.EDGE_TOKEN}"}
    secret_run(tmp_path, monkeypatch, {"a": spec})
    assert "exit code 9" in caplog.text
    assert SECRET not in caplog.text


# Output is turned away from the task although it runs on.
def test_ready_means_nothing_for_an_executor_that_is_no_service(tmp_path: Path) -> None:
    outcome = run(tmp_path, "ready")
    assert outcome.ok, outcome.error
    assert (outcome.folder / "logs" / "stdout.log").read_text() == "said after ready\n"
