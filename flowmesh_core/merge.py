"""Which tasks may run together, and who gets which outcome.

Laws:

1. Every member is answered exactly once: by its own outcome, or by the error that refused it.
2. A member's answer is its own: it never holds another member's items.
3. A member that failed spoils no neighbour; the leader's outcome alone decides the leader's event.
4. Only members that provably agree share a run: on the executor, on every path of its
   ``group_key`` and on their owner.
5. Only work that is provably the same, and deterministic, is done once for several members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowmesh_core.contract import Envelope, Task
from flowmesh_core.errors import FlowmeshError, MergeError
from flowmesh_core.executor import OWNER_FIELDS, Capability, ExecutorInfo, Outcome
from flowmesh_core.wire import encode_json, value_at

__all__ = [
    "canonical_json",
    "engine_key",
    "failure_document",
    "group_block",
    "group_key",
    "share_out",
    "work_key",
]

# What an answer does not depend on.
_ABOUT_DELIVERY = {"output", "postprocess", "priority", "resources", "timeoutSec", "timeout_s"}
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens", "num_requests")


def canonical_json(value: Any) -> str:
    """Return the same text for equal JSON data, whatever the order of its keys."""
    return encode_json(_sorted(value)).decode()


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def engine_key(info: ExecutorInfo, spec: Mapping[str, Any]) -> str:
    """Return the text on which tasks must agree to share a loaded engine."""
    return _values_at(spec, info.engine_key)


def _values_at(spec: Mapping[str, Any], paths: Iterable[str]) -> str:
    return canonical_json([value_at(spec, path) for path in paths])


def group_key(info: ExecutorInfo, task: Task) -> str | None:
    """Return the text on which tasks agree that may run as one group; None for one that may not.

    The spec is the rendered one; a secret counts by its name. Data and system prompts are in no
    executor's ``group_key``, so that members differ in them.
    """
    if Capability.GROUP not in info.capabilities or not info.group_key:
        return None
    owner = [task.metadata.get(name) for name in OWNER_FIELDS]
    kind = [info.name, task.task_type, task.common.enforce_cpu, owner]
    return canonical_json(kind) + _values_at(task.spec, info.group_key)


def work_key(task: Task) -> str | None:
    """Return the text on which tasks agree that have the same answer; None when chance decides."""
    if not _is_deterministic(task):
        return None
    spec = {key: value for key, value in task.spec.items() if key not in _ABOUT_DELIVERY}
    return canonical_json(spec)


def _is_deterministic(task: Task) -> bool:
    if task.task_type == "embedding":
        return True
    params = task.spec.get("inference")
    if task.task_type != "inference" or not isinstance(params, Mapping):
        return False  # the default temperature is above 0
    temperature = params.get("temperature")
    return temperature == 0 and not isinstance(temperature, bool)


def group_block(outcomes: Mapping[str, Outcome], computed: Iterable[str]) -> dict[str, Any]:
    """Return what the leader's result says of its group: the work that was really done.

    Args:
        outcomes: Of all members.
        computed: Ids of the members whose work was done, not copied from another one.
    """
    done = [outcomes[task_id].result.get("usage") for task_id in computed]
    usages = [usage for usage in done if isinstance(usage, Mapping)]
    total = {
        key: sum(usage.get(key, 0) for usage in usages)
        for key in _USAGE
        if any(isinstance(usage.get(key), int) for usage in usages)
    }
    return {"members": len(outcomes), "computed": len(done), "usage": total}


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
