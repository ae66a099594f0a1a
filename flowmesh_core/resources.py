"""What a task asks of the machine, and who holds which part of it.

``parse_resources`` reads ``spec.resources``; what it cannot read is an error, never ignored.
``ResourceLedger`` grants slots, memory and GPUs together and never more than there are.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Annotated, Any, TypeGuard

import attrs
from pydantic import BaseModel, BeforeValidator, Field

from flowmesh_core.errors import ResourceError
from flowmesh_core.telemetry.probes import Gpu
from flowmesh_core.validation import StrictBlock, show_value, validate_model

__all__ = ["Grant", "ResourceLedger", "ResourceRequest", "parse_resources"]

# More than any machine has: beyond it a number is a slip of the pen.
_MOST_CORES = 1_000_000
_MOST_BYTES = 1024**5
_MOST_GPUS = 10_000
_CORES = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m?)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT])I?)?B?", re.IGNORECASE | re.ASCII)
_ANY_TYPE = ("", "any", "auto", "*")
_REMEMBERED = 1000


@attrs.frozen(kw_only=True)
class ResourceRequest:
    """What ``spec.resources.hardware`` asks for; None where it does not say.

    Attributes:
        cpu: Cores.
        gpu_type: Part of the GPU's name in lower case; empty for any GPU.
        gpu_memory_bytes: Least total memory of each GPU.
    """

    cpu: float | None = None
    memory_bytes: int | None = None
    gpu_count: int | None = None
    gpu_type: str = ""
    gpu_memory_bytes: int | None = None

    @property
    def wants_gpu(self) -> bool:
        """Whether it asks for a GPU by count, type or memory; a count of 0 asks for none."""
        if self.gpu_count is not None:
            return self.gpu_count > 0
        return bool(self.gpu_type or self.gpu_memory_bytes)


def parse_resources(resources: Mapping[str, Any], *, where: str) -> ResourceRequest:
    """Read ``spec.resources``; null is absent, and keys beside ``hardware`` are left to others.

    Sizes count in powers of 1024 with or without the ``i``; fractions of a byte are rounded up.

    Raises:
        ContractError: One problem per field that cannot be read and per unknown key.
    """
    if not resources:  # as most tasks have it
        return ResourceRequest()
    hardware = validate_model(_Resources, resources, where=where, prefix="spec.resources").hardware
    return ResourceRequest(
        cpu=hardware.cpu,
        memory_bytes=hardware.memory,
        gpu_count=hardware.gpu.count,
        gpu_type=hardware.gpu.type,
        gpu_memory_bytes=hardware.gpu.memory,
    )


def _is_number(value: object, most: int) -> TypeGuard[float]:
    """Whether it lies between 0 and ``most``, and is no bool and no NaN."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= most


def _read_cores(value: Any) -> float:
    cores = value
    if isinstance(value, str) and (match := _CORES.fullmatch(value.strip())):
        cores = float(match[1]) / (1000 if match[2] else 1)
    if not _is_number(cores, _MOST_CORES):
        raise ValueError(f"must be like 4, 0.5 or 500m, got {show_value(value)}")
    return float(cores)


def _read_size(value: Any) -> int:
    size = value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper())
    if not _is_number(size, _MOST_BYTES) or not size:
        raise ValueError(f"must be like 16Gi (above 0, at most 1024Ti), got {show_value(value)}")
    return math.ceil(size)


def _read_count(value: Any) -> int:
    count = value
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value.strip()):
        count = int(value)
    if not _is_number(count, _MOST_GPUS) or count != int(count):
        raise ValueError(f"must be a whole number of GPUs, 0 or more, got {show_value(value)}")
    return int(count)


