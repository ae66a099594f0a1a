"""From an outcome to a folder that is written whole and a result that is delivered."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flowmesh_core.artifacts.jsonl_export import write_jsonl_export
from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, Attempt, confine
from flowmesh_core.artifacts.manifest import build_manifest
from flowmesh_core.contract import Destination, Task
from flowmesh_core.errors import ArtifactError
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.specs import Postprocess
from flowmesh_core.validation import validate_model
from flowmesh_core.wire import encode_json

__all__ = ["ArtifactPipeline"]

# Above this many bytes the result is written on a thread.
_LARGE_BYTES = 1 << 18


class _Store(Protocol):
    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]: ...

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None: ...


class ArtifactPipeline:
    """Exports, uploads, writes, commits and delivers.

    Args:
        store_for: Gives the store of a destination type.
        fsync: Write through to the disk before the result is announced.
    """

    def __init__(self, store_for: Callable[[str], _Store], *, fsync: bool = False) -> None:
        self._store_for = store_for
        self._fsync = fsync

    async def finish(self, task: Task, attempt: Attempt, outcome: Outcome) -> Mapping[str, Any]:
        """Write a successful outcome whole.

        Returns:
            The result as it was written, with the addresses of its artifacts. It is not delivered
            yet: that is ``deliver``.

        Raises:
            ArtifactError: A file that the outcome names is missing, leads out of the folder, or
                could not be written or shipped.
        """
        result = dict(outcome.result)
        artifacts = list(outcome.artifacts)
        if "postprocess" in task.spec:
            artifacts += await self._export(task, attempt, result)
        for artifact in artifacts:
            await self._ship(task, attempt, artifact, result)
        body = _encode(task, result)
        try:
            if self._takes_long(task, attempt, body):
                await asyncio.to_thread(self._write, task, attempt, body)
            else:
                self._write(task, attempt, body)
        except OSError as exc:
            raise ArtifactError(
                f"task {task.task_id}: cannot write {attempt.final}: {exc}", retriable=True
            ) from exc
        return result

    def _takes_long(self, task: Task, attempt: Attempt, body: bytes) -> bool:
        """Whether writing syncs, may hash files or is much, and so must leave the event loop."""
        if self._fsync or len(body) > _LARGE_BYTES:
            return True
        if any("/" in name.strip("./") for name in task.common.output.artifacts):
            return True
        return len(os.listdir(attempt.folder)) > 2  # noqa: PTH208 - the hot path of every task

    async def deliver(self, task: Task, result: Mapping[str, Any]) -> None:
        """Hand a written result to the task's destination.

        Raises:
            UploadError: The destination refused it or could not be reached.
        """
        if task.destination.type != "local":
            store = self._store_for(task.destination.type)
            await store.deliver(task.task_id, result, task.destination)

    async def _export(self, task: Task, attempt: Attempt, result: dict[str, Any]) -> list[Artifact]:
        post = validate_model(
            Postprocess,
            task.spec["postprocess"] or {},
            where=f"task {task.task_id}",
            prefix="spec.postprocess",
        )
        if post.jsonl_export is None:
            return []
        items = result.get("items")
        if not isinstance(items, list):
            raise ArtifactError(
                f"task {task.task_id}: postprocess.jsonl_export needs a result with items"
            )
        block = await asyncio.to_thread(write_jsonl_export, post.jsonl_export, items, attempt)
        result["jsonl_export"] = block
        return [Artifact(block["relative_path"], result_key="jsonl_export")]

    async def _ship(
        self, task: Task, attempt: Attempt, artifact: Artifact, result: dict[str, Any]
    ) -> None:
        path = confine(attempt.folder, artifact.path)
        if not path.is_file():
            raise ArtifactError(f"task {task.task_id}: artifact {artifact.path} was not written")
        store = self._store_for(task.destination.type)
        final = attempt.final / artifact.path
        told = await store.upload(task.task_id, path, final, task.destination)
        if artifact.result_key:
            known = result.get(artifact.result_key)
            result[artifact.result_key] = {**(known if isinstance(known, dict) else {}), **told}

    def _write(self, task: Task, attempt: Attempt, body: bytes) -> None:
        attempt.write(RESULT_NAME, body, fsync=self._fsync)
        manifest = build_manifest(
            task.task_id,
            attempt.folder,
            expected=task.common.output.artifacts,
            digests={RESULT_NAME: hashlib.sha256(body).hexdigest()},
        )
        attempt.write(MANIFEST_NAME, encode_json(manifest), fsync=self._fsync)
        attempt.commit(fsync=self._fsync)


def _encode(task: Task, result: Mapping[str, Any]) -> bytes:
    try:
        return encode_json(result)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ArtifactError(f"task {task.task_id}: the result is not JSON: {exc}") from exc
