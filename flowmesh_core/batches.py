"""Tasks that run together: collect their jobs, then run those that agree as one group each.

A batch never waits for a member that will not come, and not long for one that is late: what has
arrived runs, and what comes later runs after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.executor import Outcome
from flowmesh_core.places.base import Job, Place
from flowmesh_core.task_progress import METRICS_NAME

__all__ = ["Batch", "Guest", "Lobby", "Seats", "copy_files", "holds_files"]

# How long those that have arrived wait for the others.
_PATIENCE_S = 2.0
# What belongs to one member alone and is not copied to another.
_OWN_FILES = ("logs", METRICS_NAME, ".inputs")


@attrs.define(eq=False)
class _Entry:
    """One member: its job, what it has in common with others, and its outcome to come."""

    place: Place
    job: Job
    group: str
    work: str | None
    outcome: asyncio.Future[Outcome]
    run: asyncio.Task[Outcome] | None = None
    same: list[_Entry] = attrs.field(factory=list)


class Seats:
    """The seats of one dispatch in a batch; those that it has not used are given up at the end."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch = batch
        self._left = count

    def use(self) -> None:
        """Take one: its member submits a job."""
        self._left -= 1

    def give_up(self) -> None:
        """Take one back: its member will not come."""
        self._left -= 1
        self.batch.expect_less(1)

    def close(self) -> None:
        """Give up what is left; may come twice."""
        left, self._left = self._left, 0
        self.batch.expect_less(left)


class Batch:
    """One run of several tasks within one reservation; on the event loop.

    Attributes:
        copies: Member to the member whose work answered it too.
    """

    def __init__(self) -> None:
        self._expected = 0
        self._arrived: list[_Entry] = []
        self._changed = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self.copies: dict[str, str] = {}

    def seats(self, count: int) -> Seats:
        """Expect so many members more."""
        self._expected += count
        return Seats(self, count)

    def expect_less(self, count: int) -> None:
        """Expect so many members less."""
        self._expected -= count
        self._changed.set()

    async def submit(self, place: Place, job: Job, *, group: str, work: str | None) -> Outcome:
        """Run one member with those that agree on ``group``; uses one expected seat.

        Args:
            place: Where it runs.
            job: The member.
            group: From ``merge.group_key``.
            work: From ``merge.work_key``; equal work is done once.
        """
        entry = _Entry(place, job, group, work, asyncio.get_running_loop().create_future())
        self._arrived.append(entry)
        self._expected -= 1
        self._changed.set()
        if self._driver is None:
            self._driver = asyncio.ensure_future(self._drive())
        try:
            return await asyncio.shield(entry.outcome)
        except asyncio.CancelledError:
            entry.outcome.cancel()
            if entry in self._arrived:
                self._arrived.remove(entry)
            if entry.run is not None:
                entry.run.cancel()
                await asyncio.wait([entry.run])
            raise

    async def _drive(self) -> None:
        while self._arrived or self._expected > 0:
            await self._gather()
            entries, self._arrived = self._arrived, []
            for group in _split(entries, lambda entry: (id(entry.place), entry.group)):
                await self._run_group(group)
        self._driver = None

    async def _gather(self) -> None:
        """Wait until all have come that will, or those that have come waited long enough."""
        while self._expected > 0:
            self._changed.clear()
            patience_s = _PATIENCE_S if self._arrived else None
            try:
                await asyncio.wait_for(self._changed.wait(), patience_s)
            except asyncio.TimeoutError:
                return

    async def _run_group(self, entries: Sequence[_Entry]) -> None:
        """Do distinct work once, and whatever of it failed once more for those that shared it."""
        waiting = [entry for entry in entries if not entry.outcome.done()]
        while waiting:
            distinct: dict[Any, list[_Entry]] = {}
            for entry in waiting:
                distinct.setdefault(entry.work or entry, []).append(entry)
            for first, *same in distinct.values():
                first.same = same
            first_ones = [group[0] for group in distinct.values()]
            short = await self._run_once(first_ones)
            if short:
                await self._run_once(short)
            waiting = [entry for entry in waiting if not entry.outcome.done()]

    async def _run_once(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """Run a group; return the members that may be tried with a smaller batch."""
        if len(entries) == 1:
            runs = [asyncio.ensure_future(entries[0].place.run(entries[0].job))]
        else:
            runs = entries[0].place.run_group([entry.job for entry in entries])
        for entry, run in zip(entries, runs, strict=True):
            entry.run = run
        short = await asyncio.gather(*map(self._settle, entries, runs))
        return [entry for entry, again in zip(entries, short, strict=True) if again]

    async def _settle(self, entry: _Entry, run: asyncio.Task[Outcome]) -> bool:
        """Answer a member when it has finished; return whether a smaller batch may help it."""
        await asyncio.wait([run])
        if run.cancelled():
            entry.outcome.cancel()
        elif (error := run.exception()) is None:
            await self._answer(entry, run.result())
        elif not entry.outcome.done():
            if entry.job.shrink(error):
                return True
            entry.outcome.set_exception(error)
        return False

    async def _answer(self, entry: _Entry, outcome: Outcome) -> None:
        """Answer those that asked for the same first: the folder moves once its task is told."""
        for same in entry.same if outcome.ok else ():
            with contextlib.suppress(OSError):  # then its work is done for itself
                source, target = entry.job.ctx.folder, same.job.ctx.folder
                await asyncio.to_thread(copy_files, source, target)
                if not same.outcome.done():
                    self.copies[same.job.ctx.task_id] = entry.job.ctx.task_id
                    same.outcome.set_result(outcome)
        if not entry.outcome.done():
            entry.outcome.set_result(outcome)


@attrs.define(eq=False)
class Guest:
    """A dispatch that waits for its reservation, or to be taken along by another one's.

    Attributes:
        size: How many members it brings.
        invited: What it is given when it is taken along.
    """

    key: str
    size: int
    invited: asyncio.Future[Any]


class Lobby:
    """Dispatches that wait, by what they could share.

    Args:
        most: Members of one batch at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[str, list[Guest]] = {}

    def enter(self, key: str, size: int) -> Guest:
        """Wait with others of the same key; ``leave`` must follow."""
        guest = Guest(key, size, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(key, []).append(guest)
        return guest

    def leave(self, guest: Guest) -> None:
        """Wait no more; may come twice."""
        guests = self._waiting.get(guest.key, [])
        if guest in guests:
            guests.remove(guest)
        if not guests:
            self._waiting.pop(guest.key, None)

    def take_along(self, host: Guest) -> list[Guest]:
        """Return those that join, first come first served; they wait no more, nor does the host."""
        self.leave(host)
        room = self._most - host.size
        joining = []
        for guest in list(self._waiting.get(host.key, ())):
            if guest.size <= room:
                room -= guest.size
                joining.append(guest)
                self.leave(guest)
        return joining


def _split(entries: Sequence[_Entry], key: Callable[[_Entry], Any]) -> Iterator[list[_Entry]]:
    groups: dict[Any, list[_Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    yield from groups.values()


def copy_files(source: Path, target: Path) -> None:
    """Copy what an executor wrote from one attempt's folder to another's.

    Raises:
        OSError: Something could not be copied.
    """
    ignored = shutil.ignore_patterns(*_OWN_FILES)
    shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True, symlinks=True)


def holds_files(folder: Path) -> bool:
    """Return whether an executor wrote anything that ``copy_files`` would copy."""
    written = (path for path in folder.iterdir() if path.name not in _OWN_FILES)
    return any(file.is_file() for path in written for file in (path, *path.rglob("*")))
