from __future__ import annotations

import asyncio

import pytest

from flowmesh_core.stores.pace import Pace


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        wakes_at = self.now + seconds
        await asyncio.sleep(0)  # others run meanwhile
        self.now = max(self.now, wakes_at)


def pace(clock: Clock, bytes_per_s: float | None) -> Pace:
    return Pace(bytes_per_s, clock=clock, sleep=clock.sleep)


def test_every_byte_takes_its_time() -> None:
    clock = Clock()

    async def work() -> None:
        paced = pace(clock, 1000)
        for _ in range(10):
            await paced.wait(500)

    asyncio.run(work())
    assert clock.now == pytest.approx(105)


def test_a_pause_is_no_credit() -> None:
    clock = Clock()

    async def work() -> None:
        paced = pace(clock, 1000)
        await paced.wait(1000)
        clock.now += 60
        await paced.wait(1000)

    asyncio.run(work())
    assert clock.now == pytest.approx(162)


def test_transfers_at_once_share_the_link() -> None:
    clock = Clock()
    ended: list[float] = []

    async def transfer(paced: Pace) -> None:
        for _ in range(5):
            await paced.wait(100)
        ended.append(clock.now)

    async def work() -> None:
        paced = pace(clock, 1000)
        await asyncio.gather(*(transfer(paced) for _ in range(4)))

    asyncio.run(work())
    assert max(ended) == pytest.approx(102)


def test_without_a_bandwidth_nothing_waits() -> None:
    clock = Clock()
    asyncio.run(pace(clock, None).wait(1 << 40))
    assert clock.now == 100
    assert pace(clock, None).slice_bytes(1 << 18) == 1 << 18


@pytest.mark.parametrize(("bytes_per_s", "slice_bytes"), [(0.5, 1), (1000, 250), (1e9, 1 << 18)])
def test_a_slow_link_gets_small_slices(bytes_per_s: float, slice_bytes: int) -> None:
    assert pace(Clock(), bytes_per_s).slice_bytes(1 << 18) == slice_bytes
