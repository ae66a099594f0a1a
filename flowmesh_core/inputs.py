"""What a task reads, gathered before it runs: rows, model, adapters, checkpoint, earlier results.

The parent turns the document's blocks into local paths and row sources; only these cross to the
process where the executor runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from flowmesh_core.checkpoints import (
    AdapterRef,
    Fetcher,
    resolve_adapters,
    resolve_checkpoint,
)
from flowmesh_core.errors import FlowmeshError, InputError, PluginError
from flowmesh_core.models import (
    InputOptions,
    ModelRef,
    detect_model_format,
    hub_cache_folder,
    resolve_model,
)
from flowmesh_core.rows import Row, RowSource

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from pydantic import BaseModel

    from flowmesh_core.contract import Task
    from flowmesh_core.specs import Model

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

ModelT = TypeVar("ModelT", bound="BaseModel")


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
    adapters: tuple[AdapterRef, ...] = ()
    upstream: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)

    def paths(self) -> tuple[Path, ...]:
        """Return every local file or folder that is named here."""
        named = [
            self.model.path if self.model else None,
            self.rows.path if self.rows else None,
            self.checkpoint,
            *(adapter.path for adapter in self.adapters),
        ]
        return tuple(path for path in named if path is not None)

    def moved(self, places: Mapping[Path, Path]) -> Inputs:
        """Return the same inputs with every path where ``places`` says that it lies now."""
        return attrs.evolve(
            self,
            rows=self.rows and self.rows.moved(places),
            model=self.model and attrs.evolve(self.model, path=_moved(self.model.path, places)),
            checkpoint=_moved(self.checkpoint, places),
            adapters=tuple(attrs.evolve(a, path=places[a.path]) for a in self.adapters),
        )

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
            adapters=tuple(map(AdapterRef.from_dict, data["adapters"])),
            upstream=data["upstream"],
        )


def _moved(path: Path | None, places: Mapping[Path, Path]) -> Path | None:
    return None if path is None else places[path]


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
        PluginError: The executor wants something that is no input.
    """
    options = InputOptions(
        hub_cache=hub_cache_folder({}) if hub_cache is None else hub_cache,
        default_identifier=default_identifier,
        trust_remote_code=trust_remote_code,
        offline=offline,
        kinds=sources or {},
    )
    gathering = _Gathering(task=task, fetcher=fetcher, folder=folder / ".inputs", options=options)
    unknown = set(wanted) - _GATHERED.keys()
    if unknown:
        raise PluginError(f"inputs must be of {', '.join(_GATHERED)}, got {', '.join(unknown)}")
    found: dict[str, Any] = {}
    problems: dict[str, FlowmeshError] = {}
    for name in sorted(wanted):
        try:
            found[name] = _GATHERED[name][1](gathering)
        except FlowmeshError as exc:
            problems[name] = exc
    if problems:
        texts = dict.fromkeys(_described(name, problem) for name, problem in problems.items())
        raise InputError(
            f"task {task.task_id}: {'; '.join(texts)}",
            retriable=all(problem.retriable for problem in problems.values()),
        ) from next(iter(problems.values()))
    return Inputs(upstream=task.common.upstream, **found)


@attrs.frozen(kw_only=True)
class _Gathering:
    """One task's inputs being gathered: a method for each thing that an executor may want."""

    task: Task
    fetcher: Fetcher
    folder: Path
    options: InputOptions

    def rows(self) -> RowSource | None:
        from flowmesh_core.data import resolve_rows  # noqa: PLC0415 - see the import block

        return resolve_rows(
            self.task,
            self.fetcher,
            folder=self.folder,
            trust_remote_code=self.options.trust_remote_code,
        )

    def model(self) -> ModelRef:
        source = self._model_block().source
        return resolve_model(source, self.fetcher, folder=self.folder, options=self.options)

    def adapters(self) -> tuple[AdapterRef, ...]:
        adapters = self._model_block().adapters
        return resolve_adapters(adapters, self.fetcher, folder=self.folder)

    def checkpoint(self) -> Path | None:
        from flowmesh_core.specs import Checkpoint  # noqa: PLC0415 - see the import block

        load = self._block("checkpoint", Checkpoint).load
        if load is None:
            return None
        return resolve_checkpoint(load, self.fetcher, folder=self.folder)

    def _model_block(self) -> Model:
        from flowmesh_core.specs import Model  # noqa: PLC0415 - see the import block

        return self._block("model", Model)

    def _block(self, name: str, model: type[ModelT]) -> ModelT:
        from flowmesh_core.validation import validate_model  # noqa: PLC0415 - see the import block

        block = self.task.spec.get(name)
        return validate_model(
            model, {} if block is None else block, where="", prefix=f"spec.{name}"
        )


# What an executor may want: the field that messages name, and how it is gathered.
_GATHERED: Mapping[str, tuple[str, Callable[[_Gathering], Any]]] = {
    "adapters": ("spec.model.adapters", _Gathering.adapters),
    "checkpoint": ("spec.checkpoint.load", _Gathering.checkpoint),
    "model": ("spec.model.source", _Gathering.model),
    "rows": ("spec.data", _Gathering.rows),
}


def _described(name: str, problem: FlowmeshError) -> str:
    text = str(problem)
    return text if text.startswith("spec.") else f"{_GATHERED[name][0]}: {text}"
