from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from flowmesh_core.errors import DeadlineError
from flowmesh_core.executor import RunContext
from flowmesh_core.stores.pace import Pace
from flowmesh_core.testing import ManualClock


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
