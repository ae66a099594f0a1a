"""What an executor gave back or raised, as an outcome or an error of ours."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flowmesh_core.errors import ExecutionError, FlowmeshError
from flowmesh_core.executor import Executor, Outcome, RunContext

__all__ = ["answer_group", "as_execution_error", "as_outcome"]


def as_outcome(executor: Executor, answer: Any) -> Outcome:
    """Return what ``run`` answered as an outcome.

    Raises:
        ExecutionError: It is neither a mapping nor an outcome.
    """
    if isinstance(answer, Outcome):
        if answer.error is None or isinstance(answer.error, FlowmeshError):
            return answer
        return Outcome(error=as_execution_error(answer.error))
    if isinstance(answer, Mapping):
        return Outcome(result=answer)
    raise ExecutionError(
        f"executor {type(executor).__name__} must return a mapping or an Outcome, "
        f"got {type(answer).__name__}"
    )


def as_execution_error(exc: BaseException) -> FlowmeshError:
    """Return what an executor raised as an error of ours."""
    if isinstance(exc, FlowmeshError):
        return exc
    if isinstance(exc, (SystemExit, KeyboardInterrupt)):
        return ExecutionError(f"the executor tried to end the process: {exc!r}")
    # What the machine did may pass; what the code or the document did will not.
    retriable = isinstance(exc, (OSError, MemoryError))
    return ExecutionError(f"{type(exc).__name__}: {exc}", retriable=retriable)


def answer_group(executor: Executor, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Outcome]]:
    """Run a group; yield exactly one outcome per member, whatever ``run_group`` does."""
    waiting = {ctx.task_id: ctx for ctx in ctxs}
    error: FlowmeshError = ExecutionError("run_group ended without an answer for it")
    try:
        for task_id, answer in executor.run_group(ctxs):
            _strike_off(waiting, task_id)
            yield task_id, _as_member_outcome(executor, answer)
    except GeneratorExit:
        raise
    except BaseException as exc:  # noqa: BLE001 - executor boundary
        error = as_execution_error(exc)
        if error is not exc:
            text = "".join(traceback.format_exception(exc))
            for ctx in waiting.values():
                ctx.log(text, level="error")
    yield from ((task_id, Outcome(error=error)) for task_id in waiting)


def _strike_off(waiting: dict[str, RunContext], task_id: str) -> None:
    if waiting.pop(task_id, None) is None:
        raise ExecutionError(f"run_group answered {task_id!r}, which has no answer to come")


def _as_member_outcome(executor: Executor, answer: Any) -> Outcome:
    try:
        return as_outcome(executor, answer)
    except ExecutionError as exc:  # this member's fault alone
        return Outcome(error=exc)
