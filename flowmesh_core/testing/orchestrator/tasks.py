"""Task records, ready queue and merge groups of the stand-in. No I/O; the caller holds the lock."""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs

__all__ = ["MAX_ATTEMPTS", "TaskRecord", "TaskTable"]

MAX_ATTEMPTS = 3


@attrs.define(kw_only=True)
class TaskRecord:
    """One task as the earlier orchestrator keeps it.

    Attributes:
        status: ``PENDING``, ``DISPATCHED``, ``DONE`` or ``FAILED``; nothing between the last two
            and the second tells whether the worker ever saw the task.
        stage: Name within its submission, empty for a single document.
        waits_for: Task ids that must be done first.
        merged_children: Ids of the tasks that ride along while this one is dispatched.
    """

    task_id: str
    document: dict[str, Any]
    submission_id: str
    stage: str = ""
    waits_for: set[str] = attrs.field(factory=set)
    status: str = "PENDING"
    attempts: int = 0
    error: str | None = None
    assigned_worker: str | None = None
    last_failed_worker: str | None = None
    started_at: str | None = None
    merge_key: str | None = None
    merged_children: list[str] = attrs.field(factory=list)
    merged_parent_id: str | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The unrendered spec, empty when the document has none."""
        spec = self.document.get("spec")
        return spec if isinstance(spec, dict) else {}


class TaskTable:
    """All tasks of one stand-in; records are never evicted."""

    def __init__(self) -> None:
        self.records: dict[str, TaskRecord] = {}
        self.ready: deque[str] = deque()

    def add(self, record: TaskRecord) -> None:
        """Take a new task; it is ready unless a dependency is not done.

        A dependency that failed already or that nobody knows is waited for without end.
        """
        done = {task_id for task_id, known in self.records.items() if known.status == "DONE"}
        record.waits_for -= done
        self.records[record.task_id] = record
        if not record.waits_for:
            self.ready.append(record.task_id)

    def take(self) -> TaskRecord | None:
        """Next pending task in queue order."""
        while self.ready:
            record = self.records[self.ready.popleft()]
            if record.status == "PENDING":
                return record
        return None

    def stages_of(self, record: TaskRecord) -> dict[str, TaskRecord]:
        """Every named task of the same submission, declared as a dependency or not."""
        return {
            other.stage: other
            for other in self.records.values()
            if other.stage and other.submission_id == record.submission_id
        }

    def group(self, record: TaskRecord, limit: int) -> None:
        """Let up to ``limit - 1`` queued tasks of the same key ride along."""
        if record.merge_key is None or limit < 2:
            return
        queued = [self.records[task_id] for task_id in self.ready]
        same = [
            child
            for child in queued
            if child.merge_key == record.merge_key and child.status == "PENDING"
        ]
        for child in same[: limit - 1]:
            self.ready.remove(child.task_id)
            child.status, child.merged_parent_id = "DISPATCHED", record.task_id
            record.merged_children.append(child.task_id)

    def children(self, record: TaskRecord) -> list[TaskRecord]:
        """The records that ride along, in queue order."""
        return [self.records[task_id] for task_id in record.merged_children]

    def put_back(self, record: TaskRecord) -> None:
        """To the end of the queue, uncounted: there was nobody for it, or nothing to render yet."""
        self._release(record)
        self._reset(record)
        self.ready.append(record.task_id)

    def retry(self, record: TaskRecord, failed_worker: str | None) -> None:
        """To the front of the queue with one attempt more, or failed when it was the last one.

        The children of its group are free again either way, with their attempts untouched.
        """
        self._release(record)
        self._reset(record)
        record.last_failed_worker = failed_worker or record.last_failed_worker
        record.attempts += 1
        if record.attempts >= MAX_ATTEMPTS:
            self.fail(record, "max_attempts_exceeded")
        else:
            self.ready.appendleft(record.task_id)

    def fail(self, record: TaskRecord, error: str) -> None:
        """End the task, its group and its direct dependents; later stages stay pending for ever."""
        for failed, reason in [
            (record, error),
            *((child, f"Parent {record.task_id} failed") for child in self.children(record)),
        ]:
            failed.status, failed.error = "FAILED", reason
            for waiting in self._dependents(failed):
                waiting.status = "FAILED"
                waiting.error = f"Dependency {failed.task_id} failed"

    def succeed(self, record: TaskRecord, worker_id: str | None) -> None:
        """Mark the task and whatever rode along as done, whoever said so and whatever they were."""
        for done in [record, *self.children(record)]:
            done.status, done.error = "DONE", None
            done.assigned_worker = worker_id or done.assigned_worker
            for waiting in self._dependents(done):
                waiting.waits_for.discard(done.task_id)
                if not waiting.waits_for and waiting.status == "PENDING":
                    self.ready.append(waiting.task_id)

    def _dependents(self, record: TaskRecord) -> list[TaskRecord]:
        return [other for other in self.records.values() if record.task_id in other.waits_for]

    def _release(self, record: TaskRecord) -> None:
        for child in reversed(self.children(record)):
            child.status, child.merged_parent_id = "PENDING", None
            self.ready.appendleft(child.task_id)
        record.merged_children = []

    def _reset(self, record: TaskRecord) -> None:
        if record.task_id in self.ready:
            self.ready.remove(record.task_id)
        record.status, record.error = "PENDING", None
        record.assigned_worker = record.started_at = None
