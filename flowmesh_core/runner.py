"""Run one task: resolve its executor, gather its inputs, run it in a place, within its time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import Attempt
from flowmesh_core.config import Settings, load_plugin_settings, read_environment
from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    PluginError,
)
from flowmesh_core.executor import Capability, ExecutorInfo, Outcome, RunContext, RunResult
from flowmesh_core.inputs import Inputs, hub_cache_folder, resolve_inputs
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Place
from flowmesh_core.plugins import ExecutorRegistry, Plugins, import_target, load_driver
from flowmesh_core.templates import render_env
from flowmesh_core.validation import validate_model
from flowmesh_core.wire import encode_json, utc_now

__all__ = ["Runner"]

_log = logging.getLogger(__name__)
# How long an executor that was asked to stop may take before its coroutine is cancelled.
_STOP_GRACE_S = 5.0

ProgressListener = Callable[[str, Mapping[str, Any]], None]


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@attrs.define(eq=False)
class _Run:
    """What the runner holds about a task while it runs."""

    task: Task
    attempt: Attempt
    deadline: float | None
    engines: frozenset[str] = frozenset()
    cancelled: bool = False
    reason: str = ""
    retriable: bool = False
    stop: asyncio.Future[None] = attrs.field(factory=_new_future)
    children: int = 0
    mask: SecretMask = attrs.field(factory=lambda: SecretMask({}))

    def log(self, level: str, message: str) -> None:
        """Append to the task's log; one write, so that lines of several threads stay whole."""
        line = f"{utc_now()} {level.upper()} {self.mask.text(message)}\n"
        with (self.attempt.folder / "logs" / "task.log").open("a", encoding="utf-8") as file:
            file.write(line)


