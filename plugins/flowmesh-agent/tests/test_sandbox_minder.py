"""When the minder looks at who is there, on a machine that is played to it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import attrs
import pytest
from flowmesh_agent import jail
from jails import needs_jail

pytestmark = needs_jail


@attrs.define
class Machine:
    """Shows the minder each number of threads in turn, and does something at each of its looks."""

    threads: list[int]
    looks: list[Callable[[], str]]
    looked: int = 0

    def crowding(self) -> int:
        return self.threads.pop(0) if len(self.threads) > 1 else self.threads[0]

    def over_limit(self, _rules: jail.Rules) -> str:
        self.looked += 1
        return self.looks.pop(0)() if self.looks else "processes"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Let the minder watch a machine for two seconds; it looks by itself once an hour."""
    leash, ring = os.pipe(), os.pipe()

    def do(machine: Machine, look_s: float = 3600) -> str:
        monkeypatch.setattr(jail, "LOOK_S", look_s)
        monkeypatch.setattr(jail, "crowding", machine.crowding)
        monkeypatch.setattr(jail, "over_limit", machine.over_limit)
        monkeypatch.setattr(jail, "reap", lambda _statuses: True)
        rules = jail.Rules(processes=["64"], seconds=["2"], leash=[str(leash[0])])
        return jail.watch(1, rules, ring[0], {})

    yield do
    for fd in (*leash, *ring):
        os.close(fd)


def test_a_machine_that_grows_crowded_is_looked_at(watch: Callable[..., str]) -> None:
    assert watch(Machine(threads=[100, 100, 165], looks=[])) == "processes"


def test_a_crowd_that_stays_is_looked_at_once(watch: Callable[..., str]) -> None:
    machine = Machine(threads=[100, 165], looks=[lambda: ""])
    assert (watch(machine), machine.looked) == ("time", 1)


def test_who_comes_during_a_look_is_seen_at_the_next_glance(watch: Callable[..., str]) -> None:
    machine = Machine(threads=[100, 165], looks=[])

    def look() -> str:
        machine.threads = [700]
        return ""

    machine.looks = [look]
    assert watch(machine) == "processes"


def test_what_ends_elsewhere_hides_nobody(watch: Callable[..., str]) -> None:
    assert watch(Machine(threads=[1000, 100, 100, 165], looks=[])) == "processes"


def test_waiting_for_a_turn_is_no_time_spent_looking(watch: Callable[..., str]) -> None:
    def look() -> str:
        time.sleep(0.5)  # twenty times as long to the next look, were it spent looking
        return ""

    assert watch(Machine(threads=[100], looks=[look]), look_s=0.01) == "processes"


def test_looking_takes_a_twentieth_of_the_minders_time(watch: Callable[..., str]) -> None:
    def look() -> str:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        return ""

    slow = Machine(threads=[100], looks=[look])
    assert (watch(slow, look_s=0.01), slow.looked) == ("time", 1)
