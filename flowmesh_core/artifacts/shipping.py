"""Packs and ships the artifacts of one task, each file read once on its way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import attrs

from flowmesh_core.artifacts.archive import Packed, PackOptions, pack
from flowmesh_core.artifacts.layout import Attempt, confine
from flowmesh_core.artifacts.manifest import Seen, normalise_name
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.contract import Destination, Task
from flowmesh_core.errors import ArtifactError, UploadError
from flowmesh_core.executor import Artifact

__all__ = ["Progress", "Sender", "Shipping"]

Progress = Callable[[str, Mapping[str, Any]], None]

_log = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
_SUFFIX = ".tar.gz"
_PROGRESS_INTERVAL_S = 1.0


class Sender(Protocol):
    """The part of a store that takes files."""

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        """Ship one file, which may still grow."""


@attrs.define(kw_only=True)
class Shipping:
    """What becomes of one task's artifacts.

    Attributes:
        store: Where they go.
        result: Gets what the store tells of each.
        options: How to compress.
        optional: A failed upload is a warning, and the result has no address.
        on_progress: Told of every upload, about once a second.
        seen: What was read on the way.
    """

    task: Task
    attempt: Attempt
    store: Sender
    result: dict[str, Any]
    options: PackOptions
    optional: bool = False
    on_progress: Progress | None = None
    seen: Seen = attrs.field(factory=Seen)
    _packed: dict[str, tuple[str, bool]] = attrs.field(factory=dict)

    async def ship(self, artifact: Artifact) -> None:
        """Ship a file as it is, or a folder packed.

        Raises:
            ArtifactError: It was not written, leads out of the task's folder, or cannot be packed.
            UploadError: It could not be shipped; what is here stays.
        """
        if artifact.archive:
            await self._ship_folder(artifact)
        else:
            await self._ship_file(artifact)

    async def _ship_file(self, artifact: Artifact) -> None:
        path = self._find(artifact, Path.is_file)
        parcel = self._wrap(path, artifact.path)
        receipt = await self._send(parcel)
        if parcel.sha256:
            self.seen.digests[normalise_name(artifact.path)] = parcel.sha256
        if artifact.result_key and receipt:
            known = self.result.get(artifact.result_key)
            known = known if isinstance(known, dict) else {}
            self.result[artifact.result_key] = {**known, **receipt.told}

    async def _ship_folder(self, artifact: Artifact) -> None:
        folder = self._find(artifact, Path.is_dir)
        relative = str(PurePosixPath(artifact.path))
        archive = confine(self.attempt.folder, relative + _SUFFIX)
        parcel = self._wrap(archive, relative + _SUFFIX, growing=True)
        sending = asyncio.ensure_future(self._send(parcel))
        try:
            packed = await asyncio.to_thread(
                pack,
                folder,
                archive,
                options=self.options,
                hashed=self._listed_below(relative),
                on_growth=parcel.grow,
            )
        except BaseException as exc:
            parcel.give_up(exc)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            raise
        parcel.seal(packed.size_bytes, packed.sha256)
        self._note(relative, packed)
        self._tell(artifact, packed, await sending)

    def _listed_below(self, relative: str) -> frozenset[str]:
        """Return the files below a folder that the manifest will list by name."""
        names = map(normalise_name, self.task.common.output.artifacts)
        start = f"{relative}/"
        return frozenset(name.removeprefix(start) for name in names if name.startswith(start))

    def _note(self, relative: str, packed: Packed) -> None:
        self.seen.sizes[relative] = packed.content_bytes, packed.files
        self.seen.digests[relative + _SUFFIX] = packed.sha256
        self.seen.digests.update(
            {f"{relative}/{name}": digest for name, digest in packed.digests.items()}
        )

    def _tell(self, artifact: Artifact, packed: Packed, receipt: Receipt | None) -> None:
        """Write the contract's keys: ``final_model_path`` and those that go with it."""
        path = PurePosixPath(artifact.path)
        prefix = artifact.result_key or path.name
        told = receipt.told if receipt else {}
        keys = {
            "path": str(self.attempt.final / path),
            "archive": path.name + _SUFFIX,
            "archive_path": str(self.attempt.final / path) + _SUFFIX,
            "archive_bytes": packed.size_bytes,
            "archive_url": told.get("url"),
            "archive_uploaded": told.get("uploaded"),
        }
        self.result.update({f"{prefix}_{k}": v for k, v in keys.items() if v is not None})
        self._packed[str(path)] = prefix, bool(receipt and receipt.verified)

    def clear_away(self) -> list[str]:
        """Strike from the result what a store has verifiably got, and checkpoints with it.

        Returns:
            The paths below the task's folder that need not be kept.
        """
        gone = []
        for relative, (prefix, verified) in self._packed.items():
            if verified:
                gone += [relative, relative + _SUFFIX]
                for key in ("path", "archive_path"):
                    self.result.pop(f"{prefix}_{key}", None)
        if gone and all(verified for _, verified in self._packed.values()):
            gone.append(_CHECKPOINTS)
        return gone

    def _find(self, artifact: Artifact, is_right: Callable[[Path], bool]) -> Path:
        path = confine(self.attempt.folder, artifact.path)
        if not is_right(path):
            kind = "folder " if artifact.archive else ""
            raise ArtifactError(
                f"task {self.task.task_id}: artifact {kind}{artifact.path} was not written"
            )
        return path

    def _wrap(self, path: Path, relative: str, *, growing: bool = False) -> Parcel:
        final = self.attempt.final / relative
        parcel = Parcel(self.task.task_id, path, final, growing=growing)
        if self.on_progress:
            parcel.on_sent = _Teller(parcel, self.on_progress)
        return parcel

    async def _send(self, parcel: Parcel) -> Receipt | None:
        try:
            return await self.store.send(parcel, self.task.destination)
        except UploadError as exc:
            if not self.optional:
                raise
            _log.warning("task %s goes on without: %s", self.task.task_id, exc)
            return None


class _Teller:
    """Passes on how far an upload is, not too often."""

    def __init__(self, parcel: Parcel, on_progress: Progress) -> None:
        self._parcel = parcel
        self._on_progress = on_progress
        self._told_at = float("-inf")

    def __call__(self, sent_bytes: int) -> None:
        now, size_bytes = time.monotonic(), self._parcel.size_bytes
        if sent_bytes != size_bytes and now - self._told_at < _PROGRESS_INTERVAL_S:
            return
        self._told_at = now
        values = {"sent_bytes": sent_bytes, "size_bytes": size_bytes}
        message = f"uploading {self._parcel.path.name}"
        self._on_progress(self._parcel.task_id, {"fraction": None, "message": message, **values})
