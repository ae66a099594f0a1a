"""The store of ``destination.type: http``: the orchestrator's results API.

Source: the contract's result delivery. The result goes as ``{task_id, result, worker_id}`` to
``destination.url``, files as multipart field ``file`` to ``<url>/<task_id>/files``. Connection
errors, 429 and 5xx are tried again with growing pauses, so that one bad answer does not repeat
the work of the task.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from flowmesh_core.artifacts.network import NetworkPolicy, build_async_client
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArtifactError, UploadError
from flowmesh_core.stores.base import Store
from flowmesh_core.wire import encode_json

if TYPE_CHECKING:  # loaded when the first task is to be delivered
    import httpx

    _Post = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]

__all__ = ["HttpStore"]

_log = logging.getLogger(__name__)
_RESULT_TIMEOUT_S = 15.0
_FILE_TIMEOUT_S = 30.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class HttpStore(Store):
    """Posts results and files."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._policy = NetworkPolicy.from_settings(settings)
        self._client: httpx.AsyncClient | None = None

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Post one file; the timeout is per read and write, not for the whole file."""
        url = _below(destination.url or "", task_id, "files")
        headers = {k: v for k, v in destination.headers.items() if k.lower() != "content-type"}
        timeout_s = destination.timeout_s or _FILE_TIMEOUT_S

        async def post(client: httpx.AsyncClient) -> httpx.Response:
            with path.open("rb") as file:
                return await client.request(
                    "POST",
                    url,
                    files={"file": (path.name, file, "application/octet-stream")},
                    headers=self._policy.headers_for(url, headers),
                    timeout=timeout_s,
                )

        await self._send(post, f"task {task_id}: upload of {path.name}", url)
        address = _below(destination.url or "", task_id, "files", path.name)
        return {
            "url": address,
            "download_url": address,
            "path": address,
            "uploaded": True,
            "artifact_name": path.name,
            "host_path": f"artifacts/{path.name}",
            "download_timeoutSec": timeout_s,
        }

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Post the result."""
        url = destination.url or ""
        body = encode_json(
            {"task_id": task_id, "result": result, "worker_id": self.settings.worker_id}
        )
        await self._pace(len(body))
        headers = dict(destination.headers)
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"

        async def post(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(
                destination.method.upper(),
                url,
                content=body,
                headers=self._policy.headers_for(url, headers),
                timeout=destination.timeout_s or _RESULT_TIMEOUT_S,
            )

        await self._send(post, f"task {task_id}: delivery of the result", url)

    async def _pace(self, size_bytes: int) -> None:
        """Take as long as the operator says that this worker's link does."""
        bandwidth = self.settings.network_bandwidth_bytes_per_s
        if bandwidth:
            await asyncio.sleep(size_bytes / bandwidth)

    async def _send(self, post: _Post, what: str, url: str) -> None:
        what = f"{what} to {self._policy.mask_url(url)}"
        tries = self.settings.delivery_retries + 1
        for tried in range(1, tries + 1):
            problem = await self._try(post, what)
            if not problem:
                return
            _log.warning("%s failed, try %d of %d: %s", what, tried, tries, problem)
            if tried < tries:
                await asyncio.sleep(_pause_s(tried))
        raise UploadError(f"{what} failed {tries} times, last: {problem}")

    async def _try(self, post: _Post, what: str) -> str:
        """Send once; return what went wrong and may pass, or the empty text."""
        import httpx  # noqa: PLC0415 - see the import block

        if self._client is None:
            self._client = build_async_client(self._policy)
        hopeless = (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
        try:
            response = await post(self._client)
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
            return f"{type(exc).__name__}: {exc}"
        status = response.status_code
        if 400 <= status < 500 and status != 429:
            raise UploadError(f"{what} was refused: HTTP {status}", retriable=False)
        return f"HTTP {status}" if status >= 400 else ""

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


def _pause_s(tried: int) -> float:
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(tried, 20))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
