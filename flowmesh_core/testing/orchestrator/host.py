"""A stand-in for the earlier orchestrator, unfriendly parts included.

It publishes once and hopes, overwrites a worker's status after the publish, takes any subscriber
for the right one, fences nothing, and gives merged tasks without an answer a copy of their
parent's. Left out: elastic scaling, cache hints, best-fit scoring, graphs and metrics.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import attrs
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from flowmesh_core.testing.orchestrator.http import HttpRequest, OrchestratorHttp
from flowmesh_core.testing.orchestrator.messages import MessageBuilder
from flowmesh_core.testing.orchestrator.results import ResultStore, now
from flowmesh_core.testing.orchestrator.rules import (
    NotReadyError,
    deep_merge,
    merge_key,
    walk,
)
from flowmesh_core.testing.orchestrator.tasks import MAX_ATTEMPTS, TaskRecord, TaskTable
from flowmesh_core.testing.orchestrator.workers import WORKER_EVENTS, WorkerTable, parse_object

__all__ = ["StandInOrchestrator"]

T = TypeVar("T")

TASKS, TASK_EVENTS = "tasks", "tasks.events"
PIPELINE = {"apiVersion": "mloc/v1", "kind": "Pipeline", "metadata": {"name": "pipeline"}}


class StandInOrchestrator:
    """Queue, dispatch, events, watchdog and HTTP of the earlier orchestrator, in threads.

    Times are far shorter than its own, so that tests may wait for them.

    Args:
        redis_url: The database that the workers use.
        results_dir: Where results and files go.
        token: Bearer token that its HTTP side requires; None leaves it open.
        heartbeat_grace_s: How long a heartbeat key may be gone before its worker counts as dead.
        watchdog_interval_s: How often it looks.
        pause_s: Sleep of the one dispatch thread after each attempt that placed nothing.
        reconnect_s: Wait before it subscribes again after losing Redis; events between are lost.
        running_delay_s: Time between a dispatch and the status RUNNING that it writes into the
            worker's hash. A fast worker's own IDLE comes before it and is overwritten.
        merge: Whether equal inference and rag tasks share a dispatch.
        max_merge: Tasks in one dispatch at most, the parent included.
        port: HTTP port on 127.0.0.1; 0 takes a free one.

    Attributes:
        events: Every message in order of arrival, with its ``channel``; dispatches stand under
            ``tasks`` as they were sent, text that is no JSON object under ``raw``.
    """

    def __init__(
        self,
        redis_url: str,
        results_dir: Path,
        *,
        token: str | None = None,
        heartbeat_grace_s: float = 1.0,
        watchdog_interval_s: float = 0.1,
        pause_s: float = 0.05,
        reconnect_s: float = 2.0,
        running_delay_s: float = 0.0,
        merge: bool = True,
        max_merge: int = 4,
        port: int = 0,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self._watchdog_interval_s = watchdog_interval_s
        self._pause_s = pause_s
        self._reconnect_s = reconnect_s
        self._running_delay_s = running_delay_s
        self._max_merge = max_merge if merge else 1
        # Any: redis-py types each answer as one of two worlds. No retry: an outage shows at once
        self._redis: Any = redis.Redis.from_url(
            redis_url, decode_responses=True, retry=Retry(NoBackoff(), 0)
        )
        self._workers = WorkerTable(self._redis, heartbeat_grace_s)
        self._lock = threading.RLock()
        self._tasks = TaskTable()
        self._unmirrored: dict[str, list[str]] = {}
        self._store = ResultStore(Path(results_dir), self._expected_artifacts)
        self._messages = MessageBuilder(self._tasks, self._store)
        self._http = OrchestratorHttp(self._store, self._mirror_late, token=token, port=port)
        self._stop = threading.Event()
        self._listening = threading.Event()
        self._threads = [
            threading.Thread(target=loop, name=f"standin-{loop.__name__.strip('_')}", daemon=True)
            for loop in (self._listen, self._dispatch, self._watch)
        ]

    def start(self) -> None:
        """Start every thread and return once events are heard."""
        self._http.start()
        for thread in self._threads:
            thread.start()
        if not self._listening.wait(10):
            self.stop()
            raise TimeoutError("the stand-in could not subscribe to its channels within 10 s")

    def stop(self, flush: bool = False) -> None:
        """End everything; records stay readable. May be called twice.

        Args:
            flush: Empty the database, as the earlier orchestrator does whenever it exits.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._http.stop()
        if flush:
            self._redis.flushdb()
        self._redis.close()

    def __enter__(self) -> StandInOrchestrator:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base address of the HTTP side."""
        return self._http.url

    @property
    def results_url(self) -> str:
        """What belongs into ``spec.output.destination.url``."""
        return f"{self._http.url}/api/v1/results"

    @property
    def requests(self) -> list[HttpRequest]:
        """Every HTTP request that was answered or broken off, in that order."""
        return list(self._http.requests)

    def fail_next(self, times: int, status: int = 503, only: str = "") -> None:
        """Answer the next requests whose path contains ``only`` with an error status."""
        self._http.fail_next(times, status, only)

    def submit(self, document: Mapping[str, Any]) -> str:
        """Queue a document as one task, unchecked, and return its id."""
        record = _new_record(document, str(uuid.uuid4()))
        record.waits_for = set(record.spec.get("dependsOn") or ())
        with self._lock:
            self._tasks.add(record)
        return record.task_id

    def submit_together(self, documents: Iterable[Mapping[str, Any]]) -> list[str]:
        """Queue documents before any of them can be dispatched, so that equal ones merge."""
        with self._lock:
            return [self.submit(document) for document in documents]

    def submit_pipeline(
        self, stages: Iterable[Mapping[str, Any]], base: Mapping[str, Any] = PIPELINE
    ) -> dict[str, str]:
        """Queue stages one after another and return their task ids by name.

        Args:
            stages: Items ``{"name": ..., "spec": {...}}``.
            base: Document whose ``spec`` and ``metadata`` each stage inherits.
        """
        submission, names = str(uuid.uuid4()), dict[str, str]()
        with self._lock:
            for number, stage in enumerate(stages, 1):
                name = str(stage.get("name") or stage.get("id") or f"stage-{number}")
                title = f"{walk(dict(base), 'metadata.name') or 'task'}:{name}"
                own = {"spec": dict(stage.get("spec") or {}), "metadata": {"name": title}}
                record = _new_record(deep_merge(dict(base), own), submission, name)
                record.waits_for = set(list(names.values())[-1:])
                self._tasks.add(record)
                names[name] = record.task_id
        return names

    def task(self, task_id: str) -> TaskRecord:
        """A copy of the record as it stands."""
        with self._lock:
            return attrs.evolve(self._tasks.records[task_id])

    def result(self, task_id: str) -> Any:
        """The stored document, or None."""
        return self._store.load(task_id)

    def folder(self, task_id: str) -> Path:
        """Where the results and files of a task are kept."""
        return self._store.folder(task_id)

    def expire_heartbeat(self, worker_id: str) -> None:
        """Remove a heartbeat key, as if its time to live had run out."""
        self._redis.delete(f"worker:{worker_id}:hb")

    def wait_for(self, predicate: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Call until the answer is true and return it.

        Raises:
            TimeoutError: It never was; the message holds the tasks and the last events.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := predicate()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {timeout_s} s; {self._picture()}")
            time.sleep(0.01)
        return found

    def wait_workers(self, count: int, timeout_s: float = 10.0) -> list[str]:
        """Wait until so many workers could be given a task, and return their ids."""

        def enough() -> list[str]:
            pool = self._workers.idle({})
            return pool if len(pool) >= count else []

        return self.wait_for(enough, timeout_s)

    def wait_task(self, task_id: str, timeout_s: float = 10.0) -> TaskRecord:
        """Wait until a task is DONE or FAILED and return its record."""
        self.wait_for(lambda: self.task(task_id).status in {"DONE", "FAILED"}, timeout_s)
        return self.task(task_id)

    def _dispatch(self) -> None:
        while not self._stop.is_set():
            self._stop.wait(self._dispatch_once())

    def _dispatch_once(self) -> float:
        """Try the first task of the queue; returns the seconds to sleep afterwards."""
        with self._lock:
            record = self._tasks.take()
            if record is None:
                return 0.01
            try:
                return 0.0 if self._place(record) else self._pause_s
            except redis.RedisError:
                self._tasks.retry(record, None)
                return 2 * self._pause_s

    def _place(self, record: TaskRecord) -> bool:
        pool = self._workers.idle(record.spec)
        candidates = [worker for worker in pool if worker != record.last_failed_worker]
        if not candidates:  # on a fleet of one, a task that failed once waits for ever
            self._tasks.put_back(record)
            return False
        worker = candidates[0]
        self._tasks.group(record, self._max_merge)
        try:
            message = self._messages.build(record, worker)
        except NotReadyError:
            self._tasks.put_back(record)
            return False
        except ValueError as exc:
            self._tasks.fail(record, str(exc))
            return True
        return self._publish(record, worker, message)

    def _publish(self, record: TaskRecord, worker: str, message: dict[str, Any]) -> bool:
        self._record(TASKS, message)
        if not self._redis.publish(TASKS, json.dumps(message, ensure_ascii=False)):
            self._tasks.retry(record, None)
            return False
        # the lock keeps the record right; the worker's hash has no such guard
        record.status, record.assigned_worker = "DISPATCHED", worker
        if self._running_delay_s:
            time.sleep(self._running_delay_s)
        self._workers.set_status(worker, "RUNNING")
        return True

    def _watch(self) -> None:
        while not self._stop.wait(self._watchdog_interval_s):
            try:
                for worker in self._workers.newly_dead():
                    for record in self._held_by(worker):
                        self._redis.publish(TASK_EVENTS, _synthetic_failure(record, worker))
            except redis.RedisError:
                continue

    def _held_by(self, worker: str) -> list[TaskRecord]:
        with self._lock:
            return [
                record
                for record in self._tasks.records.values()
                if record.status == "DISPATCHED" and record.assigned_worker == worker
            ]

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._redis.pubsub() as channel:
                    channel.subscribe(TASK_EVENTS, WORKER_EVENTS)
                    while not self._stop.is_set():
                        self._hear(channel.get_message(timeout=0.05))
            except redis.RedisError:
                self._stop.wait(self._reconnect_s)

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None:
            return
        if message["type"] == "subscribe":
            if message["channel"] == WORKER_EVENTS:
                self._listening.set()
            return
        event = parse_object(message["data"])
        self._record(message["channel"], {"raw": message["data"]} if event is None else event)
        kind = str((event or {}).get("type") or "").strip().upper()
        with self._lock:
            if event and kind.startswith("TASK"):
                self._on_task_event(kind, event)
            elif event and kind == "UNREGISTER":
                self._on_unregister(str(event.get("worker_id")))

    def _on_task_event(self, kind: str, event: dict[str, Any]) -> None:
        record = self._tasks.records.get(str(event.get("task_id", "")).strip())
        if record is None:
            return
        worker = event.get("worker_id")
        if kind == "TASK_STARTED":  # even a record that is done comes to life again
            record.status, record.assigned_worker = "DISPATCHED", worker
            record.started_at = walk(event, "payload.started_at") or event.get("ts")
        elif kind == "TASK_SUCCEEDED":
            self._on_success(record, worker)
        elif kind == "TASK_FAILED" and record.attempts < MAX_ATTEMPTS:
            self._tasks.retry(record, worker)
        elif kind == "TASK_FAILED":
            self._tasks.fail(record, str(event.get("error")))

    def _on_success(self, record: TaskRecord, worker: str | None) -> None:
        self._tasks.succeed(record, worker)
        if worker:
            self._workers.set_status(worker, "IDLE")
        children = list(record.merged_children)
        if children and not self._store.mirror(record.task_id, children):
            self._unmirrored[record.task_id] = children

    def _mirror_late(self, task_id: str) -> None:
        with self._lock:
            children = self._unmirrored.pop(task_id, [])
        self._store.mirror(task_id, children)

    def _on_unregister(self, worker: str) -> None:
        if worker not in self._workers.dead:
            for record in self._held_by(worker):
                self._tasks.retry(record, worker)

    def _record(self, channel: str, message: dict[str, Any]) -> None:
        self.events.append({**message, "channel": channel})

    def _expected_artifacts(self, task_id: str) -> list[str]:
        record = self._tasks.records.get(task_id)  # unlocked: the store's lock is held here
        return list(walk(record.spec, "output.artifacts") or ()) if record else []

    def _picture(self) -> str:
        with self._lock:
            tasks = [
                f"{r.task_id} {r.status} attempts={r.attempts} worker={r.assigned_worker} {r.error}"
                for r in self._tasks.records.values()
            ]
        last = [f"{e['channel']}:{e.get('type')}:{e.get('worker_id')}" for e in self.events[-12:]]
        return f"tasks: {tasks}; last events: {last}"


def _new_record(document: Mapping[str, Any], submission: str, stage: str = "") -> TaskRecord:
    record = TaskRecord(
        task_id=str(uuid.uuid4()),
        document=json.loads(json.dumps(document)),  # ours alone, and fit for the wire
        submission_id=submission,
        stage=stage,
    )
    record.merge_key = merge_key(record.spec)
    return record


def _synthetic_failure(record: TaskRecord, worker: str) -> str:
    reason = "worker_heartbeat_expired"
    payload = {"reason": reason, "worker": worker, "synthetic": True, "attempt": record.attempts}
    event = {
        "type": "TASK_FAILED",
        "ts": now(),
        "worker_id": worker,
        "task_id": record.task_id,
        "status": None,
        "error": reason,
        "payload": payload,
    }
    return json.dumps(event)
