"""``manifest.json``: what a task's folder holds, with sizes and digests.

Source: the contract's artifact pipeline. Only the folder's own content is ever listed: a link
that leads out of it counts as absent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME
from flowmesh_core.contract import utc_now
from flowmesh_core.errors import ManifestError

__all__ = ["build_manifest"]

_EXPECTED = ("artifacts", "logs", RESULT_NAME)


def build_manifest(
    task_id: str,
    folder: Path,
    *,
    expected: Iterable[str] = (),
    digests: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """List a task's folder.

    Args:
        task_id: Named in the manifest.
        folder: The task's or the attempt's folder; paths in the manifest are relative to it.
        expected: ``spec.output.artifacts``; listed as ``missing`` when absent.
        digests: SHA-256 of files that the caller has hashed already, by name.

    Raises:
        ManifestError: A file vanished or cannot be read while it was listed.
    """
    now = utc_now()
    required = sorted({_normalise(name) for name in expected}.union(_EXPECTED) - {""})
    known = digests or {}
    try:
        present = {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
        others = sorted(present - set(required) - {MANIFEST_NAME})
        entries = [
            _entry(folder, name, now, required=name in required, digest=known.get(name))
            for name in (*required, *others)
        ]
    except OSError as exc:
        raise ManifestError(f"task {task_id}: cannot list {folder}: {exc}") from exc
    return {"task_id": task_id, "generated_at": now, "entries": entries}


def _normalise(name: str) -> str:
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


def _entry(
    folder: Path, name: str, now: str, *, required: bool, digest: str | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "path": name, "type": _kind(name), "required": required}
    path = folder / name
    if not _is_visible(name) or not _is_ours(path, folder):
        return {**entry, "status": "missing"}
    entry.update(status="present", updated_at=now)
    if path.is_dir():
        files = [item for item in path.rglob("*") if item.is_file() and not item.is_symlink()]
        size = sum(item.stat().st_size for item in files)
        return {**entry, "size": size, "file_count": len(files)}
    entry["size"] = path.stat().st_size
    if path.is_file():  # a pipe would wait for its writer
        entry["sha256"] = digest or _sha256(path)
    return entry


def _is_visible(name: str) -> bool:
    """Whether the name is of the task's content: what begins with a dot ends with the attempt."""
    return not name.startswith(".") and ".." not in PurePosixPath(name).parts


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether the path exists and, links resolved, lies in the folder."""
    if not os.path.lexists(path):
        return False
    if not path.is_symlink() and path.parent == folder:
        return True
    return path.exists() and folder.resolve() in path.resolve().parents


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
