"""Live progress of a local run: one line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from flowmesh_core.events import TASK_FAILED, TASK_PROGRESS, TASK_STARTED, TASK_SUCCEEDED, TaskEvent
from flowmesh_core.workflow import PlannedTask, Workflow

__all__ = ["Progress"]

_STATES = {TASK_STARTED: "running", TASK_SUCCEEDED: "done", TASK_FAILED: "failed"}


class Progress:
    """Shows events on standard error, so that standard output holds results only."""

    def __init__(self, workflow: Workflow, *, quiet: bool = False) -> None:
        self._workflow = workflow
        self._console = Console(stderr=True, quiet=quiet)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=False,
            disable=not self._console.is_terminal,
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        for task in self._workflow.tasks:
            name = task.name or self._workflow.name
            self._rows[task.task_id] = self._bars.add_task(
                name, total=1.0, start=False, state="waiting"
            )
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def note(self, task: PlannedTask, event: TaskEvent) -> None:
        """Show one event."""
        row = self._rows[task.task_id]
        if event.type == TASK_PROGRESS:
            self._bars.update(row, **_progress_of(event.payload))
            return
        state = _STATES.get(event.type, event.type)
        if event.type == TASK_STARTED:
            self._bars.start_task(row)
        if event.type == TASK_SUCCEEDED:
            self._bars.update(row, completed=1.0)
        self._bars.update(row, state=state)
        if event.type != TASK_STARTED:
            self._bars.stop_task(row)
        if not self._console.is_terminal:
            self._console.print(f"{task.name or self._workflow.name}: {state}", highlight=False)


def _progress_of(payload: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"state": payload.get("message") or "running"}
    if isinstance(payload.get("fraction"), (int, float)):
        fields["completed"] = payload["fraction"]
    return fields
