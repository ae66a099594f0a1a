"""What a dispatch waits for before it runs and holds while it runs, alone or with others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import attrs

from flowmesh_core.batches import Batch, Guest, Lobby, Seats
from flowmesh_core.contract import Task
from flowmesh_core.errors import CancelledError
from flowmesh_core.executor import Capability, ExecutorInfo
from flowmesh_core.merge import engine_key, group_key
from flowmesh_core.resources import Grant, ResourceLedger, ResourceRequest, parse_resources

__all__ = ["Reservation", "Reservations", "Stop"]

_log = logging.getLogger(__name__)
# So many never give back: what is lent belongs to somebody else.
_FOR_EVER = 1 << 60


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@attrs.define(eq=False)
class Stop:
    """The wish that one task should end; ``asked`` is done once somebody has it."""

    reason: str = ""
    retriable: bool = False
    asked: asyncio.Future[None] = attrs.field(factory=_new_future)

    def ask(self, reason: str, *, retriable: bool) -> None:
        """Wish it; the first reason counts."""
        if not self.asked.done():
            self.reason, self.retriable = reason, retriable
            self.asked.set_result(None)

    def check(self) -> None:
        """Raise when somebody has asked."""
        if self.asked.done():
            raise self.error()

    def error(self) -> CancelledError:
        """Return what a task that was stopped ends with."""
        return CancelledError(self.reason, retriable=self.retriable)


@attrs.define(eq=False)
class _SharedGrant:
    """What several dispatches of one batch hold together; the last one gives it back."""

    grant: Grant
    holders: int = 1
    kept: bool = False

    def leave(self) -> None:
        """Hold it no more, or only its slot no more while a service keeps the rest."""
        if self.kept and self.holders == 1:
            self.grant.release_slot()
        elif not self.kept:
            self.release()

    def release(self) -> None:
        self.holders -= 1
        if not self.holders:
            self.grant.release()


@attrs.frozen(kw_only=True)
class Reservation:
    """What a dispatch holds of the worker while it runs.

    Attributes:
        request: What its document asks for.
        devices: GPUs that its tasks may use.
        seats: Its place in a batch, when its executor takes groups.
    """

    request: ResourceRequest
    devices: tuple[str, ...]
    seats: Seats | None = None
    _grant: _SharedGrant

    def lent(self, request: ResourceRequest) -> Reservation:
        """Return what a task may use that another one started; nothing is given back by it."""
        grant = _SharedGrant(self._grant.grant, holders=_FOR_EVER)
        return Reservation(request=request, devices=self.devices, grant=grant)

    def keep(self) -> None:
        """Let a service keep devices and memory until ``release``."""
        self._grant.kept = True

    def release(self) -> None:
        """Give back what a service kept."""
        self._grant.release()

    def leave(self) -> None:
        """Give back what the dispatch itself held."""
        if self.seats is not None:
            self.seats.close()
        self._grant.leave()


class Reservations:
    """Where dispatches wait; one per worker, on its event loop.

    Args:
        ledger: The machine's slots, memory and GPUs.
        window_s: How long a dispatch with a grant waits for others of its group.
        most: Members of one batch at most.
    """

    def __init__(self, ledger: ResourceLedger, *, window_s: float, most: int) -> None:
        self._ledger = ledger
        self._lobby = Lobby(most)
        self._window_s = window_s

    @property
    def full(self) -> bool:
        """Whether another task would have to wait."""
        return self._ledger.full or bool(self._ledger.waiting)

    @contextlib.asynccontextmanager
    async def hold(
        self, task: Task, info: ExecutorInfo, stop: Stop, *, size: int
    ) -> AsyncIterator[Reservation]:
        """Wait for a slot and what ``spec.resources`` asks for, and hold it.

        Dispatches of one group that wait together share the first one's reservation.

        Args:
            task: The leader of a dispatch.
            info: The executor that serves it.
            stop: Ends the waiting.
            size: How many members the dispatch has.

        Raises:
            FlowmeshError: The machine can never meet the request, or the task was cancelled.
        """
        request = parse_resources(task.common.resources, where=f"task {task.task_id}")
        needs: dict[str, Any] = {
            "uses_gpu": Capability.GPU in info.capabilities and not task.common.enforce_cpu,
            "engine": f"{info.name} {engine_key(info, task.spec)}",
            "shared": Capability.CONCURRENT in info.capabilities,
        }
        priority = _priority(task)
        key = group_key(info, task)
        guest = self._lobby.enter(f"{key} {task.common.resources}", size) if key else None
        try:
            held: Grant | Reservation | None = self._ledger.take(request, **needs)
            if held is None:
                waiting = self._ledger.acquire(request, priority=priority, **needs)
                held = await self._wait(asyncio.ensure_future(waiting), stop, guest)
            if isinstance(held, Grant):
                held = await self._host(held, request, guest)
        except BaseException:
            if guest is not None and guest.invited.done():
                guest.invited.result().leave()
            raise
        finally:
            if guest is not None:
                self._lobby.leave(guest)
        try:
            yield held
        finally:
            held.leave()

    async def _wait(
        self, waiting: asyncio.Task[Grant], stop: Stop, guest: Guest | None
    ) -> Grant | Reservation:
        """Return a grant of one's own or somebody else's reservation, whichever comes first."""
        either: list[asyncio.Future[Any]] = [waiting, stop.asked]
        if guest is not None:
            either.append(guest.invited)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _call_off(waiting)
            raise
        invited = guest is not None and guest.invited.done()
        if not invited and not stop.asked.done():
            return waiting.result()
        await _call_off(waiting)
        if guest is None or not invited:
            raise stop.error()
        reservation: Reservation = guest.invited.result()
        return reservation

    async def _host(
        self, grant: Grant, request: ResourceRequest, guest: Guest | None
    ) -> Reservation:
        """Take along those that wait for the same, after a moment in which more may come."""
        shared = _SharedGrant(grant)
        devices = grant.devices
        if guest is None:
            return Reservation(request=request, devices=devices, grant=shared)
        try:
            await asyncio.sleep(self._window_s)
        except asyncio.CancelledError:
            grant.release()
            raise
        if guest.invited.done():  # another one of the group had its grant a moment earlier
            grant.release()
            reservation: Reservation = guest.invited.result()
            return reservation
        batch = Batch()
        for joining in self._lobby.take_along(guest):
            shared.holders += 1
            seats = batch.seats(joining.size)
            joining.invited.set_result(
                Reservation(request=request, devices=devices, seats=seats, grant=shared)
            )
        seats = batch.seats(guest.size)
        return Reservation(request=request, devices=devices, seats=seats, grant=shared)


async def _call_off(waiting: asyncio.Task[Grant]) -> None:
    """Want a grant no more; one that has come already is given back."""
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        (await waiting).release()


def _priority(task: Task) -> int:
    value = task.spec.get("priority")
    if isinstance(value, int):
        return value
    if value is not None:
        _log.warning(
            "task %s: spec.priority %r is no whole number, taken as 0", task.task_id, value
        )
    return 0
