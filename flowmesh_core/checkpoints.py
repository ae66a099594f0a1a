"""Checkpoints and adapters: from the block of a document to a local path.

What needs the network or unpacks is done by the ``Fetcher`` that the caller hands in. Nothing
stands in for weights that cannot be found: that is an error, never the base model.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import attrs

from flowmesh_core.errors import InputError

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from flowmesh_core.specs import Adapter, CheckpointLoad

__all__ = [
    "AdapterRef",
    "Fetcher",
    "Origin",
    "below",
    "bring",
    "existing",
    "resolve_adapters",
    "resolve_checkpoint",
]

_PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,99}\Z", re.ASCII)
_LORA_NAMES = ("final_lora", "checkpoints/final_lora")
_MODEL_NAMES = ("final_model", "checkpoints/final_model")
_MODEL_FILES = ("final_model.bin", "final_model.safetensors", "final_model.pt")
_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz", ".zip")
_DOWNLOAD_TIMEOUT_S = 60.0


@attrs.frozen(kw_only=True)
class AdapterRef:
    """A LoRA adapter.

    Attributes:
        name: Plain name, unique in its task.
        path: Folder with ``adapter_config.json``, or a ``.gguf`` file.
        scale: Factor on the adapter's weights.
        apply: ``runtime``, or ``merge`` into the base weights.
    """

    name: str
    path: Path
    scale: float = 1.0
    apply: str = "runtime"

    def to_dict(self) -> dict[str, Any]:
        """Return the reference as JSON data."""
        return {**attrs.asdict(self), "path": str(self.path)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdapterRef:
        """Build a reference from ``to_dict``."""
        return cls(**{**data, "path": Path(data["path"])})


class Fetcher(Protocol):
    """What brings files here; `flowmesh_core.artifacts.fetch` has the real one."""

    @property
    def orchestrator_url(self) -> str | None:
        """Base URL of the orchestrator, if there is one."""

    def download(
        self,
        url: str,
        folder: Path,
        *,
        filename: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = _DOWNLOAD_TIMEOUT_S,
        max_bytes: int | None = None,
    ) -> Path:
        """Bring a file into a folder; ``timeout_s`` is for each read, not in total."""

    def is_archive(self, path: Path) -> bool:
        """Tell from a file's content whether ``unpack`` would take it."""

    def unpack(self, archive: Path, folder: Path, archive_format: str = "auto") -> Path:
        """Unpack into a new folder and return it."""

    def locate_task(self, task_id: str) -> Path | None:
        """Find the folder of an earlier task's results."""


@attrs.frozen(kw_only=True)
class Origin:
    """Where weights come from: the path if it exists, else the task, else the URL.

    ``names`` lists what counts as weights in the folder of a task.
    """

    path: str | None = None
    task_id: str | None = None
    url: str | None = None
    base_url: str | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)
    timeout_s: float | None = None
    filename: str | None = None
    archive_format: str = "auto"
    subdir: str | None = None
    names: tuple[str, ...] = (*_MODEL_NAMES, *_LORA_NAMES, *_MODEL_FILES)


def resolve_checkpoint(load: CheckpointLoad, fetcher: Fetcher, *, folder: Path) -> Path:
    """Find or bring, below ``folder``, the checkpoint that a task starts from.

    A ``path`` that exists here wins, whatever the type; then the folder of the task; then the
    URL, given or built from ``base_url`` or the orchestrator, the task and ``filename``.

    Raises:
        InputError: It cannot be found, or several could be meant.
        ArtifactError: The download is refused, or the archive is not safe to unpack.
    """
    if load.type not in ("local", "http"):
        raise InputError(f"type must be local or http, got {load.type!r}")
    fields = attrs.fields_dict(Origin).keys() - {"names"}
    origin = Origin(**{field: getattr(load, field) for field in fields})
    return bring(origin, fetcher, folder / "checkpoint")


