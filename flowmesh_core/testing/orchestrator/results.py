"""Results folder of the stand-in: documents, uploads, manifest, copies made for merged tasks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["ResultStore", "now"]


def now() -> str:
    """Time as it stands on the wire."""
    return datetime.now(timezone.utc).isoformat()


class ResultStore:
    """What the earlier orchestrator keeps of each task below one folder.

    Args:
        root: The results folder; may be shared with a worker.
        expected: Entries that a task's document promises, from its id.
    """

    def __init__(self, root: Path, expected: Callable[[str], list[str]]) -> None:
        self._root = root
        self._expected = expected
        self._lock = threading.RLock()
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, task_id: str) -> Path:
        """A task's folder; other characters than letters, digits, - and _ become _."""
        return self._root / re.sub(r"[^\w-]", "_", task_id)

    def load(self, task_id: str) -> Any:
        """The stored document, or None; text that is no JSON comes wrapped."""
        path = self.folder(task_id) / "responses.json"
        with self._lock:
            if not path.is_file():
                return None
            text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError:
            return {"task_id": task_id, "raw": text}

    def save(self, task_id: str, document: dict[str, Any]) -> Path:
        """Write a document over any earlier one and list the folder again."""
        path = self.folder(task_id) / "responses.json"
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
            self._write_manifest(task_id)
        return path

    def receive(self, task_id: str, name: str, content: Iterator[bytes]) -> Path:
        """Stream an upload to ``artifacts/`` and point the stored document at it."""
        path = self.folder(task_id) / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._root / f".upload-{uuid.uuid4()}"
        try:
            with partial.open("wb") as file:
                file.writelines(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._rewrite_export(task_id, path)
            self._write_manifest(task_id)
        return path

    def find(self, task_id: str, name: str) -> Path | None:
        """An uploaded file, else a file of the task folder itself."""
        places = (self.folder(task_id) / "artifacts" / name, self.folder(task_id) / name)
        return next((path for path in places if path.is_file()), None)

    def mirror(self, parent_id: str, child_ids: list[str]) -> bool:
        """Give each child without a document a copy of its parent's folder, wrong answers and all.

        Returns:
            False when the parent has no folder yet, so that it must be tried again later.
        """
        source = self.folder(parent_id)
        with self._lock:
            if not source.is_dir():
                return False
            for child in map(self.folder, child_ids):
                if not (child / "responses.json").is_file():
                    shutil.rmtree(child, ignore_errors=True)
                    shutil.copytree(source, child)
        return True

    def _rewrite_export(self, task_id: str, path: Path) -> None:
        document = self.load(task_id)
        result = document.get("result") if isinstance(document, dict) else None
        if not isinstance(result, dict):
            return
        children = result.get("children")
        members = [result, *(children.values() if isinstance(children, dict) else ())]
        exports = [member.get("jsonl_export") for member in members if isinstance(member, dict)]
        for export in exports:
            if isinstance(export, dict) and Path(str(export.get("path", ""))).name == path.name:
                export["worker_path"] = export["path"]
                export["path"] = str(path.resolve())
                export["relative_path"] = f"artifacts/{path.name}"
                export["url"] = f"/api/v1/results/{task_id}/files/{path.name}"
        self.save(task_id, document)

    def _write_manifest(self, task_id: str) -> None:
        folder = self.folder(task_id)
        for name in ("logs", "artifacts"):
            (folder / name).mkdir(exist_ok=True)
        promised = {name.strip().rstrip("/").removeprefix("./") for name in self._expected(task_id)}
        required = promised | {"responses.json", "logs", "artifacts"}
        others = {path.name for path in folder.iterdir()} - required - {"manifest.json"}
        entries = [_entry(folder, name, required=True) for name in sorted(required)]
        entries += [_entry(folder, name, required=False) for name in sorted(others)]
        manifest = {"task_id": task_id, "generated_at": now(), "entries": entries}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _entry(folder: Path, name: str, *, required: bool) -> dict[str, Any]:
    path = folder / name
    entry: dict[str, Any] = {
        "name": name,
        "path": name,
        "type": _kind(name),
        "required": required,
        "status": "present" if path.exists() else "missing",
    }
    if path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entry |= {"updated_at": now(), "size": path.stat().st_size, "sha256": digest}
    elif path.is_dir():
        sizes = [item.stat().st_size for item in path.rglob("*") if item.is_file()]
        entry |= {"updated_at": now(), "size": sum(sizes), "file_count": len(sizes)}
    return entry


def _kind(name: str) -> str:
    if name == "responses.json":
        return "result"
    if name == "logs" or name.startswith("logs/"):
        return "logs"
    return "artifact" if name.startswith("artifacts") or Path(name).suffix else "directory"
