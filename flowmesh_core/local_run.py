"""Run a whole workflow in this process, with no service: one worker over the local transport."""

from __future__ import annotations

import asyncio
import collections
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.artifacts.layout import RESULT_NAME
from flowmesh_core.config import Settings
from flowmesh_core.contract import CANCEL, parse_message, parse_task
from flowmesh_core.errors import FlowmeshError
from flowmesh_core.events import TASK_FAILED, TASK_SUCCEEDED, LogChunk, TaskEvent, WorkerEvent
from flowmesh_core.plugins import Plugins
from flowmesh_core.transports.local import LocalTransport
from flowmesh_core.wire import decode_json, encode_json, utc_now
from flowmesh_core.worker import Worker
from flowmesh_core.workflow import (
    PlannedTask,
    TaskOutcome,
    Workflow,
    advance,
    begin,
    expand_workflow,
    render_task,
)

__all__ = ["LocalRun", "StageReport", "plan"]


@attrs.frozen(kw_only=True)
class StageReport:
    """How one task of the workflow ended.

    Attributes:
        name: The stage's name, or the workflow's for a single document.
        folder: Where its result and files lie; None when it never ran.
        code: The error's stable code, when it failed on the worker.
    """

    name: str
    task_id: str
    ok: bool
    error: str = ""
    code: str = ""
    result: Mapping[str, Any] = attrs.field(factory=dict)
    folder: Path | None = None
    runtime_s: float = 0.0


def plan(document: object) -> Workflow:
    """Expand a document into tasks with fresh ids.

    Raises:
        ContractError: Naming every problem of the document's shape.
    """
    return expand_workflow(document, new_id=lambda: secrets.token_hex(6))


