"""From an outcome to a folder that is written whole and a result that is delivered.

Export, pack, ship, write, commit, deliver: in that order, each file read once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol

from flowmesh_core.artifacts.archive import PackOptions
from flowmesh_core.artifacts.jsonl_export import write_jsonl_export
from flowmesh_core.artifacts.layout import MANIFEST_NAME, RESULT_NAME, Attempt
from flowmesh_core.artifacts.manifest import Seen, build_manifest
from flowmesh_core.artifacts.shipping import Progress, Sender, Shipping
from flowmesh_core.contract import Destination, Task
from flowmesh_core.errors import ArtifactError
from flowmesh_core.executor import Artifact, Outcome
from flowmesh_core.specs import Postprocess
from flowmesh_core.validation import validate_model
from flowmesh_core.wire import encode_json

__all__ = ["ArtifactPipeline"]

# Above this many bytes the result is written on a thread.
_LARGE_BYTES = 1 << 18


class _Store(Sender, Protocol):
    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None: ...


class ArtifactPipeline:
    """Exports, packs, ships, writes, commits and delivers.

    Args:
        store_for: Gives the store of a destination type.
        fsync: Write through to the disk before the result is announced.
        packing: How folders are compressed.
        upload_optional: A failed upload is a warning, and the result has no address.
        cleanup_after_upload: Remove a folder, its archive and the checkpoints once the store has
            given the archive back unchanged.
        on_progress: Told of uploads, by task id, about once a second.
    """

    def __init__(
        self,
        store_for: Callable[[str], _Store],
        *,
        fsync: bool = False,
        packing: PackOptions | None = None,
        upload_optional: bool = False,
        cleanup_after_upload: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        self._store_for = store_for
        self._fsync = fsync
        self._packing = packing or PackOptions(fsync=fsync)
        self._upload_optional = upload_optional
        self._cleanup = cleanup_after_upload
        self._on_progress = on_progress

    async def finish(self, task: Task, attempt: Attempt, outcome: Outcome) -> Mapping[str, Any]:
        """Write a successful outcome whole.

        Returns:
            The result as it was written, with the addresses of its artifacts. It is not delivered
            yet: that is ``deliver``.

        Raises:
            ArtifactError: A file that the outcome names is missing, leads out of the folder, or
                could not be written or packed.
            UploadError: It could not be shipped; the attempt keeps it.
        """
        result = dict(outcome.result)
        artifacts = list(outcome.artifacts)
        if "postprocess" in task.spec:
            artifacts += await self._export(task, attempt, result)
        seen, gone = await self._ship(task, attempt, artifacts, result)
        body = _encode(task, result)
        written = task, attempt, body, seen, gone
        try:
            if self._takes_long(task, attempt, body):
                await asyncio.to_thread(self._write, *written)
            else:
                self._write(*written)
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
        self, task: Task, attempt: Attempt, artifacts: Iterable[Artifact], result: dict[str, Any]
    ) -> tuple[Seen, list[str]]:
        """Ship everything; return what was read on the way, and what need not be kept."""
        if not artifacts:
            return Seen(), []
        if task.destination.type != "local":
            _check_names(task, artifacts)
        shipping = Shipping(
            task=task,
            attempt=attempt,
            store=self._store_for(task.destination.type),
            result=result,
            options=self._packing,
            optional=self._upload_optional,
            on_progress=self._on_progress,
        )
        for artifact in artifacts:
            await shipping.ship(artifact)
        return shipping.seen, shipping.clear_away() if self._cleanup else []

    def _write(
        self, task: Task, attempt: Attempt, body: bytes, seen: Seen, gone: Iterable[str]
    ) -> None:
        with attempt.leaving_out(gone):
            attempt.write(RESULT_NAME, body, fsync=self._fsync)
            seen.digests[RESULT_NAME] = hashlib.sha256(body).hexdigest()
            expected = task.common.output.artifacts
            manifest = build_manifest(task.task_id, attempt.folder, expected=expected, seen=seen)
            attempt.write(MANIFEST_NAME, encode_json(manifest), fsync=self._fsync)
            attempt.commit(fsync=self._fsync)


def _check_names(task: Task, artifacts: Iterable[Artifact]) -> None:
    """Refuse files that would replace each other: a destination knows them by their last name."""
    names = Counter(
        PurePosixPath(item.path).name + (".tar.gz" if item.archive else "") for item in artifacts
    )
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise ArtifactError(
            f"task {task.task_id}: several artifacts are named {', '.join(twice)} and would"
            " replace each other; give each a name of its own"
        )


def _encode(task: Task, result: Mapping[str, Any]) -> bytes:
    try:
        return encode_json(result)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ArtifactError(f"task {task.task_id}: the result is not JSON: {exc}") from exc
