from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.errors import DeadlineError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, RunContext
from flowmesh_core.stores.pace import Pace
from flowmesh_core.testing import ManualClock, run_task


def test_time_passes_only_when_the_test_says_so(flowmesh_clock: ManualClock) -> None:
    assert flowmesh_clock() == 0.0
    time.sleep(0.01)
    assert flowmesh_clock() == 0.0
    flowmesh_clock.advance(1.5)
    flowmesh_clock.advance(0.5)
    assert flowmesh_clock() == 2.0


def test_it_cannot_run_backwards() -> None:
    clock = ManualClock(10.0)
    with pytest.raises(ValueError, match=r"cannot run backwards, got -1 s"):
        clock.advance(-1)
    assert clock() == 10.0


def test_a_deadline_comes_when_the_clock_is_moved_past_it(flowmesh_clock: ManualClock) -> None:
    ctx = RunContext(
        task_id="t1",
        task_type="x",
        spec={},
        raw_spec={},
        folder=Path("unused"),
        deadline=60.0,
        clock=flowmesh_clock,
    )
    flowmesh_clock.advance(59.0)
    ctx.check()
    assert ctx.remaining_s == 1.0
    flowmesh_clock.advance(2.0)
    with pytest.raises(DeadlineError, match="task t1 reached its deadline"):
        ctx.check()


def test_what_takes_a_clock_and_a_sleep_can_be_driven_by_it(flowmesh_clock: ManualClock) -> None:
    async def sleep(seconds: float) -> None:
        flowmesh_clock.advance(max(0.0, seconds))

    pace = Pace(100.0, clock=flowmesh_clock, sleep=sleep)
    asyncio.run(pace.wait(1000))
    asyncio.run(pace.wait(500))
    assert flowmesh_clock() == 15.0


class Steps(Executor):
    """Three steps of so many seconds each, by the clock of the test."""

    def run(self, ctx: RunContext) -> Any:
        assert isinstance(ctx.clock, ManualClock)
        for step in range(3):
            if ctx.raw_spec["careful"]:
                ctx.check()
            ctx.clock.advance(ctx.raw_spec["step_s"])
            ctx.progress(step=step + 1)
        return {"left_s": ctx.remaining_s}


@pytest.mark.parametrize(
    ("step_s", "careful", "code", "steps"),
    [(10, True, "", 3), (40, True, "deadline", 2), (40, False, "deadline", 3)],
)
def test_a_task_has_the_time_that_the_clock_says(
    step_s: int, careful: bool, code: str, steps: int, flowmesh_clock: ManualClock, tmp_path: Path
) -> None:
    spec = {"step_s": step_s, "careful": careful, "timeoutSec": 60}
    run = run_task(Steps, spec, folder=tmp_path, clock=flowmesh_clock)
    assert (run.error.code if run.error else "") == code
    assert [report["step"] for report in run.progress] == [*range(1, steps + 1)]
    assert flowmesh_clock() == step_s * steps
    if run.ok:
        assert run.result == {"left_s": 30.0}


class Waits(Executor):
    """Moves the clock of the test, and does nothing but wait to be told that it must end."""

    def run(self, ctx: RunContext) -> Any:
        assert isinstance(ctx.clock, ManualClock)
        ctx.clock.advance(ctx.raw_spec["passed_s"])
        until = time.monotonic() + ctx.raw_spec["real_s"]
        while not ctx.cancelled and time.monotonic() < until:
            time.sleep(0.001)
        return {"told": ctx.cancelled}


def test_an_executor_is_stopped_when_the_clock_is_moved_past_its_time(
    flowmesh_clock: ManualClock, tmp_path: Path
) -> None:
    spec = {"passed_s": 3601, "real_s": 30, "timeoutSec": 3600}
    started = time.monotonic()
    run = run_task(Waits, spec, folder=tmp_path, clock=flowmesh_clock)
    assert time.monotonic() - started < 10
    assert isinstance(run.error, DeadlineError), run.error
    assert str(run.error) == "task task did not end before its deadline"


def test_no_time_passes_that_the_clock_does_not_say(
    flowmesh_clock: ManualClock, tmp_path: Path
) -> None:
    spec = {"passed_s": 0.045, "real_s": 0.3, "timeoutSec": 0.05}
    run = run_task(Waits, spec, folder=tmp_path, clock=flowmesh_clock)
    assert run.result == {"told": False}, run.error


class Asks(Executor):
    """Starts a task that waits, for less time than it has itself."""

    async def run(self, ctx: RunContext) -> Any:
        assert isinstance(ctx.clock, ManualClock)
        if "of" not in ctx.raw_spec:
            child = {"taskType": "acme.asks", "of": ctx.task_id, "timeoutSec": 60}
            outcome = await ctx.run_task(child)
            return {"child": outcome.error and outcome.error.code, "left_s": ctx.remaining_s}
        ctx.clock.advance(61)
        for _ in range(3000):
            if ctx.cancelled:
                break
            await asyncio.sleep(0.01)
        return {}


def test_the_time_of_a_child_task_passes_by_the_same_clock(
    flowmesh_clock: ManualClock, tmp_path: Path
) -> None:
    info = ExecutorInfo(
        name="acme.asks",
        task_types="acme.asks",
        target="acme:Asks",
        capabilities={Capability.CPU, Capability.CONCURRENT},
    )
    spec = {"timeoutSec": 100}
    run = run_task(Asks, spec, info=info, folder=tmp_path, clock=flowmesh_clock)
    assert run.result == {"child": "deadline", "left_s": 39.0}, run.error