def resolve_adapters(
    adapters: Sequence[Adapter], fetcher: Fetcher, *, folder: Path
) -> tuple[AdapterRef, ...]:
    """Find or bring, below ``folder``, the adapters of a task, each like a checkpoint.

    Raises:
        InputError: Naming the adapters that cannot be used.
        ArtifactError: A download is refused, or an archive is not safe to unpack.
    """
    names = [adapter.name or f"lora_{i}" for i, adapter in enumerate(adapters)]
    problems = [
        f"adapter name must be a plain name of its own, got {name!r}"
        for i, name in enumerate(names)
        if not _PLAIN_NAME.match(name) or name in names[:i]
    ]
    problems += [
        f"adapter {name!r}: type must be lora, got {adapter.type!r}"
        for name, adapter in zip(names, adapters, strict=True)
        if adapter.type != "lora"
    ]
    if problems:
        raise InputError("; ".join(problems))
    return tuple(
        AdapterRef(
            name=name,
            path=_adapter_root(_bring_adapter(name, adapter, fetcher, folder), name),
            scale=adapter.scale,
            apply=adapter.apply,
        )
        for name, adapter in zip(names, adapters, strict=True)
    )


def _bring_adapter(name: str, adapter: Adapter, fetcher: Fetcher, folder: Path) -> Path:
    origin = Origin(
        path=adapter.path,
        task_id=adapter.task_id,
        url=adapter.url,
        headers=adapter.headers,
        filename=None if adapter.url else "final_lora.tar.gz",
        archive_format=adapter.archive_format,
        names=(*_LORA_NAMES, *_MODEL_NAMES),
    )
    return bring(origin, fetcher, folder / "adapters" / name)


def _adapter_root(path: Path, name: str) -> Path:
    if path.suffix == ".gguf":
        return path
    root = next((f for f in _breadth_first(path) if (f / "adapter_config.json").is_file()), None)
    root = root or next(filter(None, map(sole_gguf, _breadth_first(path))), None)
    if root is None:
        raise InputError(
            f"adapter {name!r}: {path} must be a .gguf file, or hold adapter_config.json in it or"
            " in a folder below"
        )
    return root


def _breadth_first(folder: Path) -> Iterator[Path]:
    queue = deque([folder] if folder.is_dir() else [])
    while queue:
        current = queue.popleft()
        yield current
        queue.extend(
            child
            for child in sorted(current.iterdir())
            if child.is_dir() and not child.is_symlink()
        )


def bring(origin: Origin, fetcher: Fetcher, folder: Path) -> Path:
    """Return the weights of an origin; what must be downloaded or unpacked goes to ``folder``."""
    path = next(filter(None, map(existing, _local_texts(origin))), None)
    if path is not None:
        return _enter(path, origin, fetcher, folder)
    task = fetcher.locate_task(origin.task_id) if origin.task_id else None
    if task is not None and origin.subdir and _inside(task, origin.subdir, field="subdir"):
        chosen = attrs.evolve(origin, subdir=None)
        return _enter(task / origin.subdir, chosen, fetcher, folder)
    found = _in_task(task, origin) if task else None
    if found is not None:
        return _enter(found, origin, fetcher, folder)
    url = _url_of(origin, fetcher)
    if url is None:
        raise InputError(_nowhere(origin, task))
    file = fetcher.download(
        url,
        folder,
        filename=origin.filename,
        headers=origin.headers,
        timeout_s=origin.timeout_s or _DOWNLOAD_TIMEOUT_S,
    )
    return _enter(file, origin, fetcher, folder)


def _local_texts(origin: Origin) -> Iterator[str]:
    """Yield what may be a path: a local stage gives its archive's path where others give a URL."""
    if origin.path:
        yield origin.path
    if origin.url and origin.url.startswith("/"):
        yield origin.url


