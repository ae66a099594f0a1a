"""``manifest.json``: what a task's folder holds, with sizes and digests.

Source: the contract's artifact pipeline. Only the folder's own content is ever listed: a link
that leads out of it counts as absent.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import attrs

from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME
from flowmesh_core.errors import ManifestError
from flowmesh_core.wire import utc_now

__all__ = ["Seen", "build_manifest", "normalise_name"]

_EXPECTED = ("artifacts", "logs", RESULT_NAME)


@attrs.frozen(kw_only=True)
class Seen:
    """What was read of a task's folder already, by path below it.

    Attributes:
        digests: SHA-256 of files.
        sizes: Of folders: bytes and number of the regular files below.
    """

    digests: dict[str, str] = attrs.field(factory=dict)
    sizes: dict[str, tuple[int, int]] = attrs.field(factory=dict)


def build_manifest(
    task_id: str,
    folder: Path,
    *,
    expected: Iterable[str] = (),
    seen: Seen | None = None,
) -> dict[str, Any]:
    """List a task's folder.

    Args:
        task_id: Named in the manifest.
        folder: The task's or the attempt's folder; paths in the manifest are relative to it.
        expected: ``spec.output.artifacts``; listed as ``missing`` when absent.
        seen: What need not be read again.

    Raises:
        ManifestError: A file vanished or cannot be read while it was listed.
    """
    now, seen = utc_now(), seen or Seen()
    required = sorted({normalise_name(name) for name in expected}.union(_EXPECTED) - {""})
    try:
        present = {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
        others = sorted(present - set(required) - {MANIFEST_NAME})
        entries = [
            _entry(folder, name, now, required=name in required, seen=seen)
            for name in (*required, *others)
        ]
    except OSError as exc:
        raise ManifestError(f"task {task_id}: cannot list {folder}: {exc}") from exc
    return {"task_id": task_id, "generated_at": now, "entries": entries}


def normalise_name(name: str) -> str:
    """Return a name of ``output.artifacts`` as the manifest lists it."""
    name = name.strip().rstrip("/")
    while name.startswith("./"):
        name = name[2:]
    return name


def _kind(name: str) -> str:
    if name == RESULT_NAME:
        return "result"
    if name == "logs" or name.startswith("logs/"):
        return "logs"
    if name == "artifacts" or name.startswith("artifacts/") or "." in name.rsplit("/", 1)[-1]:
        return "artifact"
    return "directory"


def _entry(folder: Path, name: str, now: str, *, required: bool, seen: Seen) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "path": name, "type": _kind(name), "required": required}
    status = _find(folder, name)
    if status is None:
        return {**entry, "status": "missing"}
    entry.update(status="present", updated_at=now, size=status.st_size)
    if stat.S_ISDIR(status.st_mode):
        entry["size"], entry["file_count"] = seen.sizes.get(name) or _measure(f"{folder}/{name}")
    elif stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer
        entry["sha256"] = seen.digests.get(name) or _sha256(folder / name)
    return entry


def _find(folder: Path, name: str) -> os.stat_result | None:
    """Return what the name stands for, links followed; None when that is not the task's content."""
    if not _is_visible(name):
        return None
    try:
        status = os.lstat(f"{folder}/{name}")
        # Only a link can lead out, and the last part of a plain name is looked at here.
        if "/" not in name and not stat.S_ISLNK(status.st_mode):
            return status
        path = folder / name
        return path.stat() if folder.resolve() in path.resolve().parents else None
    except RuntimeError:  # how resolve() reports links in a circle before Python 3.13
        return None
    except ValueError:  # text that no file system can hold as a name
        return None
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


def _measure(folder: str) -> tuple[int, int]:
    """Return bytes and number of the regular files below a folder, links left out."""
    size = count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                inner_size, inner_count = _measure(entry.path)
                size, count = size + inner_size, count + inner_count
            elif entry.is_file(follow_symlinks=False):
                size, count = size + entry.stat(follow_symlinks=False).st_size, count + 1
    return size, count


def _is_visible(name: str) -> bool:
    """Whether the name is of the task's content: what begins with a dot ends with the attempt."""
    return not name.startswith(".") and ".." not in PurePosixPath(name).parts


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
