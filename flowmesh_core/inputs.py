"""What a task reads, gathered before it runs: rows, files, models, weights, earlier results.

The parent turns the document's blocks into local paths and row sources; only these cross to the
process where the executor runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
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
from flowmesh_core.files import FileRef, resolve_files
from flowmesh_core.models import (
    InputOptions,
    ModelRef,
    detect_model_format,
    hub_cache_folder,
    resolve_model,
)
from flowmesh_core.rows import Row, RowSource
from flowmesh_core.wire import value_at

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from pydantic import BaseModel

    from flowmesh_core.contract import Task
    from flowmesh_core.specs import Model

__all__ = [
    "AdapterRef",
    "Fetcher",
    "FileRef",
    "InputOptions",
    "Inputs",
    "ModelRef",
    "Row",
    "RowSource",
    "detect_model_format",
    "hub_cache_folder",
    "resolve_adapters",
    "resolve_checkpoint",
    "resolve_files",
    "resolve_inputs",
    "resolve_model",
]

ModelT = TypeVar("ModelT", bound="BaseModel")


@attrs.frozen(kw_only=True)
class Inputs:
    """All that was gathered for one task; what its executor does not want stays empty.

    Attributes:
        rows: Prompts or records, read lazily; None when the task has no ``data``.
        eval_rows: Those of ``data.eval``, likewise.
        files: Those of ``files``, in the document's order.
        models: Further models, by the path into ``spec`` where the document names each.
        checkpoint: File or folder whose weights replace the model's.
        upstream: Stage name to the stored result document of that stage.
    """

    rows: RowSource | None = None
    eval_rows: RowSource | None = None
    files: tuple[FileRef, ...] = ()
    model: ModelRef | None = None
    models: Mapping[str, ModelRef] = attrs.field(factory=dict)
    checkpoint: Path | None = None
    adapters: tuple[AdapterRef, ...] = ()
    upstream: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)

    def paths(self) -> tuple[Path, ...]:
        """Return every local file or folder that is named here."""
        named = [
            *(model.path for model in (self.model, *self.models.values()) if model),
            *(rows.path for rows in (self.rows, self.eval_rows) if rows),
            *(file.path for file in self.files),
            self.checkpoint,
            *(adapter.path for adapter in self.adapters),
        ]
        return tuple(path for path in named if path is not None)

    def moved(self, places: Mapping[Path, Path]) -> Inputs:
        """Return the same inputs with every path where ``places`` says that it lies now."""
        return attrs.evolve(
            self,
            rows=self.rows and self.rows.moved(places),
            eval_rows=self.eval_rows and self.eval_rows.moved(places),
            files=tuple(attrs.evolve(file, path=places[file.path]) for file in self.files),
            model=self.model and _moved_model(self.model, places),
            models={name: _moved_model(model, places) for name, model in self.models.items()},
            checkpoint=_moved(self.checkpoint, places),
            adapters=tuple(attrs.evolve(a, path=places[a.path]) for a in self.adapters),
        )

    def weights_state(self) -> str:
        """Return what changes when the weights that lie on this machine are replaced.

        What was brought here for this task alone, by its address, does not count.
        """
        named = [model.path for model in (self.model, *self.models.values()) if model]
        named += [self.checkpoint]
        named += [adapter.path for adapter in self.adapters if adapter.apply == "merge"]
        lasting = (path for path in named if path is not None and ".inputs" not in path.parts)
        return ";".join(state for path in lasting for state in _state(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the inputs as JSON data."""
        return {
            "rows": self.rows and self.rows.to_dict(),
            "eval_rows": self.eval_rows and self.eval_rows.to_dict(),
            "files": [file.to_dict() for file in self.files],
            "model": self.model and self.model.to_dict(),
            "models": {name: model.to_dict() for name, model in self.models.items()},
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "upstream": dict(self.upstream),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inputs:
        """Build inputs from ``to_dict``."""
        return cls(
            rows=data["rows"] and RowSource.from_dict(data["rows"]),
            eval_rows=data["eval_rows"] and RowSource.from_dict(data["eval_rows"]),
            files=tuple(map(FileRef.from_dict, data["files"])),
            model=data["model"] and ModelRef.from_dict(data["model"]),
            models={name: ModelRef.from_dict(each) for name, each in data["models"].items()},
            checkpoint=data["checkpoint"] and Path(data["checkpoint"]),
            adapters=tuple(map(AdapterRef.from_dict, data["adapters"])),
            upstream=data["upstream"],
        )


def _state(path: Path) -> Iterator[str]:
    """Yield the state of a file, or of each file of a folder, without reading any."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        with contextlib.suppress(OSError):  # who loads it will say so
            status = file.stat()
            yield f"{file.name} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _moved_model(model: ModelRef, places: Mapping[Path, Path]) -> ModelRef:
    return attrs.evolve(model, path=_moved(model.path, places))


def _moved(path: Path | None, places: Mapping[Path, Path]) -> Path | None:
    return None if path is None else places[path]


def resolve_inputs(
    task: Task,
    wanted: Collection[str],
    *,
    models: Sequence[str] = (),
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
        wanted: Any of ``rows``, ``eval_rows``, ``files``, ``model``, ``adapters``, ``checkpoint``.
        models: Paths into the spec of what names a further model each.
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
    found = _gather_all(
        task.task_id,
        {
            **{name: partial(_GATHERED[name][1], gathering) for name in sorted(wanted)},
            **{path: partial(gathering.model_at, path) for path in models},
        },
    )
    further = {path: model for path in models if (model := found.pop(path)) is not None}
    return Inputs(upstream=task.common.upstream, models=further, **found)


def _gather_all(task_id: str, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Make every call, and tell all that failed in one error."""
    found: dict[str, Any] = {}
    problems: dict[str, FlowmeshError] = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except FlowmeshError as exc:
            problems[name] = exc
    if problems:
        texts = dict.fromkeys(_described(name, problem) for name, problem in problems.items())
        raise InputError(
            f"task {task_id}: {'; '.join(texts)}",
            retriable=all(problem.retriable for problem in problems.values()),
        ) from next(iter(problems.values()))
    return found


@attrs.frozen(kw_only=True)
class _Gathering:
    """One task's inputs being gathered: a method for each thing that an executor may want."""

    task: Task
    fetcher: Fetcher
    folder: Path
    options: InputOptions

    def rows(self) -> RowSource | None:
        from flowmesh_core.data import resolve_rows  # noqa: PLC0415 - see the import block

        trust = self.options.trust_remote_code
        return resolve_rows(self.task, self.fetcher, folder=self.folder, trust_remote_code=trust)

    def eval_rows(self) -> RowSource | None:
        from flowmesh_core.data import resolve_eval_rows  # noqa: PLC0415 - see the import block

        trust = self.options.trust_remote_code
        return resolve_eval_rows(
            self.task, self.fetcher, folder=self.folder, trust_remote_code=trust
        )

    def files(self) -> tuple[FileRef, ...]:
        from flowmesh_core.specs import FilesBlock  # noqa: PLC0415 - see the import block

        if self.task.spec.get("files") is None:
            return ()
        return resolve_files(
            self._block("files", FilesBlock), self.fetcher, folder=self.folder / "files"
        )

    def model(self) -> ModelRef:
        source = self._model_block().source
        return resolve_model(source, self.fetcher, folder=self.folder, options=self.options)

    def model_at(self, path: str) -> ModelRef | None:
        """Find the model of a block like ``model``, or of an ``identifier`` in it or by itself."""
        from flowmesh_core.specs import ModelSource  # noqa: PLC0415 - see the import block
        from flowmesh_core.validation import validate_model  # noqa: PLC0415 - as above

        block = value_at(self.task.spec, path)
        if block is None:
            return None
        if isinstance(block, str):
            block = {"identifier": block}
        if not isinstance(block, Mapping):
            raise InputError(
                f"must be an identifier, or a mapping with source or identifier, got {block!r}"
            )
        if (source := block.get("source")) is None:
            source = {key: block[key] for key in ("identifier", "revision") if key in block}
        found = validate_model(ModelSource, source, where="", prefix=f"spec.{path}.source")
        options = attrs.evolve(self.options, default_identifier=None)
        return resolve_model(found, self.fetcher, folder=self.folder / path, options=options)

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
    "eval_rows": ("spec.data.eval", _Gathering.eval_rows),
    "files": ("spec.files", _Gathering.files),
    "model": ("spec.model.source", _Gathering.model),
    "rows": ("spec.data", _Gathering.rows),
}


def _described(name: str, problem: FlowmeshError) -> str:
    text = str(problem)
    field = _GATHERED[name][0] if name in _GATHERED else f"spec.{name}"
    return text if text.startswith("spec.") else f"{field}: {text}"
