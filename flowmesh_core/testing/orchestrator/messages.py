"""The dispatch message: documents rendered with what earlier stages left, children included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh_core.testing.orchestrator.results import ResultStore, now
from flowmesh_core.testing.orchestrator.rules import NotReadyError, render, walk
from flowmesh_core.testing.orchestrator.tasks import TaskRecord, TaskTable

__all__ = ["MessageBuilder"]


class MessageBuilder:
    """Builds messages from the tasks and results as they stand; the caller holds the lock."""

    def __init__(self, tasks: TaskTable, store: ResultStore) -> None:
        self._tasks = tasks
        self._store = store

    def build(self, record: TaskRecord, worker: str) -> dict[str, Any]:
        """What goes on ``tasks`` for a task and those that ride along.

        Raises:
            NotReadyError: A stage that is referred to, or its result, is not there yet.
            ValueError: A reference can never be resolved.
        """
        dispatched_at = now()  # before the rendering, as the earlier orchestrator takes it
        message = {
            "task_id": record.task_id,
            "task": self._rendered(record),
            "task_type": record.spec.get("taskType"),
            "assigned_worker": worker,
            "dispatched_at": dispatched_at,
            "parent_task_id": None,
        }
        children = [self._child(child) for child in self._tasks.children(record)]
        return {**message, "merged_children": children} if children else message

    def _child(self, child: TaskRecord) -> dict[str, Any]:
        document = self._rendered(child)
        kept = {key: value for key, value in document.items() if key in {"spec", "metadata"}}
        return {"task_id": child.task_id, **kept}

    def _rendered(self, record: TaskRecord) -> dict[str, Any]:
        stages = self._tasks.stages_of(record) if record.stage else {}
        if not stages:
            return record.document
        document: dict[str, Any] = render(record.document, lambda ref: self._resolve(ref, stages))
        done = {name: self._load(s) for name, s in stages.items() if s.status == "DONE"}
        if done:
            spec = document.setdefault("spec", {})
            spec["_upstreamResults"] = {**spec.get("_upstreamResults", {}), **done}
        return document

    def _resolve(self, reference: str, stages: Mapping[str, TaskRecord]) -> Any:
        name, dot, path = reference.partition(".")
        if not dot or name not in stages:
            raise ValueError(f"Unknown stage reference '{reference}'")
        stage = stages[name]
        if path == "task_id":
            return stage.task_id
        if stage.status != "DONE":
            raise NotReadyError(reference)
        value = walk(self._load(stage), path)
        if value is None:
            raise ValueError(f"Missing value for reference '{reference}'")
        return value

    def _load(self, stage: TaskRecord) -> Any:
        document = self._store.load(stage.task_id)
        if document is None:
            raise NotReadyError(stage.stage)
        return document
