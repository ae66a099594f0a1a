"""The store of ``destination.type: fsspec``: object stores and SFTP, through the fsspec library.

``destination.url`` names a folder, such as ``s3://bucket/results``. Files go to
``<url>/<task_id>/files/<name>``, the result to ``<url>/<task_id>/responses.json``. Credentials are
the operator's, from where each file system looks for them; a document cannot give any. What fails
is tried again with growing pauses, unless access is denied.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowmesh_core.artifacts.network import NetworkPolicy, mask_url
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArtifactError, FlowmeshError, UploadError
from flowmesh_core.stores.base import Store
from flowmesh_core.stores.pace import Pace
from flowmesh_core.stores.retry import PassingError, persist
from flowmesh_core.wire import encode_json

__all__ = ["FsspecStore"]

# Others read this machine, open any host, or wrap one that does.
_PROTOCOLS = frozenset(
    {"abfs", "abfss", "az", "gcs", "gs", "memory", "oss", "s3", "s3a", "sftp", "ssh"}
)
_BLOCK_BYTES = 1 << 20


class FsspecStore(Store):
    """Writes results and files below a URL."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._policy = NetworkPolicy.from_settings(settings)
        self._pace = Pace(settings.network_bandwidth_bytes_per_s)

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Write one file."""
        receipt = await self.send(Parcel(task_id, path, final), destination)
        return dict(receipt.told)

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        """Write one file as it grows, then read it back and compare its SHA-256."""
        name = parcel.path.name

        async def write(target: _Target) -> None:
            blocks = parcel.blocks(self._pace.slice_bytes(_BLOCK_BYTES))
            await target.write(self._paced(blocks, parcel))
            if await target.read_digest() != parcel.sha256:
                raise PassingError("what arrived is not what was sent")

        url = _below(destination, f"{parcel.task_id}/files/{name}")
        await self._persist(write, f"task {parcel.task_id}: upload of {name}", url)
        told = {
            **dict.fromkeys(("url", "download_url", "path"), url),
            "uploaded": True,
            "artifact_name": name,
        }
        return Receipt(told=told, verified=True)

    async def _paced(self, blocks: AsyncIterator[bytes], parcel: Parcel) -> AsyncIterator[bytes]:
        sent_bytes = 0
        async for block in blocks:
            await self._pace.wait(len(block))
            yield block
            sent_bytes += len(block)
            parcel.on_sent(sent_bytes)

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Write the result."""
        body = encode_json(
            {"task_id": task_id, "result": result, "worker_id": self.settings.worker_id}
        )
        await self._pace.wait(len(body))
        url = _below(destination, f"{task_id}/responses.json")
        what = f"task {task_id}: delivery of the result"
        await self._persist(lambda target: target.write(_once(body)), what, url)

    async def _persist(
        self, write: Callable[[_Target], Awaitable[None]], what: str, url: str
    ) -> None:
        """Write to a URL until it works, connected anew each time."""
        await self._check(url, what)
        shown = f"{what} to {mask_url(url)}"

        async def once() -> None:
            with _passing(shown):
                target = await asyncio.to_thread(_Target, url, shown)
                try:
                    await write(target)
                except BaseException:
                    target.forget()
                    raise

        await persist(once, shown, retries=self.settings.delivery_retries)

    async def _check(self, url: str, what: str) -> None:
        """Refuse what a document may not name, before anything is connected."""
        parts = urlsplit(url)
        scheme, _, rest = url.partition("://")
        # Word by word: fsspec takes what has no "://" for a path of this machine.
        if scheme not in _PROTOCOLS or "::" in url or ".." in rest.split("/"):
            known = ", ".join(sorted(_PROTOCOLS))
            raise UploadError(
                f"{what}: spec.output.destination.url must begin with one of {known}, followed by"
                f" ://, got {mask_url(url)!r}",
                retriable=False,
            )
        if parts.netloc and parts.scheme != "memory":
            try:
                # Buckets count as hosts: FLOWMESH_HTTP_ALLOW says which a document may name.
                await asyncio.to_thread(self._policy.check, f"https://{parts.netloc}/")
            except ArtifactError as exc:
                raise UploadError(f"{what} was not sent: {exc}", retriable=False) from exc


def _below(destination: Destination, name: str) -> str:
    return f"{(destination.url or '').rstrip('/')}/{name}"


@contextlib.contextmanager
def _passing(what: str) -> Iterator[None]:
    """Take what a file system raises for a failure that may pass, unless it denies access."""
    try:
        yield
    except (FlowmeshError, PassingError):
        raise
    except PermissionError as exc:
        raise UploadError(f"{what} was refused: {exc}", retriable=False) from exc
    except Exception as exc:  # each file system raises what its own library does
        raise PassingError(f"{type(exc).__name__}: {exc}") from exc


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


class _Target:
    """One file to be written; every call that may wait runs on a thread.

    Raises:
        UploadError: fsspec, or what it needs for this URL, is not installed; or the URL cannot be
            used.
    """

    def __init__(self, url: str, what: str) -> None:
        try:
            core = importlib.import_module("fsspec.core")
        except ModuleNotFoundError as exc:
            raise UploadError(
                f"{what}: destination type 'fsspec' needs the package fsspec, not installed here;"
                " run: pip install 'flowmesh-core[fsspec]'",
                retriable=False,
            ) from exc
        try:
            self._files, self._path = core.url_to_fs(url)
        except (ImportError, ValueError) as exc:  # it names the package to install
            raise UploadError(f"{what}: {exc}", retriable=False) from exc
        # Without the name itself, in which fsspec's mv would see a pattern: a?.txt, b[1].txt.
        folder = self._path.rpartition("/")[0]
        self._part = f"{folder}/.{secrets.token_hex(8)}.part"

    async def write(self, blocks: AsyncIterator[bytes]) -> None:
        """Write all blocks; the file appears when it is whole, or not at all."""
        file = await asyncio.to_thread(self._create)
        try:
            async for block in blocks:
                await asyncio.to_thread(file.write, block)
            await asyncio.to_thread(file.close)
            await asyncio.to_thread(self._files.mv, self._part, self._path)
        except BaseException:
            await asyncio.to_thread(self._remove, file)
            raise

    def _create(self) -> Any:
        self._files.makedirs(self._part.rpartition("/")[0], exist_ok=True)
        return self._files.open(self._part, "wb")

    def _remove(self, file: Any) -> None:
        # Closed first: some publish a file then, others hold it open until then.
        for clean in (file.close, functools.partial(self._files.rm, self._part)):
            with contextlib.suppress(PassingError, UploadError), _passing(self._part):
                clean()

    async def read_digest(self) -> str:
        """Read the file back; return its SHA-256."""
        return await asyncio.to_thread(self._digest)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with self._files.open(self._path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def forget(self) -> None:
        """Let the next target connect anew: fsspec keeps connections, broken ones too."""
        self._files.clear_instance_cache()