def _read_type(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return show_value(value)  # YAML reads 4090 as a number
    if isinstance(value, str):
        name = value.strip().lower()
        return "" if name in _ANY_TYPE else name
    raise ValueError(f"must be part of a GPU's name, or any, got {show_value(value)}")


def _absent_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _count_is_gpu(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {"count": value}


_Size = Annotated[int, BeforeValidator(_read_size)]


class _GpuBlock(StrictBlock):
    count: Annotated[int, BeforeValidator(_read_count)] | None = None
    type: Annotated[str, BeforeValidator(_read_type)] = ""
    memory: _Size | None = None


class _Hardware(StrictBlock):
    cpu: Annotated[float, BeforeValidator(_read_cores)] | None = None
    memory: _Size | None = None
    gpu: Annotated[_GpuBlock, BeforeValidator(_count_is_gpu)] = Field(default_factory=_GpuBlock)


class _Resources(BaseModel):
    hardware: Annotated[_Hardware, BeforeValidator(_absent_is_empty)] = Field(
        default_factory=_Hardware
    )


@attrs.define(eq=False)
class _Device:
    """A GPU as the ledger sees it; ``used`` grows with each use of any GPU."""

    gpu: Gpu
    used: int = 0

    @property
    def id(self) -> str:
        instance = self.gpu.name.startswith("MIG") or self.gpu.uuid.startswith("MIG")
        return self.gpu.uuid if instance else str(self.gpu.index)

    def matches(self, request: ResourceRequest) -> bool:
        """Whether it is what was asked for; one of unknown memory has none to show."""
        enough = (self.gpu.memory_bytes or 0) >= (request.gpu_memory_bytes or 0)
        return enough and request.gpu_type in self.gpu.name.lower()


@attrs.frozen(eq=False)
class _Need:
    """A request in this machine's terms: ``least`` to ``most`` of ``devices``, in its order."""

    memory_bytes: int
    devices: tuple[_Device, ...]
    least: int
    most: int
    engine: str
    shared: bool


@attrs.define(eq=False)
class _Reservation:
    """Memory and GPUs held by the tasks of one engine, or by one task.

    Attributes:
        engine: Empty when nobody may join.
        users: Tasks that hold it.
        services: Those of them that gave their slot back, and may stay for long.
    """

    engine: str
    devices: tuple[_Device, ...]
    memory_bytes: int
    users: int = 0
    services: int = 0

    def suits(self, need: _Need) -> bool:
        """Whether a task may join: its engine is loaded, on as many of its GPUs as it asks for."""
        return (
            bool(self.engine)
            and self.engine == need.engine
            and need.shared
            and need.least <= len(self.devices) <= need.most
            and all(device in need.devices for device in self.devices)
        )


@attrs.define(eq=False)
class Grant:
    """A slot, memory and GPUs, until they are given back; a context manager that releases.

    Attributes:
        devices: Entries of ``CUDA_VISIBLE_DEVICES``, in the machine's order. Numbers count in PCI
            bus order.
    """

    devices: tuple[str, ...]
    _reservation: _Reservation
    _give_back: Callable[[_Reservation, bool], None]
    _has_slot: bool = True
    _released: bool = False

    def release(self) -> None:
        """Give back everything that is still held; may come twice."""
        if self._released:
            return
        self._released = True
        self._reservation.users -= 1
        if not self._has_slot:
            self._reservation.services -= 1
        self._give_back(self._reservation, self._has_slot)

    def release_slot(self) -> None:
        """Give back the slot and keep the rest, as a service does; may come twice."""
        if self._has_slot and not self._released:
            self._has_slot = False
            self._reservation.services += 1
            self._give_back(self._reservation, True)

    def __enter__(self) -> Grant:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@attrs.frozen(eq=False)
class _Waiter:
    order: tuple[int, int]
    since: float
    need: _Need
    future: asyncio.Future[Grant]


class ResourceLedger:
    """One per worker, used on its event loop only.

    The highest priority goes first, then who came first. What fits goes ahead of what must wait,
    until that has waited longer than ``patience_s``: from then on nothing later is granted before
    it, unless only a service holds what it lacks. Patience can only forbid, so it needs no timer.

    Args:
        slots: Tasks at once; services that gave their slot back do not count.
        cores: What requests for ``cpu`` are compared with.
        memory_bytes: None when unknown: every request then fits.
        gpus: Those that tasks may use.
        clock: Monotonic, in seconds.
        patience_s: How long a request lets later ones go ahead.
    """

    def __init__(
        self,
        slots: int,
        cores: int,
        memory_bytes: int | None,
        gpus: Sequence[Gpu],
        *,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = 30.0,
    ) -> None:
        self._slots = self._free_slots = slots
        self._cores = cores
        self._memory = math.inf if memory_bytes is None else memory_bytes
        self._devices = tuple(_Device(gpu) for gpu in gpus)
        # Equal requests become one object, which a long queue tries only once.
        self._need = lru_cache(maxsize=_REMEMBERED)(self._measure)
        self._clock = clock
        self._patience_s = patience_s
        self._queue: list[_Waiter] = []
        self._arrivals = 0
        self._uses = 0
        # Ordered sets: the outcome depends on arrival alone.
        self._held: dict[_Reservation, None] = {}
        self._placed: dict[str, tuple[_Device, ...]] = {}

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return self._free_slots == 0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    def snapshot(self) -> dict[str, Any]:
        """Return what is free and held now, for metrics; free memory is None when unknown."""
        free = self._memory - sum(held.memory_bytes for held in self._held)
        taken = {device for held in self._held for device in held.devices}
        return {
            "slots": self._slots,
            "free_slots": self._free_slots,
            "free_memory_bytes": None if math.isinf(free) else free,
            "devices_in_use": [device.id for device in self._devices if device in taken],
            "waiting": self.waiting,
        }

    def check(self, request: ResourceRequest, *, uses_gpu: bool) -> None:
        """Refuse what this machine can never meet.

        Raises:
            ResourceError: Says everything that was asked for in vain, and what the machine has.
        """
        self._need(request, uses_gpu, "", False)

    def take(
        self, request: ResourceRequest, *, uses_gpu: bool, engine: str = "", shared: bool = True
    ) -> Grant | None:
        """Grant at once what is free while nobody waits, else return None; see ``acquire``."""
        need = self._need(request, uses_gpu, engine, shared)
        return None if self._queue else self._grant(need)

    async def acquire(
        self,
        request: ResourceRequest,
        *,
        uses_gpu: bool,
        priority: int = 0,
        engine: str = "",
        shared: bool = True,
    ) -> Grant:
        """Wait for a slot, the memory and the GPUs, together.

        With a count that many matching GPUs are granted. Without one it is one, or on a worker of
        a single slot all that match and are free.

        Args:
            request: What the task asks for.
            uses_gpu: Whether it runs on GPUs; otherwise it is granted none.
            priority: Higher goes first.
            engine: Key of the engine that will be loaded; GPUs that had it last are preferred.
            shared: Whether that engine takes several tasks at once: they then hold its GPUs, and
                the largest memory that one of them asked for, together.

        Raises:
            ResourceError: As ``check``.
        """
        grant = self.take(request, uses_gpu=uses_gpu, engine=engine, shared=shared)
        if grant is not None:
            return grant
        need = self._need(request, uses_gpu, engine, shared)
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        waiter = _Waiter((-priority, self._arrivals), self._clock(), need, future)
        bisect.insort(self._queue, waiter, key=lambda waiting: waiting.order)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self._queue:
            self._queue.remove(waiter)
            self._serve()  # those that it held up
        else:  # granted, and cancelled before it could see that
            waiter.future.result().release()

    def _measure(
        self, request: ResourceRequest, uses_gpu: bool, engine: str, shared: bool
    ) -> _Need:
        """Translate a request that this machine can meet, or raise."""
        devices: tuple[_Device, ...] = ()
        if uses_gpu:
            devices = self._devices
            if request.wants_gpu:
                devices = tuple(device for device in devices if device.matches(request))
        least = most = request.gpu_count or 0
        if request.gpu_count is None and uses_gpu:
            least, most = int(request.wants_gpu or bool(devices)), len(devices)
        memory_bytes = request.memory_bytes or 0
        # Compared, not reserved: tasks that share cores are slow, but none of them fails.
        if (request.cpu or 0) > self._cores or memory_bytes > self._memory or least > len(devices):
            raise ResourceError(self._explain(request, uses_gpu, len(devices), least))
        return _Need(memory_bytes, devices, least, most, engine, shared)

    def _explain(self, request: ResourceRequest, uses_gpu: bool, matching: int, least: int) -> str:
        problems = []
        if request.cpu is not None and request.cpu > self._cores:
            problems.append(f"{request.cpu:g} CPU cores, this machine has {self._cores}")
        if request.memory_bytes is not None and request.memory_bytes > self._memory:
            asked, there = _show_size(request.memory_bytes), _show_size(self._memory)
            problems.append(f"{asked} of memory, this machine has {there}")
        if matching < least:
            asked = _show_gpus(request, least)
            if not uses_gpu:
                problems.append(f"{asked}, but runs on the CPU (gpu.count 0 would be right there)")
            else:
                problems.append(f"{asked}, this machine has {self._show_devices(matching)}")
        advice = "ask for less, or choose another machine or executor"
        return f"spec.resources.hardware asks for {'; for '.join(problems)}; {advice}"

    def _show_devices(self, matching: int) -> str:
        kinds = Counter(
            f"{device.gpu.name} with {_show_size(device.gpu.memory_bytes)}"
            for device in self._devices
        )
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return f"{matching} that match among {listed}" if listed else "no GPU"

    def _grant(self, need: _Need) -> Grant | None:
        """Grant what is free now."""
        reservation = self._find_room(need, self._held) if self._free_slots else None
        if reservation is None:
            return None
        self._free_slots -= 1
        reservation.users += 1
        reservation.memory_bytes = max(reservation.memory_bytes, need.memory_bytes)
        if reservation.memory_bytes or reservation.devices:
            self._held[reservation] = None
        if need.engine and reservation.devices:
            self._remember(need.engine, reservation.devices)
        devices = tuple(device.id for device in reservation.devices)
        return Grant(devices, reservation, self._give_back)

    def _find_room(self, need: _Need, held: Collection[_Reservation]) -> _Reservation | None:
        """Return the reservation that serves it beside those held, one of them or a new one."""
        free_bytes = self._memory - sum(other.memory_bytes for other in held)
        for other in held:
            if other.suits(need) and need.memory_bytes - other.memory_bytes <= free_bytes:
                return other
        taken = {device for other in held for device in other.devices}
        free = [device for device in need.devices if device not in taken]
        if need.memory_bytes > free_bytes or len(free) < need.least:
            return None
        devices = self._choose(need, free)
        return _Reservation(need.engine if need.shared else "", devices, need.memory_bytes)

    def _choose(self, need: _Need, free: list[_Device]) -> tuple[_Device, ...]:
        count = min(need.most, len(free)) if self._slots == 1 else need.least
        last = self._placed.get(need.engine, ())
        ranked = sorted(free, key=lambda device: (device not in last, device.used))
        return tuple(device for device in free if device in ranked[:count])

    def _remember(self, engine: str, devices: tuple[_Device, ...]) -> None:
        self._placed.pop(engine, None)
        self._placed[engine] = devices
        if len(self._placed) > _REMEMBERED:
            del self._placed[next(iter(self._placed))]

    def _give_back(self, reservation: _Reservation, slot: bool) -> None:
        self._free_slots += slot
        if not reservation.users:
            self._held.pop(reservation, None)
            self._uses += 1
            for device in reservation.devices:
                device.used = self._uses
        self._serve()

    def _serve(self) -> None:
        """Grant in order whatever fits; a grant never lets fit what was refused before it."""
        now = self._clock() if self._queue else 0.0
        refused: dict[_Need, bool] = {}
        for waiter in self._queue.copy():
            if not self._free_slots:
                return
            if waiter.future.done():
                continue  # cancelled; its task takes it out when it next runs
            need = waiter.need
            if need not in refused:
                if grant := self._grant(need):
                    self._queue.remove(waiter)
                    waiter.future.set_result(grant)
                    continue
                refused[need] = self._within_reach(need)
            if refused[need] and now - waiter.since > self._patience_s:
                return

    def _within_reach(self, need: _Need) -> bool:
        """Whether it would fit if every task but the services ended: they may stay for ever."""
        lasting = [reservation for reservation in self._held if reservation.services]
        return self._find_room(need, lasting) is not None


def _show_size(size_bytes: float | None) -> str:
    return "unknown memory" if size_bytes is None else f"{size_bytes / 1024**3:.4g} GiB"


def _show_gpus(request: ResourceRequest, count: int) -> str:
    kind = f" named like {request.gpu_type!r}" if request.gpu_type else ""
    size = f" with {_show_size(request.gpu_memory_bytes)}" if request.gpu_memory_bytes else ""
    return f"{count} GPU{'s' if count > 1 else ''}{kind}{size}"
