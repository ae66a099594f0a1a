"""Dispatches that could share a run find each other, and give back all that they held."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import CancelledError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.reservations import Reservation, Reservations, Stop
from flowmesh_core.resources import ResourceLedger

INFO = ExecutorInfo(
    name="a", task_types={"t"}, target="a:B", capabilities={"cpu", "group"}, group_key=["model"]
)


def task(number: int, model: str = "m") -> Task:
    return parse_task({"spec": {"taskType": "t", "model": model}}, task_id=f"t{number}")


class Bench:
    """Holds reservations of one ledger, and knows when each came."""

    def __init__(self, slots: int, **options: Any) -> None:
        self.ledger = ResourceLedger(slots, 4, 1 << 30, ())
        self.reservations = Reservations(self.ledger, **{"window_s": 0.0, "most": 8, **options})
        self.free = [Stop() for _ in range(8)]
        self.seen: list[Reservation] = []

    async def hold(self, member: Task, stop: Stop | None = None, s: float = 0.05) -> None:
        async with self.reservations.hold(member, INFO, stop or Stop(), size=1) as held:
            self.seen.append(held)
            await asyncio.sleep(s)

    @property
    def batches(self) -> int:
        return len({id(held.seats.batch) for held in self.seen if held.seats})

    async def check_all_is_free(self, slots: int) -> None:
        """Take every slot at once."""
        every = [asyncio.ensure_future(self.hold(task(90 + n, f"m{n}"))) for n in range(slots)]
        await asyncio.wait_for(asyncio.gather(*every), 2)
        assert not self.reservations.full


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("window_s", [0.0, 0.05])
def test_equals_that_come_at_once_are_one_batch_however_many_slots_are_free(
    slots: int, window_s: float
) -> None:
    async def work() -> None:
        bench = Bench(slots, window_s=window_s)
        await asyncio.wait_for(asyncio.gather(*(bench.hold(task(n)) for n in range(4))), 2)
        assert len(bench.seen) == 4
        assert bench.batches == 1
        await bench.check_all_is_free(slots)

    asyncio.run(work())


def test_what_does_not_agree_has_a_slot_of_its_own() -> None:
    async def work() -> None:
        bench = Bench(2)
        both = (bench.hold(task(1, "m")), bench.hold(task(2, "n")))
        await asyncio.wait_for(asyncio.gather(*both), 2)
        assert bench.batches == 2
        await bench.check_all_is_free(2)

    asyncio.run(work())


def test_more_than_a_batch_takes_are_two_batches() -> None:
    async def work() -> None:
        bench = Bench(2, most=2)
        await asyncio.wait_for(asyncio.gather(*(bench.hold(task(n)) for n in range(4))), 2)
        assert bench.batches == 2
        await bench.check_all_is_free(2)

    asyncio.run(work())


def test_one_that_is_stopped_while_it_waits_holds_nothing() -> None:
    async def work() -> None:
        bench, stop = Bench(1), Stop()
        first = asyncio.ensure_future(bench.hold(task(1, "other"), s=0.2))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(bench.hold(task(2), stop))
        await asyncio.sleep(0.05)
        stop.ask("not needed", retriable=False)
        with pytest.raises(CancelledError, match="not needed"):
            await second
        await first
        await bench.check_all_is_free(1)

    asyncio.run(work())


@pytest.mark.parametrize("slots", [1, 2])
def test_one_that_is_given_up_in_the_window_holds_nothing(slots: int) -> None:
    async def work() -> None:
        bench = Bench(slots, window_s=0.2)
        both = [asyncio.ensure_future(bench.hold(task(n), s=0.3)) for n in range(2)]
        await asyncio.sleep(0.1)
        both[1].cancel()
        await asyncio.wait(both)
        assert both[1].cancelled()
        await bench.check_all_is_free(slots)

    asyncio.run(work())
