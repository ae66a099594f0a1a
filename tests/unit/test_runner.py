"""One task in the runner: failures become outcomes, limits hold, secrets stay secret."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import (
    Capability,
    ExecutionError,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    load_settings,
)
from flowmesh_core.errors import CancelledError, DeadlineError
from flowmesh_core.testing import run_task


class Raises(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        error: BaseException = {
            "value": ValueError("no"),
            "os": ConnectionResetError("gone"),
            "memory": MemoryError("full"),
            "ours": ExecutionError("mine", retriable=True),
            "exit": SystemExit(3),
            "cancelled": asyncio.CancelledError(),
        }[ctx.raw_spec["kind"]]
        raise error


class Sleeps(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        if ctx.raw_spec.get("stubborn"):
            await asyncio.sleep(60)
        for _ in range(600):
            ctx.check()
            await asyncio.sleep(0.02)
        return {}


class PlainSleeps(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        while not ctx.cancelled:
            time.sleep(0.01)
        ctx.check()
        return {}


@pytest.mark.parametrize(
    ("kind", "says", "retriable"),
    [
        ("value", "ValueError: no", False),
        ("os", "ConnectionResetError: gone", True),
        ("memory", "MemoryError: full", True),
        ("ours", "mine", True),
        ("cancelled", "cancelled itself", False),
        ("exit", "tried to end the process", False),
    ],
)
def test_whatever_an_executor_raises_is_an_outcome(
    kind: str, says: str, retriable: bool, tmp_path: Path
) -> None:
    error = run_task(Raises, {"kind": kind}, folder=tmp_path).error
    assert error is not None
    assert says in str(error)
    assert error.retriable is retriable
    assert error.code == "executor.failed"


def test_the_traceback_of_an_unexpected_error_is_in_the_tasks_log(tmp_path: Path) -> None:
    run = run_task(Raises, {"kind": "value"}, folder=tmp_path)
    assert "in run" in (run.folder / "logs" / "task.log").read_text()


@pytest.mark.parametrize("executor", [Sleeps, PlainSleeps])
def test_a_deadline_ends_a_task(executor: type[Executor], tmp_path: Path) -> None:
    started = time.monotonic()
    run = run_task(executor, {"timeoutSec": 0.2}, folder=tmp_path)
    assert isinstance(run.error, DeadlineError)
    assert time.monotonic() - started < 8


def test_a_coroutine_that_ignores_its_deadline_is_cancelled(tmp_path: Path) -> None:
    settings = load_settings({}, results_dir=tmp_path, cancel_grace_s=0.2)
    spec = {"timeoutSec": 0.1, "stubborn": True}
    run = run_task(Sleeps, spec, folder=tmp_path, settings=settings)
    assert isinstance(run.error, DeadlineError)


def test_the_operators_limit_holds_when_it_is_the_shorter(tmp_path: Path) -> None:
    settings = load_settings({"TASK_TIMEOUT": "0.2"}, results_dir=tmp_path)
    run = run_task(Sleeps, {"timeoutSec": 600}, folder=tmp_path, settings=settings)
    assert isinstance(run.error, DeadlineError)


class Leaks(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        secret = ctx.spec["password"]
        ctx.progress(0.5, f"using {secret}")
        ctx.log(f"using {secret}")
        if ctx.raw_spec.get("fail"):
            raise ExecutionError(f"cannot use {secret}")
        return {"ok": True, "used": [secret, {secret: f"<{secret}>"}]}


@pytest.mark.parametrize("fail", [False, True])
def test_a_secret_is_masked_wherever_it_comes_out(
    fail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "s3cr3t-value")
    settings = load_settings({}, results_dir=tmp_path, env_allow=("SERVICE_PASSWORD",))
    spec = {"password": "${env.SERVICE_PASSWORD}", "fail": fail}
    run = run_task(Leaks, spec, folder=tmp_path, settings=settings)
    log = (run.folder / "logs" / "task.log").read_text()
    seen = f"{run.result} {run.error} {run.progress} {log}"
    assert "s3cr3t-value" not in seen
    assert "${env.SERVICE_PASSWORD}" in log


class Scalar:
    def item(self) -> float:
        return 0.25


class ReportsOddly(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        ctx.progress(0.5, loss=Scalar(), where=Path("x"), steps=[1, 2])
        return {}


def test_progress_takes_scalars_of_other_libraries_and_texts_for_the_rest(tmp_path: Path) -> None:
    (said,) = run_task(ReportsOddly, {}, folder=tmp_path).progress
    assert said == {"fraction": 0.5, "message": "", "loss": 0.25, "where": "x", "steps": [1, 2]}


class Parent(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        outcome = await ctx.run_task({"taskType": "echo", "message": "child"})
        return {"child": outcome.result}


class PlainParent(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        return {"child": ctx.run_task({"taskType": "echo", "message": "child"}).result(10).result}


class OwnParent(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        outcome = await ctx.run_task({"taskType": "test", "executor": "test.OwnParent"})
        return {"child": outcome.ok}


@pytest.mark.parametrize("executor", [Parent, PlainParent])
def test_an_executor_runs_a_child_task(executor: type[Executor], tmp_path: Path) -> None:
    run = run_task(executor, {}, folder=tmp_path)
    assert run.result["child"]["echo"]["message"] == "child"


def test_an_executor_that_would_wait_for_itself_is_told_so(tmp_path: Path) -> None:
    error = run_task(OwnParent, {}, folder=tmp_path).error
    assert "would wait for itself" in str(error)


class Service(Executor):
    async def run(self, ctx: RunContext) -> Outcome:
        ctx.ready({"ok": True, "url": "http://127.0.0.1:1"})
        await asyncio.sleep(60)
        return Outcome()


def test_a_service_has_succeeded_as_soon_as_it_is_ready(tmp_path: Path) -> None:
    info = ExecutorInfo(
        name="test.service",
        task_types={"serve"},
        target="x:y",
        places=["inline"],
        capabilities={Capability.CPU, Capability.SERVICE},
    )
    started = time.monotonic()
    run = run_task(Service, {}, info=info, folder=tmp_path)
    assert run.result["url"] == "http://127.0.0.1:1"
    assert time.monotonic() - started < 8


class Reads(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        rows = [row.prompt for row in ctx.inputs.rows or ()]
        return {
            "rows": rows,
            "attempt": ctx.attempt,
            "previous": str(ctx.previous),
            "final": str(ctx.final_folder),
        }


def test_declared_inputs_are_gathered_and_others_are_not(tmp_path: Path) -> None:
    spec = {"data": {"type": "list", "items": ["a", "b"]}}
    info = ExecutorInfo(name="test.reads", task_types={"reads"}, target="x:y", inputs={"rows"})
    assert run_task(Reads, spec, info=info, folder=tmp_path).result["rows"] == ["a", "b"]
    assert run_task(Reads, spec, folder=tmp_path, task_id="bare").result["rows"] == []


def test_a_second_attempt_sees_what_the_first_one_left(tmp_path: Path) -> None:
    first = run_task(Raises, {"kind": "value"}, folder=tmp_path, task_id="same")
    second = run_task(Reads, {}, folder=tmp_path, task_id="same")
    assert second.result["attempt"] == 2
    assert second.result["previous"] == str(first.folder)
    assert second.result["final"] == str(tmp_path / "same")


class Wrong(Executor):
    def run(self, ctx: RunContext) -> Any:
        return [1, 2]


def test_an_answer_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    error = run_task(Wrong, {}, folder=tmp_path).error
    assert "must return a mapping or an Outcome, got list" in str(error)


def test_cancelled_is_an_error_of_its_own() -> None:
    assert CancelledError("x").code == "cancelled"
