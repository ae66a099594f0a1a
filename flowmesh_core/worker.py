"""The way of one task, from bytes to its last event; the only module that knows every step.

Receive, parse, resolve and run, share out, write whole, deliver, report. Nothing that arrives can
end the process: what cannot be read is refused by event or dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.artifacts.pipeline import ArtifactPipeline
from flowmesh_core.config import Settings
from flowmesh_core.contract import (
    Envelope,
    Task,
    check_task_id,
    find_task_id,
    parse_envelope,
    parse_message,
    utc_now,
)
from flowmesh_core.errors import (
    ArtifactError,
    CancelledError,
    ContractError,
    ExecutionError,
    FlowmeshError,
    UploadError,
)
from flowmesh_core.events import (
    HEARTBEAT,
    REGISTER,
    STATUS,
    TASK_PROGRESS,
    TASK_STARTED,
    TASK_SUCCEEDED,
    UNREGISTER,
    TaskEvent,
    WorkerEvent,
    task_payload,
)
from flowmesh_core.executor import Outcome
from flowmesh_core.ledger import Finished, TaskLedger, Verdict
from flowmesh_core.merge import failure_document, share_out
from flowmesh_core.plugins import Plugins, load_driver, load_plugins
from flowmesh_core.runner import Runner
from flowmesh_core.stores.base import Store
from flowmesh_core.telemetry.heartbeat import Heartbeat, build_farewell, build_metrics
from flowmesh_core.telemetry.power import PowerSampler
from flowmesh_core.telemetry.probes import GpuReader, probe_hardware
from flowmesh_core.transports.base import Delivery, Transport

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
_FLUSH_S = 10.0
_PROBE_S = 20.0


@attrs.define(eq=False)
class _Report:
    """What the events of one dispatch say."""

    envelope: Envelope
    started_at: str
    started: float
    runtime_s: float = 0.0

    def payload(self) -> dict[str, Any]:
        return task_payload(
            self.envelope.task,
            started_at=self.started_at,
            dispatched_at=self.envelope.dispatched_at,
        )

    def final_payload(self) -> dict[str, Any]:
        runtime_s = time.monotonic() - self.started
        return {**self.payload(), "runtime_sec": round(runtime_s, 6), "finished_at": utc_now()}


# What became of each task of a dispatch; a task without a folder could not begin.
_GroupRun = dict[str, tuple[Attempt | None, Outcome]]


def _folder_of(task: Task, attempt: Attempt | None) -> Attempt:
    if attempt is None:
        raise ArtifactError(f"task {task.task_id} has no folder")
    return attempt


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
        self.dropped = 0
        self._gpus = GpuReader(visible_devices=settings.visible_devices)
        self._devices = tuple(str(gpu.index) for gpu in self._gpus.list_gpus())
        self.registry = self.plugins.build_registry(settings, gpu_count=len(self._devices))
        self._stores: dict[str, Store] = {}
        self._artifacts = ArtifactPipeline(self._store_for, fsync=settings.fsync)
        self._ledger = TaskLedger()
        self._handling: set[asyncio.Task[None]] = set()
        self._in_hand = asyncio.Semaphore(2 * settings.max_concurrent_tasks)
        self._draining = False
        self._hurry = asyncio.Event()
        self._registered = False
        self._started = time.monotonic()
        self._started_at = utc_now()
        self._status = "IDLE"
        self._power = PowerSampler(gpu=self._gpus if self._devices else None)
        self._heartbeat = Heartbeat(
            self._beat,
            interval_s=settings.heartbeat_interval_s,
            extra_fields=self.plugins.heartbeat_fields,
        )
        # Made in `run`: it belongs to the event loop.
        self._runner: Runner

    async def run(self) -> None:
        """Register, work until ``stop`` is called, drain, unregister.

        Raises:
            TransportError: The transport can never work with these settings.
        """
        self._runner = Runner(
            self.settings,
            self.plugins,
            self.registry,
            Fetcher(
                policy=NetworkPolicy.from_settings(self.settings), results_dir=self.folders.root
            ),
            devices=self._devices,
            on_progress=self._progress,
        )
        try:
            # Subscribed first, announced second: nothing dispatched to us can be missed.
            await self.transport.open()
            self._power.start()
            hardware = await self._probe()
            if not self._draining:
                self._register(hardware)
            async for delivery in self.transport.deliveries():
                self._receive(delivery)
            await self._drain()
        finally:
            await self._leave()

    def stop(self) -> None:
        """Stop taking tasks; ``run`` returns when those in hand have ended.

        A second call does not wait for them: they are cancelled.
        """
        if self._draining:
            self._hurry.set()
        self._draining = True
        self.transport.stop_receiving()

    def cancel(self, task_id: str, reason: str = "cancelled") -> bool:
        """Ask a running task to stop; return whether it was running."""
        return self._runner.cancel(task_id, reason)

    # Receive and parse.

    def _receive(self, delivery: Delivery) -> None:
        envelope = self._read(delivery.body)
        if envelope is None:
            return
        verdict, finished = self._ledger.accept(envelope)
        if verdict is Verdict.RUN:
            task = asyncio.ensure_future(self._handle(envelope))
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
        self._send_task(TaskEvent.failed(task_id, error))
        self._send_status(self._status, {"last_task": task_id})

    def _acknowledge(self, envelope: Envelope, finished: Finished | None) -> None:
        """Say again where a task stands that this worker holds or has finished."""
        task_id = envelope.task.task_id
        _log.info("task %s came again; it is not run twice", task_id)
        if finished is not None:
            self._send_task(finished.event.model_copy(update={"ts": utc_now()}))
            self._send_status(self._status, {"last_task": task_id})
        elif self._runner_has(task_id):
            payload = task_payload(
                envelope.task, started_at=utc_now(), dispatched_at=envelope.dispatched_at
            )
            self._send_task(TaskEvent(type=TASK_STARTED, task_id=task_id, payload=payload))

    def _runner_has(self, task_id: str) -> bool:
        return task_id in self._ledger.held

    # Run, share out, write, deliver, report.

    async def _handle(self, envelope: Envelope) -> None:
        """Take one dispatch from its envelope to its last event."""
        report = _Report(envelope, utc_now(), time.monotonic())
        result: Mapping[str, Any] | None = None
        # A task is written and delivered while the next one has its slot already.
        async with self._in_hand:
            try:
                async with self._runner.slot():
                    self._begin(report)
                    run = await self._execute(envelope)
                result = await self._conclude(envelope, run)
                await self._artifacts.deliver(envelope.task, result)
            except FlowmeshError as exc:
                self._end(report, exc, result if isinstance(exc, UploadError) else None)
            except Exception as exc:  # noqa: BLE001 - nothing that arrives ends the worker
                _log.exception("task %s: unexpected failure", envelope.task.task_id)
                self._end(report, ExecutionError(f"{type(exc).__name__}: {exc}"), None)
            else:
                self._end(report, None, None)
        self._announce_rest(envelope.task.task_id)

    def _begin(self, report: _Report) -> None:
        report.started, report.started_at = time.monotonic(), utc_now()
        task_id = report.envelope.task.task_id
        self._send_status("RUNNING" if self._runner.full else "IDLE", {"task_id": task_id})
        event = TaskEvent(type=TASK_STARTED, task_id=task_id, payload=report.payload())
        self._send_task(event)

    async def _execute(self, envelope: Envelope) -> _GroupRun:
        """Run the leader, then its members; needs the slot.

        Raises:
            FlowmeshError: The leader failed.
        """
        if self._draining:
            raise CancelledError("the worker is stopping", retriable=True)
        if self._ledger.find_undelivered(envelope) is not None:
            return {}
        leader = envelope.task
        run: _GroupRun = {leader.task_id: await self._run(leader)}
        error = run[leader.task_id][1].error
        if error is not None:
            raise error
        for child in envelope.children:
            try:
                run[child.task_id] = await self._run(child)
            except FlowmeshError as exc:
                run[child.task_id] = (None, Outcome(error=exc))
        return run

    async def _conclude(self, envelope: Envelope, run: _GroupRun) -> Mapping[str, Any]:
        """Answer the members and return the leader's written result; needs no slot."""
        leader = envelope.task
        if leader.task_id not in run:
            return self._ledger.find_undelivered(envelope) or {}
        attempt, outcome = run.pop(leader.task_id)
        if envelope.children or envelope.rejected:
            children = await self._conclude_children(envelope, run)
            outcome = attrs.evolve(outcome, result={**outcome.result, "children": children})
        return await self._artifacts.finish(leader, _folder_of(leader, attempt), outcome)

    async def _run(self, task: Task) -> tuple[Attempt | None, Outcome]:
        self._store_for(task.destination.type)
        attempt = self.folders.begin(task.task_id, task.destination)
        return attempt, await self._runner.run(task, attempt)

    async def _conclude_children(self, envelope: Envelope, run: _GroupRun) -> dict[str, Any]:
        """Write and deliver each member on its own; return their results."""
        shared = share_out(envelope, {task_id: outcome for task_id, (_, outcome) in run.items()})
        tasks = {task.task_id: task for task in envelope.children}
        return {
            task_id: await self._finish_child(
                tasks.get(task_id) or attrs.evolve(envelope.task, task_id=task_id),
                run[task_id][0] if task_id in run else None,
                outcome,
            )
            for task_id, outcome in shared.items()
        }

    async def _finish_child(
        self, task: Task, attempt: Attempt | None, outcome: Outcome
    ) -> Mapping[str, Any]:
        """Write and deliver one member; what fails here is this member's failure only."""
        try:
            if outcome.error is not None:
                raise outcome.error
            result = await self._artifacts.finish(task, _folder_of(task, attempt), outcome)
        except FlowmeshError as exc:
            _log.warning("task %s, merged, failed: %s", task.task_id, exc)
            result = await self._write_failure(task, exc)
        try:
            await self._artifacts.deliver(task, result)
        except UploadError as exc:
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
        envelope = report.envelope
        task_id = envelope.task.task_id
        payload = report.final_payload()
        if error is None:
            event = TaskEvent(type=TASK_SUCCEEDED, task_id=task_id, payload=payload)
        else:
            _log.warning("task %s failed (%s): %s", task_id, error.code, error)
            event = TaskEvent.failed(task_id, error, payload=payload)
        finished = Finished(
            event=self._send_task(event),
            dispatched_at=envelope.dispatched_at,
            spec=envelope.task.spec,
            ok=error is None,
            undelivered=undelivered,
        )
        self._ledger.finish(task_id, finished)

    def _announce_rest(self, task_id: str) -> None:
        self._status = "RUNNING" if self._runner.full else "IDLE"
        self._send_status(self._status, {"last_task": task_id})

    # Say who and how we are.

    async def _probe(self) -> Mapping[str, Any]:
        """Describe the machine; a driver that hangs costs the description, not the start."""
        probing = asyncio.to_thread(
            probe_hardware,
            network_bandwidth_bytes_per_s=self.settings.network_bandwidth_bytes_per_s,
            visible_devices=self.settings.visible_devices,
        )
        try:
            return await asyncio.wait_for(probing, _PROBE_S)
        except asyncio.TimeoutError:
            _log.error("the hardware did not answer within %g s; registering without it", _PROBE_S)
            return {}

    def _register(self, hardware: Mapping[str, Any]) -> None:
        payload = {
            "env": {},
            "hardware": hardware,
            "cost_per_hour": self.settings.cost_per_hour,
            "power_metrics": self._power.latest(),
            "started_at": self._started_at,
            "pid": os.getpid(),
            "executors": [info.to_dict() for info in self.registry.infos],
            "plugins": [
                {"name": report.name, "state": report.state.value, "reason": report.reason}
                for report in self.plugins.reports
            ],
        }
        tags = list(self.settings.worker_tags)
        self._send_worker(WorkerEvent(type=REGISTER, status="STARTING", tags=tags, payload=payload))
        self._send_status("IDLE", {})
        self._registered = True
        self._heartbeat.start()

    def _unregister(self) -> None:
        payload = build_farewell(
            uptime_s=time.monotonic() - self._started,
            cost_per_hour=self.settings.cost_per_hour,
            power=self._power,
        )
        self._send_worker(WorkerEvent(type=UNREGISTER, payload=payload))

    def _beat(self) -> None:
        metrics = build_metrics(
            uptime_s=time.monotonic() - self._started,
            cost_per_hour=self.settings.cost_per_hour,
            power=self._power,
            extra=self._heartbeat.extra,
        )
        self._send_worker(WorkerEvent(type=HEARTBEAT, metrics=metrics))

    def _progress(self, task_id: str, values: Mapping[str, Any]) -> None:
        self._send_task(TaskEvent(type=TASK_PROGRESS, task_id=task_id, payload=dict(values)))

    def _send_status(self, status: str, payload: dict[str, Any]) -> None:
        self._status = status
        self._send_worker(WorkerEvent(type=STATUS, status=status, payload=payload))

    def _send_worker(self, event: WorkerEvent) -> None:
        event.worker_id = self.settings.worker_id
        self.transport.send(event)

    def _send_task(self, event: TaskEvent) -> TaskEvent:
        event.worker_id = self.settings.worker_id
        self.transport.send(event)
        return event

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
        for task_id in self._ledger.held:
            self._runner.cancel(task_id, "the worker is stopping", retriable=True)
        await ended

    async def _leave(self) -> None:
        self._heartbeat.stop()
        self._power.stop()
        if self._registered:
            self._unregister()
            if not await self.transport.flush(_FLUSH_S):
                _log.error("some events could not be sent within %g s", _FLUSH_S)
        await self.transport.close()
        await self._runner.close()
        for store in self._stores.values():
            await store.close()
