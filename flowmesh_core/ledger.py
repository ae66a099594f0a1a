"""Which tasks this worker holds or has finished, so that none is run twice."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import attrs

from flowmesh_core.contract import Envelope
from flowmesh_core.events import TaskEvent

__all__ = ["Finished", "TaskLedger", "Verdict"]

_KEPT = 10_000


class Verdict(enum.Enum):
    """What to do with a dispatch."""

    RUN = "run"
    HELD = "held"
    FINISHED = "finished"


@attrs.frozen(kw_only=True)
class Finished:
    """How a task ended here.

    Attributes:
        event: Its last event, to be sent again.
        dispatched_at: Of the dispatch that it answered.
        spec: The task's spec, to recognise the same work.
        undelivered: The written result when only its delivery failed.
    """

    event: TaskEvent
    dispatched_at: str | None
    spec: Mapping[str, Any]
    ok: bool
    undelivered: Mapping[str, Any] | None = None


class TaskLedger:
    """Remembers held tasks, and the last ``kept`` finished ones.

    A task that succeeded is never run again under its id. One that failed is run again when it
    is dispatched anew, which pub/sub shows by another ``dispatched_at``.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._held: set[str] = set()
        self._finished: OrderedDict[str, Finished] = OrderedDict()

    @property
    def held(self) -> frozenset[str]:
        """Ids of the tasks that are waiting or running."""
        return frozenset(self._held)

    def accept(self, envelope: Envelope) -> tuple[Verdict, Finished | None]:
        """Decide about a dispatch and hold it when it is to run."""
        task_id = envelope.task.task_id
        if task_id in self._held:
            return Verdict.HELD, None
        finished = self._finished.get(task_id)
        if finished is not None and _same_work(finished, envelope):
            return Verdict.FINISHED, finished
        self._held.add(task_id)
        return Verdict.RUN, finished

    def finish(self, task_id: str, finished: Finished) -> None:
        """Let go of a task and remember how it ended."""
        self._held.discard(task_id)
        self._finished[task_id] = finished
        self._finished.move_to_end(task_id)
        while len(self._finished) > self._kept:
            self._finished.popitem(last=False)

    def find_undelivered(self, envelope: Envelope) -> Mapping[str, Any] | None:
        """Return a written result that only has to be delivered, if this very work left one."""
        finished = self._finished.get(envelope.task.task_id)
        if finished is None or finished.spec != envelope.task.spec:
            return None
        return finished.undelivered


def _same_work(finished: Finished, envelope: Envelope) -> bool:
    if finished.ok:
        return True
    return finished.dispatched_at is not None and finished.dispatched_at == envelope.dispatched_at
