"""The place outside the worker: one child process per engine, kept warm while there is room.

An engine is unloaded by ending its process, so that its memory is back for certain.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core.config import child_environment
from flowmesh_core.errors import CrashError, FlowmeshError
from flowmesh_core.executor import Capability, Outcome
from flowmesh_core.merge import engine_key
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.places.crash import is_out_of_memory
from flowmesh_core.places.engine_process import EngineProcess, StaleEngineError
from flowmesh_core.places.keeping import Keeper
from flowmesh_core.places.memory import MemoryWatch, available_memory_bytes
from flowmesh_core.telemetry.probes import GpuMemory, GpuReader, usable_memory_bytes

__all__ = ["ProcessPlace"]

_log = logging.getLogger(__name__)
# Room that an engine gets when its task says nothing: of the machine's memory, of a GPU's.
_HOST_SHARE = 0.1
_GPU_SHARE = 0.5
_LOOK_S = 0.01


@attrs.frozen
class _Key:
    """Tasks that agree on all of it can share a process."""

    executor: str
    environment: str
    engine: str
    devices: tuple[str, ...]


@attrs.frozen
class _Room:
    """Bytes that must be free before an engine is loaded or woken: here, and on each GPU."""

    host_bytes: int
    gpu_bytes: Mapping[str, int]


class ProcessPlace(Place):
    """Runs executors in child processes."""

    def __init__(self, context: PlaceContext) -> None:
        super().__init__(context)
        self._keeper = Keeper()
        self._memory = MemoryWatch()
        self._gpus = GpuReader(visible_devices=context.settings.visible_devices)
        self._engines: dict[_Key, list[EngineProcess]] = {}
        # What was forgotten may still run tasks, or be ending.
        self._alive: set[EngineProcess] = set()
        self._ending: set[asyncio.Task[None]] = set()

    async def run(self, job: Job) -> Outcome:
        """Run one task in a child; a warm one that died unnoticed is replaced."""
        try:
            try:
                outcome = await self._run(job)
            except StaleEngineError as exc:
                _log.info("%s; starting another", exc)
                outcome = await self._run(job)
        except CrashError as exc:
            if exc.oom:
                await self._end_idle(lambda: False)
            raise
        return outcome

    async def _run(self, job: Job) -> Outcome:
        key, engine = self._claim(job)
        try:
            await self._prepare(engine, job)
            return _without_shortage(engine, await engine.run(job))
        finally:
            self._put_back(key, engine)

    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        """Run a batch in one child, as ``run`` does with one task."""
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Outcome]] = [loop.create_future() for _ in jobs]
        running = asyncio.ensure_future(self._run_group(jobs, answers))

        async def member(answer: asyncio.Future[Outcome]) -> Outcome:
            try:
                return await answer
            finally:
                if all(one.done() for one in answers):
                    await asyncio.wait([running])

        return [asyncio.ensure_future(member(answer)) for answer in answers]

    async def _run_group(
        self, jobs: Sequence[Job], answers: Sequence[asyncio.Future[Outcome]]
    ) -> None:
        try:
            if await self._try_group(jobs, answers) and await self._try_group(jobs, answers):
                raise StaleEngineError("two warm processes ended before they took the batch")
        except FlowmeshError as exc:  # the process could not be started, say
            for answer in answers:
                if not answer.done():
                    answer.set_exception(exc)
        errors = [None if answer.cancelled() else answer.exception() for answer in answers]
        if any(isinstance(error, CrashError) and error.oom for error in errors):
            await self._end_idle(lambda: False)

    async def _try_group(
        self, jobs: Sequence[Job], answers: Sequence[asyncio.Future[Outcome]]
    ) -> bool:
        """Run a batch; return whether a warm process had died unnoticed and nobody was answered."""
        key, engine = self._claim(jobs[0])
        try:
            await self._prepare(engine, jobs[0])
            runs = engine.run_group(jobs)
            for answer, run in zip(answers, runs, strict=True):
                answer.add_done_callback(functools.partial(_give_up, run))
            stale = await asyncio.gather(
                *(self._pass_on(engine, *pair) for pair in zip(runs, answers, strict=True))
            )
            return any(stale)
        finally:
            self._put_back(key, engine)

    async def _pass_on(
        self, engine: EngineProcess, run: asyncio.Task[Outcome], answer: asyncio.Future[Outcome]
    ) -> bool:
        try:
            outcome = _without_shortage(engine, await run)
        except StaleEngineError:
            return True
        except asyncio.CancelledError:
            answer.cancel()
        except FlowmeshError as exc:
            if not answer.done():
                answer.set_exception(exc)
        else:
            if not answer.done():
                answer.set_result(outcome)
        return False

    def _claim(self, job: Job) -> tuple[_Key, EngineProcess]:
        """Return an engine for a job, warm or about to start; ``_put_back`` must follow."""
        info, ctx = job.info, job.ctx
        engine = f"{engine_key(info, ctx.raw_spec)} {ctx.inputs.weights_state()}"
        key = _Key(info.name, info.environment, engine, ctx.devices)
        return key, self._take(key) or self._begin(key, job)

    async def _prepare(self, engine: EngineProcess, job: Job) -> None:
        """Wait until an engine has started, or there is room for it to wake."""
        await asyncio.shield(engine.started)
        async with engine.turn:  # it may be falling asleep
            if engine.asleep:
                room = attrs.evolve(self._room_for(job), gpu_bytes=engine.gave_back)
                if not self._fits_gpus(room):
                    await self._make_room(room)

    def stop(self, task_id: str) -> None:
        """Ask the executor to stop; its process ends when ``run`` is cancelled after the grace."""
        for engine in self._alive:
            engine.stop(task_id, self.context.settings.cancel_grace_s)

    async def close(self) -> None:
        """End every process."""
        for key, engines in list(self._engines.items()):
            for engine in list(engines):
                self._discard(key, engine)
        while self._ending:
            await asyncio.wait(self._ending)
        await self._keeper.close()
        self._memory.close()

    # The pool.

    def _take(self, key: _Key) -> EngineProcess | None:
        for engine in sorted(self._engines.get(key, ()), key=lambda engine: engine.asleep):
            if not engine.usable:
                self._forget(key, engine)
            elif engine.concurrent or not engine.users:
                engine.users += 1
                return engine
        return None

    def _begin(self, key: _Key, job: Job) -> EngineProcess:
        engine = EngineProcess(job.info, self.context)
        self._alive.add(engine)
        self._engines.setdefault(key, []).append(engine)
        engine.users += 1
        engine.started = asyncio.ensure_future(self._start(engine, key, job))
        return engine

    async def _start(self, engine: EngineProcess, key: _Key, job: Job) -> None:
        try:
            await self._make_room(self._room_for(job))
            env = child_environment(
                plugin=job.info.name,
                variables=job.variables,
                devices=key.devices,
                foreign=bool(job.info.environment),
            )
            await engine.start(self._keeper, self._memory, env)
        except BaseException:
            engine.usable = False
            raise

    def _put_back(self, key: _Key, engine: EngineProcess) -> None:
        engine.users -= 1
        if engine.users:
            return
        if not engine.usable or not engine.started.done():
            self._discard(key, engine)
            return
        engine.rest()
        idle = self._idle_by_age()
        for old_key, old in idle[: max(0, len(idle) - self.context.settings.warm_max)]:
            self._discard(old_key, old)
        if engine.usable and engine.expiry is None:
            self._expire(key, engine)
        return

    def _expire(self, key: _Key, engine: EngineProcess) -> None:
        """End an engine that was idle long enough, else look again when it may have been."""
        idle_s = 0.0 if engine.users else time.monotonic() - engine.idle_since
        left_s = self.context.settings.warm_idle_s - idle_s
        engine.expiry = None
        if left_s <= 0 and not engine.users:
            self._discard(key, engine)
        elif engine.usable:
            loop = asyncio.get_running_loop()
            engine.expiry = loop.call_later(max(left_s, _LOOK_S), self._expire, key, engine)

    def _idle(self) -> list[tuple[_Key, EngineProcess]]:
        return [
            (key, engine)
            for key, engines in self._engines.items()
            for engine in engines
            if not engine.users and engine.usable
        ]

    def _forget(self, key: _Key, engine: EngineProcess) -> None:
        engines = self._engines.get(key, [])
        if engine in engines:
            engines.remove(engine)
        if not engines:
            self._engines.pop(key, None)

    def _discard(self, key: _Key, engine: EngineProcess) -> asyncio.Task[None]:
        """Forget an engine and end its process in the background."""
        engine.usable = False
        self._forget(key, engine)
        return self._in_background(self._end(engine))

    async def _end(self, engine: EngineProcess) -> None:
        await asyncio.wait([engine.started])
        if engine.started.exception() is None:
            await engine.end()
        self._alive.discard(engine)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    # Room.

    async def _make_room(self, room: _Room) -> None:
        """Put idle engines to sleep while only GPUs lack memory, then end them while any does.

        Sleepers move into the host's memory, so a shortage there ends engines at once.
        """
        for key, engine in self._idle_by_age():
            if self._fits_gpus(room) or not self._fits_here(room):
                break
            if room.gpu_bytes.keys() & key.devices:
                await asyncio.shield(self._in_background(self._put_to_sleep(key, engine)))
        await self._end_idle(lambda: self._fits_here(room) and self._fits_gpus(room))

    async def _put_to_sleep(self, key: _Key, engine: EngineProcess) -> None:
        """Let an idle engine sleep; end one that does not."""
        async with engine.turn:
            if engine.users or engine.asleep or not engine.usable:
                return  # taken, or put to sleep or ended for another one
            before = self._gpu_memory(key.devices)
            if await engine.sleep():
                after = self._gpu_memory(before)
                engine.gave_back = {
                    device: max(0, after[device].free - before[device].free) for device in after
                }
                _log.info("executor %s: put to sleep to make room", key.executor)
            else:
                _log.info("executor %s: does not sleep, ended to make room", key.executor)
                await self._discard(key, engine)

    async def _end_idle(self, enough: Callable[[], bool]) -> None:
        """End idle engines, least recently used first, until that is enough."""
        for key, engine in self._idle_by_age():
            if enough():
                return
            if engine.users or not engine.usable:
                continue  # taken, or ended, while another one ended
            _log.info("executor %s: ended to make room", key.executor)
            await asyncio.shield(self._discard(key, engine))

    def _idle_by_age(self) -> list[tuple[_Key, EngineProcess]]:
        return sorted(self._idle(), key=lambda pair: pair[1].idle_since)

    def _room_for(self, job: Job) -> _Room:
        """Return what an engine is to find when it is loaded for a task."""
        devices = job.ctx.devices if Capability.GPU in job.info.capabilities else ()
        return _Room(
            host_bytes=job.memory_bytes or int((usable_memory_bytes() or 0) * _HOST_SHARE),
            gpu_bytes={
                device: job.gpu_memory_bytes or int(memory.total * _GPU_SHARE)
                for device, memory in self._gpu_memory(devices).items()
            },
        )

    def _fits_here(self, room: _Room) -> bool:
        free = available_memory_bytes()
        return free is None or free >= room.host_bytes

    def _fits_gpus(self, room: _Room) -> bool:
        memory = self._gpu_memory(room.gpu_bytes)
        return all(memory[device].free >= room.gpu_bytes[device] for device in memory)

    def _gpu_memory(self, devices: Iterable[str]) -> dict[str, GpuMemory]:
        """Return the memory of each GPU that says it."""
        found = {device: self._gpus.memory_bytes(device) for device in devices}
        return {device: memory for device, memory in found.items() if memory is not None}


def _give_up(run: asyncio.Task[Outcome], answer: asyncio.Future[Outcome]) -> None:
    if answer.cancelled():
        run.cancel()


def _without_shortage(engine: EngineProcess, outcome: Outcome) -> Outcome:
    """Return an outcome, or raise when it says that memory ran out."""
    if isinstance(outcome.error, CrashError):  # of what the executor itself had started
        engine.usable = False
    if outcome.error is not None and is_out_of_memory(outcome.error):
        engine.usable = False  # what it still holds is anybody's guess
        raise CrashError(str(outcome.error), oom=True) from outcome.error
    return outcome
