"""The members of one dispatch: equal work once, several at once where executors allow it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from flowmesh_core.artifacts.layout import Attempt
from flowmesh_core.batches import copy_files
from flowmesh_core.contract import Task
from flowmesh_core.executor import OWNER_FIELDS, Outcome
from flowmesh_core.merge import canonical_json, work_key
from flowmesh_core.reservations import Reservation

__all__ = ["Answer", "TaskRuns", "run_members"]

Member = tuple[Task, Attempt]
# Task id, outcome, and whether it is the answer of another task with the same work.
Answer = tuple[str, Outcome, bool]


class TaskRuns(Protocol):
    """What is needed of ``runner.Runner``, which documents it."""

    async def run(self, task: Task, attempt: Attempt, reservation: Reservation) -> Outcome: ...  # noqa: D102 - documented there
    def takes_several(self, task: Task) -> bool: ...  # noqa: D102
    def is_stopped(self, task_id: str) -> bool: ...  # noqa: D102
    def is_cached(self, task_id: str) -> bool: ...  # noqa: D102


async def run_members(
    runs: TaskRuns, members: Sequence[Member], reservation: Reservation
) -> AsyncIterator[Answer]:
    """Run the members of one dispatch, together or one after the other.

    Args:
        runs: Runs single tasks.
        members: The leader first.
        reservation: What they hold together; with seats, they join a batch.

    Yields:
        Each member's answer as soon as it has finished.
    """
    if reservation.seats is not None:
        running = [_run_seated(runs, member, reservation) for member in members]
        for done in asyncio.as_completed(running):
            yield await done
        return
    group = _Members(runs, members, reservation)
    answering = asyncio.ensure_future(group.answer_all())
    try:
        for answer in asyncio.as_completed([*group.answers.values()]):
            yield await answer
    finally:
        answering.cancel()
        await asyncio.wait([answering])


async def _run_seated(runs: TaskRuns, member: Member, reservation: Reservation) -> Answer:
    task_id = member[0].task_id
    outcome = await runs.run(*member, reservation)
    seats = reservation.seats
    copied = seats is not None and task_id in seats.batch.copies
    return task_id, outcome, copied or runs.is_cached(task_id)


class _Members:
    """Members that run within one reservation and no batch."""

    def __init__(self, runs: TaskRuns, members: Sequence[Member], reservation: Reservation) -> None:
        loop = asyncio.get_running_loop()
        self.answers: Mapping[str, asyncio.Future[Answer]] = {
            task.task_id: loop.create_future() for task, _ in members
        }
        self._runs = runs
        self._members = members
        self._reservation = reservation

    async def answer_all(self) -> None:
        """Do distinct work at once where every executor takes several tasks, else in turn."""
        works: dict[str, list[Member]] = {}
        for task, attempt in self._members:
            works.setdefault(_equal_work(task), []).append((task, attempt))
        try:
            if all(self._runs.takes_several(task) for task, _ in self._members):
                await asyncio.gather(*map(self._answer_equal, works.values()))
            else:
                for equal in works.values():
                    await self._answer_equal(equal)
        except Exception as exc:  # noqa: BLE001 - nobody waits for ever for an answer
            for answer in self.answers.values():
                if not answer.done():
                    answer.set_exception(exc)

    async def _answer_equal(self, members: Sequence[Member]) -> None:
        """Run the first of members with the same work; the others get what it got, if it did."""
        while members:
            (task, attempt), *same = members
            outcome = await self._runs.run(task, attempt, self._reservation)
            copied = await self._copy(attempt, same) if outcome.ok else set()
            for task_id in copied:
                self.answers[task_id].set_result((task_id, outcome, True))
            cached = self._runs.is_cached(task.task_id)
            self.answers[task.task_id].set_result((task.task_id, outcome, cached))
            members = [member for member in same if member[0].task_id not in copied]

    async def _copy(self, attempt: Attempt, members: Sequence[Member]) -> set[str]:
        """Give members what another one wrote, before its folder moves; return who got it."""
        copied = set()
        for task, own in members:
            with contextlib.suppress(OSError):  # then its work is done for itself
                if not self._runs.is_stopped(task.task_id):
                    await asyncio.to_thread(copy_files, attempt.folder, own.folder)
                    copied.add(task.task_id)
        return copied


def _equal_work(task: Task) -> str:
    """Return the text on which members of one owner agree whose work is the same."""
    work = work_key(task)
    owner = [task.metadata.get(name) for name in OWNER_FIELDS]
    return canonical_json([owner, work]) if work else task.task_id
