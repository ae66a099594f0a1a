"""The store of ``destination.type: http``: the orchestrator's results API.

Source: the contract's result delivery. The result goes as ``{task_id, result, worker_id}`` to
``destination.url``, files as multipart field ``file`` to ``<url>/<task_id>/files``. Connection
errors, 429 and 5xx are tried again with growing pauses, so that one bad answer does not repeat
the work of the task. What was sent is asked for again, and must be the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from flowmesh_core.artifacts.network import NetworkPolicy, build_async_client
from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArchiveError, ArtifactError, UploadError
from flowmesh_core.stores.base import Store
from flowmesh_core.stores.multipart import FileForm
from flowmesh_core.stores.pace import Pace
from flowmesh_core.stores.retry import PassingError, persist
from flowmesh_core.wire import encode_json

if TYPE_CHECKING:  # loaded when the first task is to be delivered
    import httpx

    _Request = Callable[[httpx.AsyncClient], Awaitable[int]]

__all__ = ["HttpStore"]

_log = logging.getLogger(__name__)
_RESULT_TIMEOUT_S = 15.0
_FILE_TIMEOUT_S = 30.0
# A server may store and hash what it got before it answers; slower than this counts as stalled.
_SLOW_SERVER_BYTES_PER_S = 10e6
# How often a file is sent whole when what arrived is not what was sent.
_MOST_SENDS = 3
# Answers of a server that takes files and does not show them.
_HIDDEN = frozenset({401, 403, 405, 501})


class HttpStore(Store):
    """Posts results and files."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._policy = NetworkPolicy.from_settings(settings)
        self._pace = Pace(settings.network_bandwidth_bytes_per_s)
        self._client: httpx.AsyncClient | None = None

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Post one file; the timeout is for each read and write, not for the whole file."""
        return await self._post(Parcel(task_id, path, final), destination)

    async def send(self, parcel: Parcel, destination: Destination) -> Receipt:
        """Post one file as it grows, then fetch it and compare its SHA-256."""
        for _ in range(_MOST_SENDS):
            told = await self._post(parcel, destination)
            verified, problem = await self._look_back(parcel, destination, told["url"])
            if not problem:
                return Receipt(told=told, verified=verified)
            _log.warning("task %s: %s; sending it again", parcel.task_id, problem)
        raise UploadError(
            f"task {parcel.task_id}: {problem}, after it was sent {_MOST_SENDS} times"
        )

    async def _post(self, parcel: Parcel, destination: Destination) -> dict[str, Any]:
        url = _below(destination.url or "", parcel.task_id, "files")
        timeout_s = destination.timeout_s or _FILE_TIMEOUT_S
        given = {k: v for k, v in destination.headers.items() if k.lower() != "content-type"}

        async def post(client: httpx.AsyncClient) -> int:
            limits = _limits(timeout_s)
            form = FileForm(parcel, self._pace, on_sent=functools.partial(_wait_longer, limits))
            response = await client.request(
                "POST",
                url,
                content=form,
                headers=self._policy.headers_for(url, given | form.headers()),
                extensions={"timeout": limits},
            )
            return response.status_code

        name = parcel.path.name
        await self._persist(post, f"task {parcel.task_id}: upload of {name} to", url)
        address = _below(destination.url or "", parcel.task_id, "files", name)
        return {
            "url": address,
            "download_url": address,
            "path": address,
            "uploaded": True,
            "artifact_name": name,
            "host_path": f"artifacts/{name}",
            "download_timeoutSec": timeout_s,
        }

    async def _look_back(
        self, parcel: Parcel, destination: Destination, address: str
    ) -> tuple[bool, str]:
        """Return whether the file arrived as it is, or else what is wrong with it."""
        seen_bytes, digest, status = 0, hashlib.sha256(), 0

        async def get(client: httpx.AsyncClient) -> int:
            nonlocal seen_bytes, digest, status
            seen_bytes, digest = 0, hashlib.sha256()
            headers = self._policy.headers_for(address, destination.headers)
            limits = _limits(destination.timeout_s or _FILE_TIMEOUT_S)
            _wait_longer(limits, parcel.size_bytes or 0)
            async with client.stream(
                "GET",
                address,
                headers=headers | {"Accept-Encoding": "identity"},
                extensions={"timeout": limits},
            ) as response:
                status = response.status_code
                async for chunk in response.aiter_raw():
                    digest.update(chunk)
                    seen_bytes += len(chunk)
            return 200 if status in _HIDDEN else status

        name = parcel.path.name
        await self._persist(get, f"task {parcel.task_id}: check of {name} at", address)
        if status in _HIDDEN:
            _log.warning(
                "task %s: %s was taken, but the server does not show it (HTTP %d)",
                *(parcel.task_id, name, status),
            )
            return False, ""
        if digest.hexdigest() == parcel.sha256:
            return True, ""
        return False, (
            f"{name} did not arrive as it is: it has {parcel.size_bytes} bytes, the server shows"
            f" {seen_bytes}, with another SHA-256"
        )

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Post the result."""
        url = destination.url or ""
        body = encode_json(
            {"task_id": task_id, "result": result, "worker_id": self.settings.worker_id}
        )
        await self._pace.wait(len(body))
        headers = dict(destination.headers)
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"

        async def post(client: httpx.AsyncClient) -> int:
            response = await client.request(
                destination.method.upper(),
                url,
                content=body,
                headers=self._policy.headers_for(url, headers),
                timeout=destination.timeout_s or _RESULT_TIMEOUT_S,
            )
            return response.status_code

        await self._persist(post, f"task {task_id}: delivery of the result to", url)

    async def _persist(self, request: _Request, what: str, url: str) -> None:
        what = f"{what} {self._policy.mask_url(url)}"
        tried = functools.partial(self._try, request, what)
        await persist(tried, what, retries=self.settings.delivery_retries)

    async def _try(self, request: _Request, what: str) -> None:
        """Send once."""
        import httpx  # noqa: PLC0415 - see the import block

        if self._client is None:
            self._client = build_async_client(self._policy)
        hopeless = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
        try:
            status = await request(self._client)
        except ArchiveError:  # why there is no file to send
            raise
        except ArtifactError as exc:  # the operator's policy, in its own words
            raise UploadError(f"{what} was not sent: {exc}", retriable=False) from exc
        except (*hopeless, httpx.TooManyRedirects, UnicodeError) as exc:
            # Without the text: it may quote a header that is a secret.
            raise UploadError(
                f"{what} cannot be sent: {type(exc).__name__}; look at url, method and headers of "
                "spec.output.destination",
                retriable=False,
            ) from None
        except (httpx.RequestError, OSError) as exc:
            raise PassingError(f"{type(exc).__name__}: {exc}") from exc
        if status == 429 or status >= 500:
            raise PassingError(f"HTTP {status}")
        if status >= 400:
            raise UploadError(f"{what} was refused: HTTP {status}", retriable=False)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _below(url: str, *names: str) -> str:
    """Append names to the path of a URL, whatever stands behind the path."""
    parts = urlsplit(url)
    path = "/".join([parts.path.rstrip("/"), *(quote(name, safe="") for name in names)])
    return parts._replace(path=path).geturl()


def _limits(timeout_s: float) -> dict[str, float]:
    """Return the timeouts of a request, in a form that may change while it is sent."""
    return dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)


def _wait_longer(limits: dict[str, float], size_bytes: int) -> None:
    """Give a server the time to store a file, whose size is known when all of it is sent."""
    limits["read"] = limits["connect"] + size_bytes / _SLOW_SERVER_BYTES_PER_S
