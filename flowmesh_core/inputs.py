"""What a task reads, gathered before it runs: rows, model, adapters, checkpoint, earlier results.

The parent turns the document's blocks into local paths and row sources; only these cross to the
process where the executor runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from flowmesh_core.checkpoints import (
    AdapterRef,
    Fetcher,
    resolve_adapters,
    resolve_checkpoint,
)
from flowmesh_core.errors import FlowmeshError, InputError
from flowmesh_core.models import (
    InputOptions,
    ModelRef,
    detect_model_format,
    hub_cache_folder,
    resolve_model,
)
from flowmesh_core.rows import Row, RowSource

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from flowmesh_core.contract import Task

__all__ = [
    "AdapterRef",
    "Fetcher",
    "InputOptions",
    "Inputs",
    "ModelRef",
    "Row",
    "RowSource",
    "detect_model_format",
    "hub_cache_folder",
    "resolve_adapters",
    "resolve_checkpoint",
    "resolve_inputs",
    "resolve_model",
]


@attrs.frozen(kw_only=True)
class Inputs:
    """All that was gathered for one task; what its executor does not want stays empty.

    Attributes:
        rows: Prompts or records, read lazily; None when the task has no ``data``.
        checkpoint: File or folder whose weights replace the model's.
        upstream: Stage name to the stored result document of that stage.
    """

    rows: RowSource | None = None
    model: ModelRef | None = None
    checkpoint: Path | None = None
    adapters: tuple[AdapterRef, ...] = attrs.field(default=(), converter=tuple)
    upstream: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs as JSON data."""
        return {
            "rows": self.rows and self.rows.to_dict(),
            "model": self.model and self.model.to_dict(),
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "upstream": dict(self.upstream),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inputs:
        """Build inputs from ``to_dict``."""
        return cls(
            rows=data["rows"] and RowSource.from_dict(data["rows"]),
            model=data["model"] and ModelRef.from_dict(data["model"]),
            checkpoint=data["checkpoint"] and Path(data["checkpoint"]),
            adapters=[AdapterRef.from_dict(adapter) for adapter in data["adapters"]],
            upstream=data["upstream"],
        )


def resolve_inputs(
    task: Task,
    wanted: Collection[str],
    *,
    fetcher: Fetcher,
    folder: Path,
    sources: Mapping[str, Callable[..., str | Path]] | None = None,
    trust_remote_code: bool = False,
    default_identifier: str | None = None,
    hub_cache: Path | None = None,
    offline: bool = False,
) -> Inputs:
    """Gather what an executor wants of a task's inputs. Blocks; run it on a thread.

    Args:
        task: Secrets that its spec names are resolved.
        wanted: Any of ``rows``, ``model``, ``adapters``, ``checkpoint``.
        fetcher: Downloads, unpacks and finds earlier results.
        folder: The attempt's folder; what is brought here goes to ``.inputs`` in it.
        sources: Resolvers of further kinds of ``model.source``.
        trust_remote_code: Whether the operator lets a repository's own code run.
        default_identifier: Model of tasks that name none.
        hub_cache: Root of the model hub's cache; the usual one when not given.
        offline: Never ask the model hub.

    Raises:
        InputError: Naming the task and everything that could not be gathered.
    """
    options = InputOptions(
        hub_cache=hub_cache_folder({}) if hub_cache is None else hub_cache,
        default_identifier=default_identifier,
        trust_remote_code=trust_remote_code,
        offline=offline,
        kinds=sources or {},
    )
    gathering = _Gathering(task=task, fetcher=fetcher, folder=folder / ".inputs", options=options)
    found, problems = {}, []
    for name in sorted(wanted):
        try:
            found[name] = getattr(gathering, name)()
        except FlowmeshError as exc:
            problems.append(exc)
    if problems:
        raise InputError(
            f"task {task.task_id}: {'; '.join(map(str, problems))}",
            retriable=all(problem.retriable for problem in problems),
        ) from problems[0]
    return Inputs(upstream=task.common.upstream, **found)
