"""What an executor gave back or raised, as an outcome or an error of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh_core.errors import ExecutionError, FlowmeshError
from flowmesh_core.executor import Executor, Outcome

__all__ = ["as_execution_error", "as_outcome"]


def as_outcome(executor: Executor, answer: Any) -> Outcome:
    """Return what ``run`` answered as an outcome.

    Raises:
        ExecutionError: It is neither a mapping nor an outcome.
    """
    if isinstance(answer, Outcome):
        return answer
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
