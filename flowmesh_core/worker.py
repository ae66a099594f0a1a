"""The way of one task, from bytes to its last event; the only module that knows every step.

Receive, parse, resolve and run, share out, write whole, deliver, report. Nothing that arrives can
end the process: what cannot be read is refused by event or dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.artifacts.archive import PackOptions
from flowmesh_core.artifacts.download_cache import DownloadCache
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import (
    CANCEL,
    Envelope,
    Task,
    check_task_id,
    find_task_id,
    parse_control,
    parse_envelope,
    parse_message,
)
from flowmesh_core.errors import (
    ArtifactError,
    CancelledError,
    ContractError,
    ExecutionError,
    FlowmeshError,
    UploadError,
)
from flowmesh_core.events import TASK_STARTED, TASK_SUCCEEDED, TaskEvent, task_payload
from flowmesh_core.executor import Outcome
from flowmesh_core.housekeeping.cleaning import build_cleaner
from flowmesh_core.housekeeping.journal import Hold, Journal
from flowmesh_core.ledger import Finished, TaskLedger, Verdict
from flowmesh_core.members import run_members
from flowmesh_core.merge import failure_document, group_block, share_out
from flowmesh_core.places.base import PlaceContext
from flowmesh_core.plugins import Plugins, load_driver, load_plugins
from flowmesh_core.presence import Presence
from flowmesh_core.reservations import Reservation
from flowmesh_core.resources import ResourceLedger
from flowmesh_core.runner import Runner, RunnerEvents
from flowmesh_core.stores.base import Store
from flowmesh_core.telemetry.probes import GpuReader, usable_cores, usable_memory_bytes
from flowmesh_core.transports.base import Delivery, Transport
from flowmesh_core.wire import utc_now

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
_FLUSH_S = 10.0


@attrs.define(eq=False)
class _Report:
    """What the events of one dispatch say.

    Attributes:
        hold: Keeps the folders of its tasks from being removed.
    """

    envelope: Envelope
    hold: Hold
    started_at: str = attrs.field(factory=utc_now)
    started: float = attrs.field(factory=time.monotonic)
    begun: bool = False

    def payload(self) -> dict[str, Any]:
        return task_payload(
            self.envelope.task,
            started_at=self.started_at,
            dispatched_at=self.envelope.dispatched_at,
        )

    def ended(self) -> dict[str, Any]:
        runtime_s = time.monotonic() - self.started
        return {"runtime_sec": round(runtime_s, 6), "finished_at": utc_now()}

    def final_payload(self) -> dict[str, Any]:
        return {**self.payload(), **self.ended()}


@attrs.define(eq=False)
class _GroupRun:
    """What became of the members of a dispatch.

    Attributes:
        attempts: Folder of each member that could begin.
        outcomes: Of each member that ran.
        computed: Members whose answer is not another one's.
        answers: What each child's result will be once it is written and delivered.
    """

    attempts: dict[str, Attempt] = attrs.field(factory=dict)
    outcomes: dict[str, Outcome] = attrs.field(factory=dict)
    computed: list[str] = attrs.field(factory=list)
    answers: dict[str, asyncio.Task[Mapping[str, Any]]] = attrs.field(factory=dict)


class Worker:
    """Takes tasks from a transport until it is told to stop.

    Args:
        settings: Everything the operator decides.
        transport: Where tasks come from; by default the one that the settings name.
        plugins: By default all that are installed and allowed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        transport: Transport | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        self.settings = settings
        self.plugins = load_plugins(settings) if plugins is None else plugins
        self.transport = transport or load_driver("flowmesh.transports", settings.transport)(
            settings
        )
        self.folders = TaskFolders(settings.results_dir, settings.allowed_dirs)
        own_folder = self.folders.worker_log(settings.worker_id).parent
        self._journal = Journal(self.folders.root, own_folder)
        self._cleaner = build_cleaner(settings)
        self.dropped = 0
        gpus = GpuReader(visible_devices=settings.visible_devices)
        self._gpus = gpus.list_gpus()
        self.registry = self.plugins.build_registry(settings, gpu_count=len(self._gpus))
        self._presence = Presence(
            settings, self.transport, self.plugins, gpus=gpus if self._gpus else None
        )
        self._stores: dict[str, Store] = {}
        self._artifacts = ArtifactPipeline(
            self._store_for,
            fsync=settings.fsync,
            packing=PackOptions.from_settings(settings),
            upload_optional=settings.upload_optional,
            cleanup_after_upload=settings.cleanup_after_upload,
            on_progress=self._presence.say_progress,
        )
        self._ledger = TaskLedger()
        self._handling: set[asyncio.Task[None]] = set()
        self._concluding = asyncio.Semaphore(settings.max_concurrent_tasks)
        self._draining = False
        self._hurry = asyncio.Event()
        # Made in `run`: it belongs to the event loop.
        self._runner: Runner

    async def run(self) -> None:
        """Register, work until ``stop`` is called, drain, unregister.

        Raises:
            ArtifactError: The results folder cannot be written.
            TransportError: The transport can never work with these settings.
        """
        self._journal.open()
        if self._cleaner:
            self._cleaner.start()
        self._runner = self._build_runner()
        try:
            # Subscribed first, announced second: nothing dispatched to us can be missed.
            await self.transport.open()
            if not self._draining:
                await self._presence.announce()
            async for delivery in self.transport.deliveries():
                if delivery.control:
                    self._obey(delivery)
                else:
                    self._receive(delivery)
            await self._drain()
        finally:
            await self._leave()

    def _build_runner(self) -> Runner:
        settings = self.settings
        return Runner(
            settings,
            self.plugins,
            self.registry,
            Fetcher(
                policy=NetworkPolicy.from_settings(settings),
                results_dir=self.folders.root,
                cache=DownloadCache(folder=settings.cache_dir, max_bytes=settings.cache_max_bytes)
                if settings.cache_dir
                else None,
            ),
            ledger=ResourceLedger(
                settings.max_concurrent_tasks, usable_cores(), usable_memory_bytes(), self._gpus
            ),
            places=PlaceContext(
                settings=settings,
                load_class=self.registry.load_class,
                folder=self.folders.worker_log(settings.worker_id).parent,
                plugin_files=self.plugins.files,
                pythons=self.plugins.pythons,
            ),
            events=RunnerEvents(
                on_progress=self._presence.say_progress, on_output=self._presence.say_output
            ),
        )

    def stop(self) -> None:
        """Stop taking tasks; ``run`` returns when those in hand have ended.

        A second call does not wait for them: they are cancelled.
        """
        if self._draining:
            self._hurry.set()
        self._draining = True
        self.transport.stop_receiving()

    def cancel(self, task_id: str, reason: str = "cancelled") -> bool:
        """Ask a task to stop, or never to start; return whether it is here."""
        return self._runner.cancel(task_id, reason)

    @property
    def services(self) -> Mapping[str, asyncio.Task[None]]:
        """Services that are up, by the id of the task that started each."""
        return self._runner.services

    # Receive and parse.

    def _obey(self, delivery: Delivery) -> None:
        """Do what came on the control channel."""
        try:
            control = parse_control(delivery.body)
        except ContractError as exc:
            _log.warning("%s", exc)
            return
        if control.type != CANCEL:
            _log.info("told to drain: %s", control.reason or "no reason given")
            self.stop()
        elif not self.cancel(control.task_id, control.reason or "cancelled"):
            _log.info("task %s is not here; nothing to cancel", control.task_id)

    def _receive(self, delivery: Delivery) -> None:
        envelope = self._read(delivery.body)
        if envelope is None:
            return
        verdict, finished = self._ledger.accept(envelope)
        if verdict is Verdict.RUN:
            self._runner.admit(member.task_id for member in envelope.tasks)
            hold = self._journal.hold(self._find_folders(envelope))
            task = asyncio.ensure_future(self._handle(_Report(envelope, hold)))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)
        else:
            self._acknowledge(envelope, finished)

    def _read(self, body: bytes) -> Envelope | None:
        """Return what is for this worker; refuse or drop what cannot be read."""
        message: Mapping[str, Any] = {}
        try:
            message = parse_message(body)
            if message.get("assigned_worker") != self.settings.worker_id:
                return None
            return parse_envelope(message)
        except ContractError as exc:
            self._refuse(message, exc)
            return None

    def _refuse(self, message: Mapping[str, Any], error: ContractError) -> None:
        try:
            task_id = check_task_id(find_task_id(message))
        except ContractError:
            self.dropped += 1
            _log.warning(
                "dropped a message that names no task (%d so far): %s", self.dropped, error
            )
            return
        _log.warning("refused task %s: %s", task_id, error)
        self._presence.say(TaskEvent.failed(task_id, error))
        self._presence.say_status(full=self._runner.full, last_task=task_id)

    def _acknowledge(self, envelope: Envelope, finished: Finished | None) -> None:
        """Say again where a task stands that this worker holds or has finished."""
        task_id = envelope.task.task_id
        _log.info("task %s came again; it is not run twice", task_id)
        if finished is not None:
            hold = Hold(self._find_folders(envelope))
            self._presence.say(
                finished.event.model_copy(update={"ts": utc_now()}),
                self._settling(envelope, hold, ok=finished.ok),
            )
            self._presence.say_status(full=self._runner.full, last_task=task_id)
            return
        payload = task_payload(
            envelope.task, started_at=utc_now(), dispatched_at=envelope.dispatched_at
        )
        self._presence.say(TaskEvent(type=TASK_STARTED, task_id=task_id, payload=payload))

    # Run, share out, write, deliver, report.

    async def _handle(self, report: _Report) -> None:
        """Take one dispatch from its envelope to its last event."""
        envelope = report.envelope
        result: Mapping[str, Any] | None = None
        try:
            run = await self._run_reserved(report)
            # A task is written and delivered while the next one has its slot already.
            try:
                result = await self._conclude(report, run)
                await self._artifacts.deliver(envelope.task, result)
            finally:
                self._concluding.release()
        except FlowmeshError as exc:
            self._end(report, exc, result if isinstance(exc, UploadError) else None)
        except Exception as exc:  # noqa: BLE001 - nothing that arrives ends the worker
            _log.exception("task %s: unexpected failure", envelope.task.task_id)
            self._end(report, ExecutionError(f"{type(exc).__name__}: {exc}"), None)
        else:
            self._end(report, None, None)
        self._runner.dismiss(task.task_id for task in envelope.tasks)
        self._presence.say_status(full=self._runner.full, last_task=envelope.task.task_id)

    async def _run_reserved(self, report: _Report) -> _GroupRun:
        """Run with what the task needs; when it returns, the caller may conclude.

        Raises:
            FlowmeshError: The leader failed.
        """
        envelope = report.envelope
        size = len(envelope.tasks)
        async with self._runner.reserve(envelope.task, size=size) as reservation:
            self._begin(report)
            run = await self._execute(report, reservation)
            # As many as run may be concluded; when delivery is slow, tasks keep their slots.
            await self._concluding.acquire()
        return run

    def _begin(self, report: _Report) -> None:
        report.begun = True
        report.started, report.started_at = time.monotonic(), utc_now()
        task_id = report.envelope.task.task_id
        self._presence.say_status(full=self._runner.full, task_id=task_id)
        event = TaskEvent(type=TASK_STARTED, task_id=task_id, payload=report.payload())
        self._presence.say(event)

    async def _execute(self, report: _Report, reservation: Reservation) -> _GroupRun:
        """Run all members within one reservation; children are answered as they finish.

        Raises:
            FlowmeshError: The leader could not begin.
        """
        envelope, run = report.envelope, _GroupRun()
        if self._draining:
            raise CancelledError("the worker is stopping", retriable=True)
        if self._ledger.find_undelivered(envelope) is not None:
            return run
        tasks = {task.task_id: task for task in envelope.tasks}
        members = [(task, attempt) for task in envelope.tasks if (attempt := self._open(task, run))]
        if any(attempt.number > 1 for _, attempt in members):
            # A clean-up must see that what an earlier run left, long ago perhaps, is needed again.
            await asyncio.to_thread(self._journal.flush)
        async for task_id, outcome, copied in run_members(self._runner, members, reservation):
            run.outcomes[task_id] = outcome
            if not copied:
                run.computed.append(task_id)
            if task_id != envelope.task.task_id:
                answer = self._answer_child(report, tasks[task_id], run)
                run.answers[task_id] = asyncio.ensure_future(answer)
        return run

    def _open(self, task: Task, run: _GroupRun) -> Attempt | None:
        """Begin a member's attempt; one that cannot begin has its error as outcome."""
        try:
            self._store_for(task.destination.type)
            attempt = self.folders.begin(task.task_id, task.destination)
        except FlowmeshError as exc:
            run.outcomes[task.task_id] = Outcome(error=exc)
            return None
        run.attempts[task.task_id] = attempt
        return attempt

    async def _answer_child(self, report: _Report, task: Task, run: _GroupRun) -> Mapping[str, Any]:
        """Write and deliver one member, and remember it: its leader may yet fail."""
        task_id = task.task_id
        outcome = run.outcomes[task_id]
        result = await self._finish_child(task, run.attempts.get(task_id), outcome)
        if outcome.ok and result.get("ok") is not False:
            payload = task_payload(
                task, started_at=report.started_at, dispatched_at=report.envelope.dispatched_at
            )
            event = TaskEvent(
                type=TASK_SUCCEEDED,
                task_id=task_id,
                payload={**payload, **report.ended()},
            )
            finished = Finished(event=event, dispatched_at=None, spec=task.spec, ok=True)
            self._ledger.finish(task_id, finished)
        return result

    async def _conclude(self, report: _Report, run: _GroupRun) -> Mapping[str, Any]:
        """Wait for the children's answers and return the leader's written result; needs no slot.

        Raises:
            FlowmeshError: The leader failed; its children have been answered.
        """
        envelope = report.envelope
        leader = envelope.task
        if leader.task_id not in run.outcomes:
            return self._ledger.find_undelivered(envelope) or {}
        outcome = run.outcomes[leader.task_id]
        children = await self._conclude_children(report, run)
        if outcome.error is not None:
            raise outcome.error
        if children:
            group = group_block(run.outcomes, run.computed)
            outcome = attrs.evolve(
                outcome, result={**outcome.result, "children": children, "group": group}
            )
        return await self._artifacts.finish(leader, run.attempts[leader.task_id], outcome)

    async def _conclude_children(self, report: _Report, run: _GroupRun) -> dict[str, Any]:
        """Return what each child was answered, those that could not run included."""
        envelope = report.envelope
        outcomes = {key: run.outcomes[key] for key in run.outcomes if key != envelope.task.task_id}
        tasks = {task.task_id: task for task in envelope.children}
        results: dict[str, Any] = {}
        for task_id, outcome in share_out(envelope, outcomes).items():
            if task_id in run.answers:
                results[task_id] = await run.answers[task_id]
            else:
                task = tasks.get(task_id) or attrs.evolve(envelope.task, task_id=task_id)
                results[task_id] = await self._finish_child(task, None, outcome)
        return results

    async def _finish_child(
        self, task: Task, attempt: Attempt | None, outcome: Outcome
    ) -> Mapping[str, Any]:
        """Write and deliver one member; what fails here is this member's failure only."""
        try:
            if outcome.error is not None:
                raise outcome.error
            if attempt is None:
                raise ArtifactError(f"task {task.task_id} has no folder")
            result = await self._artifacts.finish(task, attempt, outcome)
        except FlowmeshError as exc:
            _log.warning("task %s, merged, failed: %s", task.task_id, exc)
            result = await self._write_failure(task, exc)
        try:
            await self._artifacts.deliver(task, result)
        except FlowmeshError as exc:  # a destination that nobody knows is no UploadError
            _log.warning("task %s, merged, could not be delivered: %s", task.task_id, exc)
        return result

    async def _write_failure(self, task: Task, error: FlowmeshError) -> Mapping[str, Any]:
        document = failure_document(error)
        try:
            attempt = self.folders.begin(task.task_id, task.destination)
            plain = attrs.evolve(task, spec={})
            return await self._artifacts.finish(plain, attempt, Outcome(result=document))
        except FlowmeshError as exc:
            _log.warning("task %s: its failure could not be written: %s", task.task_id, exc)
            return document

    def _end(
        self, report: _Report, error: FlowmeshError | None, undelivered: Mapping[str, Any] | None
    ) -> None:
        if not report.begun:
            self._begin(report)
        envelope = report.envelope
        task_id = envelope.task.task_id
        payload = report.final_payload()
        if error is None:
            event = TaskEvent(type=TASK_SUCCEEDED, task_id=task_id, payload=payload)
        else:
            _log.warning("task %s failed (%s): %s", task_id, error.code, error)
            event = TaskEvent.failed(task_id, error, payload=payload)
        self._presence.say(event, self._settling(envelope, report.hold, ok=error is None))
        finished = Finished(
            event=event,
            dispatched_at=envelope.dispatched_at,
            spec=envelope.task.spec,
            ok=error is None,
            undelivered=undelivered,
        )
        self._ledger.finish(task_id, finished)

    def _find_folders(self, envelope: Envelope) -> dict[str, Path]:
        """Return the folder of each member; one that may not have any is left out."""
        leader = envelope.task
        rejected = [attrs.evolve(leader, task_id=task_id) for task_id in envelope.rejected]
        found: dict[str, Path] = {}
        for task in (*envelope.tasks, *rejected):
            with contextlib.suppress(ContractError):  # it fails for that, in its own time
                found[task.task_id] = self.folders.task_folder(task.task_id, task.destination)
        return found

    def _settling(self, envelope: Envelope, hold: Hold, *, ok: bool) -> Callable[[], None]:
        """Return what is to be done once the last event of a dispatch has left.

        A success answers for all members, a failure for the leader alone: the others are sent
        again. While a service is up, its folder stays held.
        """
        task_id = envelope.task.task_id
        settle = partial(self._journal.settle, hold, hold.folders if ok else (task_id,))
        service = self._runner.services.get(task_id)
        if service is None:
            return settle
        loop = asyncio.get_running_loop()

        def settle_later() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(service.add_done_callback, lambda _: settle())

        return settle_later

    def _store_for(self, kind: str) -> Store:
        """Return the store of a destination type.

        Raises:
            PluginError: No installed store has that name.
        """
        if kind not in self._stores:
            self._stores[kind] = load_driver("flowmesh.stores", kind)(self.settings)
        return self._stores[kind]

    # Leave.

    async def _drain(self) -> None:
        """Let running tasks end, then cancel what is left."""
        if not self._handling:
            return
        _log.info("draining: %d tasks in hand", len(self._handling))
        ended = asyncio.gather(*self._handling, return_exceptions=True)
        hurry = asyncio.ensure_future(self._hurry.wait())
        waiting: list[asyncio.Future[Any]] = [ended, hurry]
        await asyncio.wait(
            waiting,
            timeout=self.settings.drain_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurry.cancel()
        self._runner.cancel_all("the worker is stopping", retriable=True)
        await ended

    async def _leave(self) -> None:
        self._presence.withdraw()
        if not await self.transport.flush(_FLUSH_S):
            _log.error("some events could not be sent within %g s", _FLUSH_S)
        await self.transport.close()
        await self._runner.close()
        for store in self._stores.values():
            await store.close()
        if self._cleaner:
            self._cleaner.stop()
        await asyncio.to_thread(self._journal.close)