def _enter(path: Path, origin: Origin, fetcher: Fetcher, folder: Path) -> Path:
    """Unpack an archive, then go to ``subdir``, else to the sole folder at the top."""
    forced = origin.archive_format not in ("auto", "none")
    unpacked = path.is_file() and (
        forced or (origin.archive_format == "auto" and fetcher.is_archive(path))
    )
    if unpacked:
        path = fetcher.unpack(path, folder / "extracted", origin.archive_format)
    if origin.subdir:
        return below(path, origin.subdir, field="subdir")
    entries = list(path.iterdir()) if unpacked else []
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else path


def _in_task(task: Path, origin: Origin) -> Path | None:
    """Find the weights in a task's folder; the folder itself is never taken for them."""
    if origin.filename:
        name = check_relative(origin.filename, field="filename")
        suffix = next(filter(name.endswith, _ARCHIVE_SUFFIXES), "")
        named = _either_form(task, name.removesuffix(suffix))
        if named is not None:
            return named
    found = list(filter(None, (_either_form(task, name) for name in origin.names)))
    if len(found) > 1:
        held = " and ".join(str(path.relative_to(task)) for path in found)
        raise InputError(f"task {origin.task_id} holds {held}; name one of them in subdir")
    return found[0] if found else None


def _either_form(task: Path, name: str) -> Path | None:
    """Return the folder or file of that name, else its archive."""
    suffixes = ("", *(() if name in _MODEL_FILES else _ARCHIVE_SUFFIXES))
    forms = (existing(str(task / f"{name}{suffix}")) for suffix in suffixes)
    return next(filter(None, forms), None)


def _url_of(origin: Origin, fetcher: Fetcher) -> str | None:
    base = origin.base_url or fetcher.orchestrator_url
    if origin.url or not (base and origin.task_id and origin.filename):
        return origin.url
    name = quote(check_relative(origin.filename, field="filename"))
    return f"{base.rstrip('/')}/api/v1/results/{quote(origin.task_id)}/files/{name}"


def _nowhere(origin: Origin, task: Path | None) -> str:
    """Say what was looked for and what would help."""
    tried = []
    if origin.path:
        tried.append(f"path {origin.path!r} does not exist on this worker")
    if origin.task_id:
        lacks = f"holds none of {', '.join(origin.names)}" if task else "has no results here"
        tried.append(f"task {origin.task_id} {lacks}")
        tried.append(
            "to bring it from the orchestrator, filename and base_url"
            " (or ORCHESTRATOR_BASE_URL) are needed"
        )
    return "; ".join(tried) or "one of path, taskId, url is required"


def existing(text: str) -> Path | None:
    """Return a local path that exists, or None for any other text.

    A relative one counts from this process's working folder; executors have one of their own.
    """
    try:
        path = Path(text).absolute()
        return path if path.exists() else None
    except (OSError, ValueError):  # too long, or with a NUL: no name of a file
        return None


def check_relative(text: str, *, field: str) -> str:
    """Return a relative path that stays inside its folder.

    Raises:
        InputError: It is absolute or climbs.
    """
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text:
        raise InputError(f"{field} must stay inside its folder, got {text!r}")
    return text


def _inside(folder: Path, text: str, *, field: str) -> Path | None:
    return existing(str(folder / check_relative(text, field=field)))


def below(folder: Path, text: str, *, field: str) -> Path:
    """Return an existing file or folder inside a folder.

    Raises:
        InputError: It climbs out, or does not exist; files of the same kind are listed.
    """
    path = _inside(folder, text, field=field)
    if path is not None:
        return path
    near = folder.glob(f"*{Path(text).suffix}") if folder.is_dir() else ()
    names = ", ".join(sorted(child.name for child in near)[:8])
    raise InputError(f"{field}: {folder} has no {text!r}; it has {names or 'none of its kind'}")


def sole_gguf(folder: Path) -> Path | None:
    """Return the only ``.gguf`` file of a folder that is no model of another format."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None
