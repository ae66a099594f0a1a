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

    A task that succeeded is not run again under its id, unless it now leads members that were
    not answered with it: its success would end them too. One that failed is run again when it is
    dispatched anew, which pub/sub shows by another ``dispatched_at``.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._held: dict[str, frozenset[str]] = {}
        self._finished: OrderedDict[str, tuple[Finished, frozenset[str]]] = OrderedDict()

    @property
    def held(self) -> frozenset[str]:
        """Ids of the tasks that are waiting or running."""
        return frozenset(self._held)

    def accept(self, envelope: Envelope) -> tuple[Verdict, Finished | None]:
        """Decide about a dispatch and hold it when it is to run."""
        task_id = envelope.task.task_id
        if task_id in self._held:
            return Verdict.HELD, None
        members = _members(envelope)
        finished, answered = self._finished.get(task_id, (None, frozenset()))
        if finished is not None and _same_work(finished, envelope, members <= answered):
            return Verdict.FINISHED, finished
        self._held[task_id] = members
        return Verdict.RUN, finished

    def finish(self, task_id: str, finished: Finished) -> None:
        """Let go of a task and remember how it ended."""
        self._finished[task_id] = finished, self._held.pop(task_id, frozenset())
        self._finished.move_to_end(task_id)
        while len(self._finished) > self._kept:
            self._finished.popitem(last=False)

    def find_undelivered(self, envelope: Envelope) -> Mapping[str, Any] | None:
        """Return a written result that only has to be delivered, if this very work left one."""
        finished, answered = self._finished.get(envelope.task.task_id, (None, frozenset()))
        if finished is None or finished.spec != envelope.task.spec:
            return None
        return finished.undelivered if _members(envelope) <= answered else None


def _members(envelope: Envelope) -> frozenset[str]:
    return frozenset(task.task_id for task in envelope.children).union(envelope.rejected)


def _same_work(finished: Finished, envelope: Envelope, all_answered: bool) -> bool:
    if finished.ok:
        return all_answered
    return finished.dispatched_at is not None and finished.dispatched_at == envelope.dispatched_at
