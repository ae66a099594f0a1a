"""The body of an upload: one file as field ``file`` of a form, streamed. Source: RFC 7578."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable

from flowmesh_core.artifacts.parcel import Parcel
from flowmesh_core.stores.pace import Pace

__all__ = ["FileForm"]

_SLICE_BYTES = 1 << 18
# As browsers write a file name. Source: the WHATWG HTML standard, multipart/form-data.
_ESCAPES = str.maketrans(
    {'"': "%22", "\\": "\\\\", **{chr(c): f"%{c:02X}" for c in range(32) if c != 27}}
)


class FileForm:
    """May be read again from the start, for a redirect or another try.

    Args:
        parcel: The file; while it grows, the length of the form is unknown.
        pace: How fast it may go out.
        on_sent: Told the size of the file in bytes when all of it is sent.
    """

    def __init__(self, parcel: Parcel, pace: Pace, on_sent: Callable[[int], None]) -> None:
        self._parcel = parcel
        self._pace = pace
        self._on_sent = on_sent
        self._boundary = secrets.token_hex(16)
        name = parcel.path.name.translate(_ESCAPES)
        self._head = (
            f"--{self._boundary}\r\n"
            f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode(errors="surrogateescape")
        self._tail = f"\r\n--{self._boundary}--\r\n".encode()

    def headers(self) -> dict[str, str]:
        """Return type and, once it is known, length."""
        headers = {"Content-Type": f"multipart/form-data; boundary={self._boundary}"}
        size_bytes = self._parcel.size_bytes
        if size_bytes is not None:
            headers["Content-Length"] = str(len(self._head) + size_bytes + len(self._tail))
        return headers

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._head
        sent_bytes = 0
        async for block in self._parcel.blocks(self._pace.slice_bytes(_SLICE_BYTES)):
            await self._pace.wait(len(block))
            yield block
            sent_bytes += len(block)
            self._parcel.on_sent(sent_bytes)
        self._on_sent(sent_bytes)
        yield self._tail
