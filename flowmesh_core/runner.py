"""Run one task: reserve what it needs, run it in a place within its time, end what it started."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import traceback
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from typing import Any, TypeVar

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import Attempt
from flowmesh_core.batches import holds_files
from flowmesh_core.checking import check_result
from flowmesh_core.config import Settings
from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import (
    CrashError,
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    PluginError,
)
from flowmesh_core.executor import (
    Capability,
    ExecutorInfo,
    Outcome,
    RunContext,
    RunResult,
)
from flowmesh_core.inputs import Inputs
from flowmesh_core.masking import SecretMask
from flowmesh_core.merge import group_key, work_key
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.places.settle import as_execution_error
from flowmesh_core.plugins import Plugins
from flowmesh_core.preparation import Preparation
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.reservations import Reservation, Reservations, Stop
from flowmesh_core.resources import ResourceLedger, parse_resources
from flowmesh_core.result_cache import ResultCache, result_key
from flowmesh_core.task_log import TaskLog
from flowmesh_core.task_progress import ProgressRecorder

__all__ = ["Runner", "RunnerEvents"]

_log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
# How long a place may take to end what was given up.
_END_S = 20.0
# How often a clock is looked at that a test moves.
_LOOK_S = 0.01


@attrs.frozen(kw_only=True)
class RunnerEvents:
    """Who is told what happens while tasks run; called from any thread.

    Attributes:
        on_progress: Gets a task id and what its executor reported, a few times a second.
        on_output: Gets a task id, the stream, the offset in its file and the bytes.
        progress_interval_s: Least seconds between two reports of one task.
    """

    on_progress: Callable[[str, Mapping[str, Any]], None] = lambda _task_id, _values: None
    on_output: Callable[[str, str, int, bytes], None] = lambda *_output: None
    progress_interval_s: float = 0.2


@attrs.define(eq=False)
class _Run:
    """What the runner holds about a task while it runs."""

    task: Task
    attempt: Attempt
    reservation: Reservation
    deadline: float | None
    clock: Callable[[], float]
    stop: Stop
    log: TaskLog
    progress: ProgressRecorder
    inline: frozenset[str] = frozenset()
    is_child: bool = False
    seated: bool = False
    stopping: bool = False
    children: int = 0
    offspring: dict[str, Stop] = attrs.field(factory=dict)
    living: set[asyncio.Task[Outcome]] = attrs.field(factory=set)
    mask: SecretMask = attrs.field(factory=lambda: SecretMask({}))

    def remaining_s(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - self.clock())

    @property
    def jumps(self) -> bool:
        """Whether its clock is a test's, which no waiting moves."""
        return self.clock is not time.monotonic

    async def wait(self, waiting: Sequence[asyncio.Future[Any]]) -> None:
        """Wait for the first of several, not longer than the task may take."""
        while True:
            left_s = self.remaining_s()
            limit_s = min(left_s, _LOOK_S) if left_s and self.jumps else left_s
            done, _ = await asyncio.wait(
                waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if done or not left_s or not self.jumps:
                return

    @property
    def owner(self) -> object:
        """Who does its work: the batch in which it has a seat, or it alone."""
        seats = self.reservation.seats
        return self if seats is None or self.seated else seats.batch

    def give_up_seat(self) -> None:
        """Run alone, or not at all; harmless when it has taken its seat."""
        if self.reservation.seats is not None and not self.seated:
            self.seated = True
            self.reservation.seats.give_up()

    def too_late(self) -> DeadlineError:
        return DeadlineError(f"task {self.task.task_id} did not end before its deadline")

    def close(self) -> None:
        self.progress.close()
        self.log.close()


class Runner:
    """Runs tasks within what the machine has.

    Args:
        settings: Time limits, the operator's allow-lists.
        plugins: For observers and model sources.
        registry: Finds executors.
        fetcher: Downloads and unpacks.
        ledger: The machine's slots, memory and GPUs.
        places: What places are told about the worker.
        events: Who is told what happens.
        clock: Monotonic seconds that time limits count, and executors in this process too.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        registry: ExecutorRegistry,
        fetcher: Fetcher,
        *,
        ledger: ResourceLedger,
        places: PlaceContext,
        events: RunnerEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._registry = registry
        self._preparation = Preparation(settings, plugins, registry, fetcher, places=places)
        self._reservations = Reservations(
            ledger, window_s=settings.group_window_s, most=settings.group_max
        )
        self._events = events or RunnerEvents()
        self._clock = clock
        self._stops: dict[str, Stop] = {}
        self._services: dict[str, asyncio.Task[None]] = {}
        self._cached: set[str] = set()
        self._cache = (
            ResultCache(settings.result_cache, settings.result_cache_max_bytes)
            if settings.result_cache
            else None
        )

    @property
    def full(self) -> bool:
        """Whether another task would have to wait."""
        return self._reservations.full

    @property
    def services(self) -> Mapping[str, asyncio.Task[None]]:
        """Services that are up, by the id of the task that started each."""
        return self._services

    # Take in, reserve, cancel.

    def admit(self, task_ids: Iterable[str]) -> None:
        """Let tasks be cancelled from now on, before they start too."""
        for task_id in task_ids:
            if task_id in self._services:
                self.cancel(task_id, "it was dispatched again")
            self._stops[task_id] = Stop()

    def dismiss(self, task_ids: Iterable[str]) -> None:
        """Forget tasks that have ended."""
        for task_id in task_ids:
            self._cached.discard(task_id)
            if task_id not in self._services:
                self._stops.pop(task_id, None)

    def cancel(self, task_id: str, reason: str, *, retriable: bool = False) -> bool:
        """Ask a task, or the service that it started, to stop; return whether it is here.

        Args:
            task_id: The task; when it has not started it never will.
            reason: What its error says.
            retriable: Whether another worker should take it.
        """
        stop = self._stops.get(task_id)
        if stop is None:
            return False
        stop.ask(reason, retriable=retriable)
        return True

    def cancel_all(self, reason: str, *, retriable: bool) -> None:
        """Ask every task that is here to stop, started or not."""
        for stop in self._stops.values():
            stop.ask(reason, retriable=retriable)

    def reserve(
        self, task: Task, *, size: int = 1
    ) -> contextlib.AbstractAsyncContextManager[Reservation]:
        """Wait for what a dispatch needs, and hold it.

        Args:
            task: Its leader.
            size: How many members it has.

        Raises:
            FlowmeshError: No executor serves the task, the machine can never meet the request,
                or the task was cancelled while it waited.
        """
        info, stop = self._resolve(task), self._stops[task.task_id]
        return self._reservations.hold(task, info, stop, size=size)

    def _resolve(self, task: Task) -> ExecutorInfo:
        return self._registry.resolve(
            task.task_type,
            task.spec,
            enforce_cpu=task.common.enforce_cpu,
            executor=task.common.executor,
        )

    # What runs members of one dispatch asks.

    def takes_several(self, task: Task) -> bool:
        """Whether a task's executor takes several at once; a task without one will be told."""
        try:
            return Capability.CONCURRENT in self._resolve(task).capabilities
        except FlowmeshError:
            return True

    def is_stopped(self, task_id: str) -> bool:
        """Whether somebody has asked a task to stop."""
        return self._stops[task_id].asked.done()

    def is_cached(self, task_id: str) -> bool:
        """Whether a task got the kept result of the same work."""
        return task_id in self._cached

    # Run.

    async def run(self, task: Task, attempt: Attempt, reservation: Reservation) -> Outcome:
        """Run one task to its outcome; whatever goes wrong is in the outcome."""
        limits = (self._settings.task_timeout_s, task.common.timeout_s)
        allowed = [limit for limit in limits if limit is not None]
        deadline = self._clock() + min(allowed) if allowed else None
        stop = self._stops[task.task_id]
        return await self._run(self._begin(task, attempt, reservation, deadline, stop))

    def _begin(
        self,
        task: Task,
        attempt: Attempt,
        reservation: Reservation,
        deadline: float | None,
        stop: Stop,
        inline: frozenset[str] = frozenset(),
    ) -> _Run:
        task_id, events = task.task_id, self._events
        log = TaskLog(
            attempt.folder,
            mask=lambda: run.mask,
            publish=lambda *output: events.on_output(task_id, *output),
            max_bytes=self._settings.task_log_max_bytes,
        )
        progress = ProgressRecorder(
            attempt.folder,
            # Nobody who hears of progress knows the task that a task started.
            lambda values: None if run.is_child else events.on_progress(task_id, values),
            interval_s=events.progress_interval_s,
        )
        run = _Run(task, attempt, reservation, deadline, self._clock, stop, log, progress, inline)
        return run

    async def _run(self, run: _Run) -> Outcome:
        task = run.task
        started = self._clock()
        about = {"task_id": task.task_id, "task_type": task.task_type}
        self._plugins.observe("flowmesh_before_task", metadata=task.metadata, **about)
        try:
            run.stop.check()
            outcome = await self._execute(run)
        except Exception as exc:  # noqa: BLE001 - executor boundary: every failure is an outcome
            outcome = Outcome(error=_as_error(run, exc))
        finally:
            if task.task_id not in self._services:  # a service may go on starting tasks
                await self._end_offspring(run)
            run.close()
            run.give_up_seat()
        outcome = _masked(outcome, run.mask)
        runtime_s = self._clock() - started
        self._plugins.observe("flowmesh_after_task", outcome=outcome, runtime_s=runtime_s, **about)
        return outcome

    async def _execute(self, run: _Run) -> Outcome:
        task, prepare = run.task, self._preparation
        info = self._resolve(task)
        spec = task.spec
        if not run.is_child:  # its spec may hold text that its parent read anywhere
            spec, mask = prepare.put_secrets_in(task)
            run.mask = run.mask.joined(mask)
        checked = prepare.check_spec(info, task, spec)
        inputs = await _in_time(run, prepare.gather(info, task, spec, run.attempt.folder))
        work = functools.partial(self._run_in_place, run, info, spec, checked, inputs)
        if self._cache is None:
            return await work()
        return await self._once(self._cache, run, info, spec, inputs, work)

    async def _run_in_place(
        self, run: _Run, info: ExecutorInfo, spec: Mapping[str, Any], checked: Any, inputs: Inputs
    ) -> Outcome:
        place_name, place = self._preparation.find_place(info)
        if place_name == "inline":
            run.inline |= {info.name}
        previous = [run.attempt.previous] if run.attempt.previous else []
        there = await place.stage_in([run.attempt.folder, *inputs.paths(), *previous])
        ctx = self._context(run, info, checked, inputs.moved(there), there)
        request = run.reservation.request
        job = Job(
            info=info,
            spec=spec,
            ctx=ctx,
            log=run.log,
            mask=run.mask,
            variables=self._preparation.variables_for(info),
            memory_bytes=request.memory_bytes,
            gpu_memory_bytes=request.gpu_memory_bytes,
        )
        try:
            outcome = await self._within_memory(run, place, job)
        finally:
            await place.collect(run.attempt.folder)
        await _warn_of_misfit(run, info, outcome)
        return outcome

    async def _once(
        self,
        cache: ResultCache,
        run: _Run,
        info: ExecutorInfo,
        spec: Mapping[str, Any],
        inputs: Inputs,
        work: Callable[[], Awaitable[Outcome]],
    ) -> Outcome:
        """Take the result of the same work if there is one, else do it and keep its result."""
        task = attrs.evolve(run.task, spec=spec)
        key = await _in_time(run, asyncio.to_thread(result_key, info, task, inputs))
        if key is None:
            return await work()
        while (other := cache.in_flight(key)) and other.owner is not run.owner:
            run.give_up_seat()  # whoever does the work may be waiting for it
            await _in_time(run, asyncio.wait([other.ended]))
            if other.unkeepable:
                return await work()
        with cache.flight(key, run.owner) as flight:
            found = await asyncio.to_thread(cache.find, key)
            if found is not None:
                self._cached.add(task.task_id)
                run.log.line("info", f"result of task {found.result['cached']['task_id']} used")
                return found
            outcome = await work()
            if outcome.ok and outcome.result.get("ok") is not False:
                kept = await asyncio.to_thread(_keep, cache, key, run, outcome)
                flight.unkeepable = not kept
        await asyncio.to_thread(cache.make_room)
        return outcome

    def _context(
        self, run: _Run, info: ExecutorInfo, spec: Any, inputs: Inputs, there: Mapping[Any, Any]
    ) -> RunContext:
        loop = asyncio.get_running_loop()
        previous = run.attempt.previous

        def start_child(child: Mapping[str, Any]) -> Future[Outcome]:
            return asyncio.run_coroutine_threadsafe(self._run_child(run, child), loop)

        return RunContext(
            task_id=run.task.task_id,
            task_type=run.task.task_type,
            spec=spec,
            raw_spec=run.task.spec,
            metadata=run.task.metadata,
            folder=there[run.attempt.folder],
            final_folder=run.attempt.final,
            inputs=inputs,
            attempt=run.attempt.number,
            previous=previous and there[previous],
            settings=self._preparation.settings_for(info),
            devices=run.reservation.devices if Capability.GPU in info.capabilities else (),
            deadline=run.deadline,
            clock=run.clock,
            is_cancelled=lambda: run.stopping,
            on_progress=lambda values: run.progress.report(run.mask.value(values)),
            on_log=run.log.line,
            start_child=start_child,
        )

    async def _within_memory(self, run: _Run, place: Place, job: Job) -> Outcome:
        try:
            return await self._within_time(run, place, job)
        except CrashError as exc:
            if not job.shrink(exc):
                raise
            return await self._within_time(run, place, job)

    async def _within_time(self, run: _Run, place: Place, job: Job) -> Outcome:
        ctx = job.ctx
        ready: asyncio.Future[tuple[RunResult, float | None]] | None = None
        if Capability.SERVICE in job.info.capabilities:
            loop = asyncio.get_running_loop()
            future = ready = loop.create_future()
            ctx.on_ready = lambda *answer: _resolve_threadsafe(loop, future, answer)
        work = asyncio.ensure_future(self._begin_work(run, place, job))
        waiting: list[asyncio.Future[Any]] = [work, run.stop.asked]
        if ready is not None:
            waiting.append(ready)
        await run.wait(waiting)
        if work.cancelled():
            raise ExecutionError("the executor cancelled itself")
        # By a clock that jumps, what ended after the deadline is late however soon that was.
        late = run.jumps and run.remaining_s() == 0
        if work.done() and not late and not (run.stop.asked.done() and work.exception()):
            return work.result()
        if ready is not None and ready.done():
            answer, ttl_s = ready.result()
            self._lease(run, place, work, ttl_s)
            return answer if isinstance(answer, Outcome) else Outcome(result=answer)
        if run.stop.asked.done():
            error: FlowmeshError = run.stop.error()
        else:
            error = run.too_late()
        await self._stop(run, place, work)
        raise error

    async def _begin_work(self, run: _Run, place: Place, job: Job) -> Outcome:
        seats, group = run.reservation.seats, group_key(job.info, run.task)
        if seats is None or group is None or run.seated:
            return await place.run(job)
        run.seated = True
        seats.use()
        return await seats.batch.submit(place, job, group=group, work=work_key(run.task))

    async def _stop(self, run: _Run, place: Place, work: asyncio.Task[Outcome]) -> None:
        """Ask first; what has not ended after the grace is given up, and ended by its place."""
        run.stopping = True
        place.stop(run.task.task_id)
        grace_s = self._settings.cancel_grace_s
        await asyncio.wait({work}, timeout=grace_s)
        if not work.done():
            work.cancel()
            await asyncio.wait({work}, timeout=_END_S)
        if work.done() and not work.cancelled() and work.exception() is None:
            _log.info("task %s ended while it was being stopped", run.task.task_id)

    # Services.

    def _lease(
        self, run: _Run, place: Place, work: asyncio.Task[Outcome], ttl_s: float | None
    ) -> None:
        """Keep a service running after its task has succeeded."""
        task_id = run.task.task_id
        run.reservation.keep()
        service = asyncio.ensure_future(self._serve(run, place, work, ttl_s))
        self._services[task_id] = service
        service.add_done_callback(lambda done: self._end_lease(run, done))

    def _end_lease(self, run: _Run, service: asyncio.Task[None]) -> None:
        task_id = run.task.task_id
        if self._services.get(task_id) is service:
            del self._services[task_id]
        if self._stops.get(task_id) is run.stop:
            del self._stops[task_id]
        run.reservation.release()

    async def _serve(
        self, run: _Run, place: Place, work: asyncio.Task[Outcome], ttl_s: float | None
    ) -> None:
        task_id = run.task.task_id
        waiting: list[asyncio.Future[Any]] = [work, run.stop.asked]
        await asyncio.wait(waiting, timeout=ttl_s, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            _log.info("service of task %s: stopping", task_id)
            await self._stop(run, place, work)
        elif not work.cancelled() and (error := work.exception() or work.result().error):
            _log.error("service of task %s ended: %s", task_id, run.mask.text(str(error)))
        await self._end_offspring(run)

    # Tasks that a task starts.

    async def _run_child(self, parent: _Run, spec: Mapping[str, Any]) -> Outcome:
        """Run a task within its parent's slot, devices, deadline and cancel."""
        parent.children += 1
        number = parent.children
        child = parse_task({"spec": spec}, task_id=f"{parent.task.task_id}-child-{number}")
        info = self._resolve(child)
        if info.name in parent.inline and Capability.CONCURRENT not in info.capabilities:
            raise PluginError(
                f"executor {info.name!r} runs one task at a time and would wait for itself"
            )
        begun = parent.attempt.folder.exists()  # a service's folder is committed by then
        home = parent.attempt.folder if begun else parent.attempt.final
        folder = home / "children" / str(number)
        (folder / "logs").mkdir(parents=True)
        attempt = Attempt(task_id=child.task_id, number=1, folder=folder, final=folder)
        where = f"task {child.task_id}"
        request = parse_resources(child.common.resources, where=where)
        reservation = parent.reservation.lent(request)
        self.admit([child.task_id])
        stop = parent.offspring[child.task_id] = self._stops[child.task_id]
        limit_s = child.common.timeout_s
        ends = [parent.deadline, None if limit_s is None else self._clock() + limit_s]
        deadline = min((end for end in ends if end is not None), default=None)
        run = self._begin(child, attempt, reservation, deadline, stop, parent.inline)
        run.mask, run.is_child = parent.mask, True
        outcome = await self._bound_to(parent, self._run(run), stop, child.task_id)
        return attrs.evolve(outcome, folder=folder)

    async def _bound_to(
        self, parent: _Run, work: Coroutine[Any, Any, Outcome], stop: Stop, task_id: str
    ) -> Outcome:
        """Run a child that is cancelled with its parent, or when its parent gives it up."""
        task = asyncio.ensure_future(work)
        parent.living.add(task)
        task.add_done_callback(lambda _: self.dismiss([task_id]))
        waiting: list[asyncio.Future[Any]] = [task, parent.stop.asked]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            stop.ask("the task that started it has given it up", retriable=False)
            raise
        if not task.done():
            stop.ask(parent.stop.reason, retriable=parent.stop.retriable)
        return await asyncio.shield(task)

    async def _end_offspring(self, run: _Run) -> None:
        """End the tasks that a task started and left, and their services."""
        for stop in run.offspring.values():
            stop.ask("the task that started it has ended", retriable=False)
        services = [self._services[key] for key in run.offspring if key in self._services]
        living: list[asyncio.Task[Any]] = [*run.living, *services]
        if living:
            await asyncio.wait(living)

    async def close(self) -> None:
        """End services and unload every engine."""
        for task_id in list(self._services):
            self.cancel(task_id, "the worker is stopping")
        if self._services:
            await asyncio.wait(list(self._services.values()))
        await self._preparation.close()


async def _in_time(run: _Run, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Wait for work that cannot be stopped, but not longer than its task may wait."""
    task = asyncio.ensure_future(work)
    either: list[asyncio.Future[Any]] = [task, run.stop.asked]
    await run.wait(either)
    if task.done():
        return task.result()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    run.stop.check()
    raise run.too_late()


async def _warn_of_misfit(run: _Run, info: ExecutorInfo, outcome: Outcome) -> None:
    """Say what readers of the result will miss; what was computed is not thrown away for that."""
    if not info.result or not outcome.ok:
        return
    if problems := await asyncio.to_thread(check_result, info, outcome.result):
        told = run.mask.text("; ".join(problems))
        task_id, name = run.task.task_id, info.name
        _log.warning("task %s: not the result that %s declares: %s", task_id, name, told)


def _keep(cache: ResultCache, key: str, run: _Run, outcome: Outcome) -> bool:
    if holds_files(run.attempt.folder):
        return False
    return cache.keep(key, run.task.task_id, _masked(outcome, run.mask))


def _resolve_threadsafe(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any
) -> None:
    def resolve() -> None:
        if not future.done():
            future.set_result(result)

    loop.call_soon_threadsafe(resolve)


def _as_error(run: _Run, exc: Exception) -> FlowmeshError:
    if not isinstance(exc, FlowmeshError):
        run.log.line("error", "".join(traceback.format_exception(exc)))
        _log.debug("task %s: executor raised", run.task.task_id, exc_info=exc)
    return as_execution_error(exc)


def _masked(outcome: Outcome, mask: SecretMask) -> Outcome:
    error = outcome.error
    if error is not None and mask.text(str(error)) != str(error):
        masked = ExecutionError(mask.text(str(error)), retriable=error.retriable)
        masked.code = error.code
        error = masked
    return attrs.evolve(outcome, result=mask.value(outcome.result), error=error)