class LocalRun:
    """One run of a workflow.

    Args:
        workflow: From ``plan``.
        settings: ``results_dir`` and limits are used.
        plugins: Loaded plugins.
        on_event: Called on the event loop for each event of each task.
        on_serving: Called once with the services that stay up after all else has ended.
    """

    def __init__(
        self,
        workflow: Workflow,
        settings: Settings,
        plugins: Plugins,
        *,
        on_event: Callable[[PlannedTask, TaskEvent], None] = lambda _task, _event: None,
        on_serving: Callable[[Sequence[StageReport]], None] = lambda _reports: None,
    ) -> None:
        self.workflow = workflow
        self._on_event = on_event
        self._on_serving = on_serving
        self._transport = LocalTransport(settings)
        self._worker = Worker(settings, transport=self._transport, plugins=plugins)
        self._reports: dict[str, StageReport] = {}
        self._running: set[str] = set()
        self._documents: dict[str, Mapping[str, Any]] = {}
        self._events: asyncio.Queue[TaskEvent] = asyncio.Queue()
        self._rendered: dict[str, Mapping[str, Any]] = {}
        self._cancelled = False

    async def run(self) -> list[StageReport]:
        """Run all tasks; return one report for each, in the workflow's order.

        A service that other stages use ends with the last of them; one that nobody uses here is
        there for others, and stays until its time is over or ``cancel`` is called.
        """
        self._transport.listen(self._note)
        working = asyncio.ensure_future(self._worker.run())
        try:
            await self._drive(working)
            await self._stay_for_services()
        finally:
            self._worker.stop()
            await working
        return [self._reports[task.task_id] for task in self.workflow.tasks]

    def cancel(self) -> None:
        """Stop running tasks and start no more; ``run`` returns soon after."""
        self._cancelled = True
        for task_id in (*self._running, *self._worker.services):
            # By the queue: a task that was just submitted has not reached the worker yet.
            order = {"type": CANCEL, "task_id": task_id, "reason": "interrupted"}
            self._transport.submit_control(encode_json(order))

    async def _stay_for_services(self) -> None:
        used = {task_id for task in self.workflow.tasks for task_id in task.depends_on}
        services = {
            task_id: service
            for task_id, service in self._worker.services.items()
            if task_id not in used
        }
        if services and not self._cancelled:
            self._on_serving([self._reports[task_id] for task_id in services])
            await asyncio.wait(services.values())

    async def _drive(self, working: asyncio.Task[None]) -> None:
        step = begin(self.workflow)
        at_once: collections.deque[TaskOutcome] = collections.deque()
        while True:
            for task in step.skipped:
                self._report(task, ok=False, error=step.state.errors[task.task_id])
            for task in step.ready:
                if (outcome := self._start(task)) is not None:
                    at_once.append(outcome)
            if step.state.finished():
                return
            outcome = at_once.popleft() if at_once else await self._next_outcome(working)
            step = advance(step.state, outcome)

    def _note(self, event: TaskEvent | WorkerEvent | LogChunk) -> None:
        if isinstance(event, TaskEvent):
            self._on_event(self.workflow.by_id(event.task_id), event)
            self._events.put_nowait(event)

    def _start(self, task: PlannedTask) -> TaskOutcome | None:
        """Submit a task; return its outcome at once when it cannot even be rendered."""
        if self._cancelled:
            return self._fail(task, "interrupted before it started")
        try:
            document = render_task(self.workflow, task, self._documents)
            body = encode_json(self._message(task, document))
            parse_message(body)  # the worker could not even name whom it refuses
        except (FlowmeshError, TypeError, ValueError) as exc:
            return self._fail(task, str(exc))
        self._rendered[task.task_id] = document
        self._running.add(task.task_id)
        self._transport.submit(body)
        return None

    def _message(self, task: PlannedTask, document: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "task_id": task.task_id,
            "task": document,
            "task_type": (document.get("spec") or {}).get("taskType"),
            "assigned_worker": self._worker.settings.worker_id,
            "dispatched_at": utc_now(),
            "parent_task_id": None,
        }

    async def _next_outcome(self, working: asyncio.Task[None]) -> TaskOutcome:
        while True:
            waiting = asyncio.ensure_future(self._events.get())
            await asyncio.wait({waiting, working}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                working.result()
                raise FlowmeshError("the worker ended before the workflow did")
            event = waiting.result()
            task = self.workflow.by_id(event.task_id)
            if event.type == TASK_FAILED:
                return self._fail(task, event.error or "failed", event)
            if event.type == TASK_SUCCEEDED:
                return self._succeed(task, event)

    def _succeed(self, task: PlannedTask, event: TaskEvent) -> TaskOutcome:
        folder = self._folder(task)
        result = decode_json((folder / RESULT_NAME).read_bytes())
        # The orchestrator's wrapper: `${stage.result.x}` means the same here as on a fleet.
        self._documents[task.name] = {
            "task_id": task.task_id,
            "worker_id": self._worker.settings.worker_id,
            "metadata": {},
            "received_at": utc_now(),
            "result": result,
        }
        self._report(task, ok=True, event=event, result=result, folder=folder)
        return TaskOutcome(task_id=task.task_id, ok=True)

    def _fail(self, task: PlannedTask, error: str, event: TaskEvent | None = None) -> TaskOutcome:
        self._report(task, ok=False, error=error, event=event)
        return TaskOutcome(task_id=task.task_id, ok=False, error=error)

    def _folder(self, task: PlannedTask) -> Path:
        parsed = parse_task(self._rendered[task.task_id], task_id=task.task_id)
        return self._worker.folders.task_folder(task.task_id, parsed.destination)

    def _report(
        self, task: PlannedTask, *, ok: bool, event: TaskEvent | None = None, **fields: Any
    ) -> None:
        self._running.discard(task.task_id)
        told = event.payload if event else {}
        self._reports[task.task_id] = StageReport(
            name=task.name or self.workflow.name,
            task_id=task.task_id,
            ok=ok,
            code=told.get("code", ""),
            runtime_s=told.get("runtime_sec", 0.0),
            **fields,
        )
