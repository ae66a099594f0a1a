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

from flowmesh_core.artifacts.network import NetworkPolicy, build_async_client
from flowmesh_core.config import Settings
from flowmesh_core.contract import Destination, encode_json
from flowmesh_core.errors import UploadError
from flowmesh_core.stores.base import Store

if TYPE_CHECKING:  # loaded when the first task is to be delivered
    import httpx

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
        url = f"{destination.url}/{task_id}/files"
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
        address = f"{url}/{path.name}"
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
        headers = {"Content-Type": "application/json", **destination.headers}

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

    async def _send(
        self,
        post: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]],
        what: str,
        url: str,
    ) -> None:
        import httpx  # noqa: PLC0415 - see the import block

        if self._client is None:
            self._client = build_async_client(self._policy)
        shown = self._policy.mask_url(url)
        for tried in range(self.settings.delivery_retries + 1):
            if tried:
                await asyncio.sleep(_pause_s(tried))
            try:
                response = await post(self._client)
            except httpx.TransportError as exc:
                problem = f"{type(exc).__name__}: {exc}"
            else:
                if response.status_code < 400:
                    return
                problem = f"HTTP {response.status_code}"
                if response.status_code < 500 and response.status_code != 429:
                    raise UploadError(f"{what} to {shown} was refused: {problem}", retriable=False)
            _log.warning("%s to %s failed, try %d: %s", what, shown, tried + 1, problem)
        raise UploadError(
            f"{what} to {shown} failed {self.settings.delivery_retries + 1} times, last: {problem}"
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _pause_s(tried: int) -> float:
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**tried)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
