"""Hand the outcome of each member of a merged dispatch to the task that asked for it.

Laws:

1. Every member is answered exactly once: by its own outcome, or by the error that refused it.
2. A member's answer is its own: it never holds another member's items.
3. A member that failed spoils no neighbour; the leader's outcome alone decides the leader's event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh_core.contract import Envelope
from flowmesh_core.errors import FlowmeshError, MergeError
from flowmesh_core.executor import Outcome

__all__ = ["failure_document", "share_out"]


def failure_document(error: FlowmeshError) -> dict[str, Any]:
    """Return the result document of a member that failed."""
    return {
        "ok": False,
        "error": {"code": error.code, "message": str(error), "retriable": error.retriable},
    }


def share_out(envelope: Envelope, run: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """Give every child its outcome, whether it ran or was refused.

    Args:
        envelope: A leader and its children.
        run: One outcome per child that ran, keyed by task id.

    Returns:
        One outcome per child, in dispatch order, refused ones last.

    Raises:
        MergeError: A child has no outcome, or an outcome names no child.
    """
    children = [task.task_id for task in envelope.children]
    if missing := [task_id for task_id in children if task_id not in run]:
        raise MergeError(f"no outcome for {', '.join(missing)}")
    if strangers := sorted(set(run) - set(children)):
        raise MergeError(f"outcome for {', '.join(strangers)}, which is no member of the group")
    shared = {task_id: run[task_id] for task_id in children}
    refused = {task_id: Outcome(error=error) for task_id, error in envelope.rejected.items()}
    return shared | refused