class Runner:
    """Runs tasks in slots.

    Args:
        settings: Slots, time limits, the operator's allow-lists.
        plugins: For observers and model sources.
        registry: Finds executors.
        fetcher: Downloads and unpacks.
        devices: GPU indexes that tasks may use.
        on_progress: Gets a task id and what its executor reported.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        registry: ExecutorRegistry,
        fetcher: Fetcher,
        *,
        devices: tuple[str, ...] = (),
        on_progress: ProgressListener = lambda _task_id, _values: None,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._registry = registry
        self._fetcher = fetcher
        self._devices = devices
        self._on_progress = on_progress
        self._slots = asyncio.Semaphore(settings.max_concurrent_tasks)
        self._busy = 0
        self._runs: dict[str, _Run] = {}
        self._places: dict[str, Place] = {}
        self._models: dict[str, Any] = {}
        self._plugin_settings: dict[str, Any] = {}
        self._services: set[asyncio.Task[Any]] = set()

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return self._busy >= self._settings.max_concurrent_tasks

    @contextlib.asynccontextmanager
    async def slot(self) -> Any:
        """Wait for a slot, first come first served, and hold it."""
        async with self._slots:
            self._busy += 1
            try:
                yield
            finally:
                self._busy -= 1

    def cancel(self, task_id: str, reason: str, *, retriable: bool = False) -> bool:
        """Ask a running task to stop; return whether it was running.

        Args:
            task_id: The task.
            reason: What its error says.
            retriable: Whether another worker should take it.
        """
        run = self._runs.get(task_id)
        if run is None:
            return False
        run.cancelled, run.reason, run.retriable = True, reason, retriable
        if not run.stop.done():
            run.stop.set_result(None)
        return True

    async def run(self, task: Task, attempt: Attempt) -> Outcome:
        """Run one task to its outcome; whatever goes wrong is in the outcome."""
        limits = (self._settings.task_timeout_s, task.common.timeout_s)
        allowed = [limit for limit in limits if limit is not None]
        deadline = time.monotonic() + min(allowed) if allowed else None
        return await self._run(_Run(task, attempt, deadline))

    async def _run(self, run: _Run) -> Outcome:
        task = run.task
        self._runs[task.task_id] = run
        started = time.monotonic()
        about = {"task_id": task.task_id, "task_type": task.task_type}
        self._plugins.observe("flowmesh_before_task", metadata=task.metadata, **about)
        try:
            outcome = await self._execute(run)
        except Exception as exc:  # noqa: BLE001 - executor boundary: every failure is an outcome
            outcome = Outcome(error=_as_error(run, exc))
        finally:
            del self._runs[task.task_id]
        outcome = _masked(outcome, run.mask)
        runtime_s = time.monotonic() - started
        self._plugins.observe("flowmesh_after_task", outcome=outcome, runtime_s=runtime_s, **about)
        return outcome

    async def _execute(self, run: _Run) -> Outcome:
        task = run.task
        info = self._registry.resolve(
            task.task_type,
            task.spec,
            enforce_cpu=task.common.enforce_cpu,
            executor=task.common.executor,
        )
        spec: Any = task.spec
        if b"${" in encode_json(spec):  # most documents name no secret, and this look is cheap
            spec, secrets = render_env(spec, self._settings.env_allow, read_environment())
            run.mask = SecretMask(secrets)
        model = self._spec_model(info)
        where = f"task {task.task_id}"
        checked = validate_model(model, spec, where=where, prefix="spec") if model else spec
        inputs = await self._gather(run, info, spec)
        ctx = self._context(run, info, checked, inputs)
        place = self._place(info)
        await place.stage_in(())
        outcome = await self._within_time(run, info, place, ctx)
        await place.collect(run.attempt.folder)
        return outcome

    def _spec_model(self, info: ExecutorInfo) -> Any:
        if info.name not in self._models:
            self._models[info.name] = import_target(info.spec) if info.spec else None
        return self._models[info.name]

    async def _gather(self, run: _Run, info: ExecutorInfo, spec: Any) -> Inputs:
        if not info.inputs:
            return Inputs()
        task = attrs.evolve(run.task, spec=spec)
        environ = read_environment()
        return await asyncio.to_thread(
            resolve_inputs,
            task,
            info.inputs,
            fetcher=self._fetcher,
            folder=run.attempt.folder,
            sources=self._plugins.model_sources(),
            trust_remote_code=self._settings.trust_remote_code,
            default_identifier=environ.get(info.default_model) if info.default_model else None,
            hub_cache=hub_cache_folder(environ),
            offline=self._settings.hub_offline,
        )

    def _context(self, run: _Run, info: ExecutorInfo, spec: Any, inputs: Inputs) -> RunContext:
        loop = asyncio.get_running_loop()
        task_id = run.task.task_id

        def start_child(child: Mapping[str, Any]) -> Future[Outcome]:
            return asyncio.run_coroutine_threadsafe(self._run_child(run, info, child), loop)

        return RunContext(
            task_id=task_id,
            task_type=run.task.task_type,
            spec=spec,
            raw_spec=run.task.spec,
            metadata=run.task.metadata,
            folder=run.attempt.folder,
            inputs=inputs,
            attempt=run.attempt.number,
            previous=run.attempt.previous,
            settings=self._settings_for(info),
            devices=() if run.task.common.enforce_cpu else self._devices,
            deadline=run.deadline,
            clock=time.monotonic,
            is_cancelled=lambda: run.cancelled,
            on_progress=lambda values: self._on_progress(task_id, run.mask.value(values)),
            on_log=run.log,
            start_child=start_child,
        )

    def _settings_for(self, info: ExecutorInfo) -> Any:
        if info.settings and info.name not in self._plugin_settings:
            model = import_target(info.settings)
            self._plugin_settings[info.name] = load_plugin_settings(model, plugin=info.name)
        return self._plugin_settings.get(info.name)

    def _place(self, info: ExecutorInfo) -> Place:
        problems = []
        for name in info.places:
            if name in self._places:
                return self._places[name]
            try:
                driver = load_driver("flowmesh.places", name)
            except PluginError as exc:
                problems.append(str(exc))
                continue
            place: Place = driver(self._registry.load_class)
            return self._places.setdefault(name, place)
        raise PluginError(f"executor {info.name!r} can run in none of its places: {problems}")

    async def _within_time(
        self, run: _Run, info: ExecutorInfo, place: Place, ctx: RunContext
    ) -> Outcome:
        ready: asyncio.Future[RunResult] | None = None
        if Capability.SERVICE in info.capabilities:
            loop = asyncio.get_running_loop()
            future = ready = loop.create_future()
            ctx.on_ready = lambda result: _resolve_threadsafe(loop, future, result)
        work = asyncio.ensure_future(place.run(info, ctx))
        waiting: list[asyncio.Future[Any]] = [work, run.stop]
        if ready is not None:
            waiting.append(ready)
        await asyncio.wait(waiting, timeout=ctx.remaining_s, return_when=asyncio.FIRST_COMPLETED)
        if work.cancelled():
            raise ExecutionError("the executor cancelled itself")
        if work.done() and not (run.cancelled and work.exception()):
            return work.result()
        if ready is not None and ready.done():
            self._lease(work)
            answer = ready.result()
            return answer if isinstance(answer, Outcome) else Outcome(result=answer)
        return await self._stop(run, work)

    def _lease(self, work: asyncio.Task[Outcome]) -> None:
        """Keep a service running after its task has succeeded, until the runner closes."""
        self._services.add(work)
        work.add_done_callback(self._services.discard)

    async def _stop(self, run: _Run, work: asyncio.Task[Outcome]) -> Outcome:
        """Ask first, then cancel; a cancelled task that still answers in time has answered."""
        error: FlowmeshError
        if run.cancelled:
            error = CancelledError(run.reason, retriable=run.retriable)
        else:
            error = DeadlineError(f"task {run.task.task_id} did not end before its deadline")
            run.cancelled = True
        await asyncio.wait({work}, timeout=_STOP_GRACE_S)
        if not work.done():
            work.cancel()
            await asyncio.wait({work}, timeout=_STOP_GRACE_S)
        if work.done() and not work.cancelled() and work.exception() is None:
            _log.info("task %s ended while it was being stopped", run.task.task_id)
        raise error

    async def _run_child(
        self, parent: _Run, info: ExecutorInfo, spec: Mapping[str, Any]
    ) -> Outcome:
        parent.children += 1
        number = parent.children
        child = parse_task({"spec": spec}, task_id=f"{parent.task.task_id}-child-{number}")
        folder = parent.attempt.folder / "children" / str(number)
        (folder / "logs").mkdir(parents=True)
        attempt = Attempt(task_id=child.task_id, number=1, folder=folder, final=folder)
        engines = parent.engines | {info.name}
        run = _Run(child, attempt, parent.deadline, engines=engines)
        wanted = self._registry.resolve(child.task_type, child.spec)
        if wanted.name in engines and Capability.CONCURRENT not in wanted.capabilities:
            raise PluginError(
                f"executor {wanted.name!r} runs one task at a time and would wait for itself"
            )
        outcome: Outcome = await self._bound_to(parent, self._run(run), run)
        return outcome

    async def _bound_to(
        self, parent: _Run, work: Coroutine[Any, Any, Outcome], run: _Run
    ) -> Outcome:
        """Run a child that is cancelled with its parent."""
        task = asyncio.ensure_future(work)
        waiting: list[asyncio.Future[Any]] = [task, parent.stop]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self.cancel(run.task.task_id, parent.reason, retriable=parent.retriable)
        return await task

    async def close(self) -> None:
        """End services and unload every engine."""
        for service in list(self._services):
            service.cancel()
        if self._services:
            await asyncio.wait(self._services, timeout=_STOP_GRACE_S)
        for place in self._places.values():
            await place.close()


def _resolve_threadsafe(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[RunResult], result: RunResult
) -> None:
    def resolve() -> None:
        if not future.done():
            future.set_result(result)

    loop.call_soon_threadsafe(resolve)


def _as_error(run: _Run, exc: Exception) -> FlowmeshError:
    if isinstance(exc, FlowmeshError):
        return exc
    with contextlib.suppress(OSError):
        run.log("error", "".join(traceback.format_exception(exc)))
    _log.debug("task %s: executor raised", run.task.task_id, exc_info=exc)
    # What the machine did may pass; what the code or the document did will not.
    retriable = isinstance(exc, (OSError, MemoryError))
    return ExecutionError(f"{type(exc).__name__}: {exc}", retriable=retriable)


def _masked(outcome: Outcome, mask: SecretMask) -> Outcome:
    error = outcome.error
    if error is not None and mask.text(str(error)) != str(error):
        masked = ExecutionError(mask.text(str(error)), retriable=error.retriable)
        masked.code = error.code
        error = masked
    return attrs.evolve(outcome, result=mask.value(outcome.result), error=error)
