"""Request bodies read block by block: sized or chunked, and the parts of multipart forms."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from typing import Protocol

__all__ = ["Body", "BodyError", "Multipart"]

BLOCK = 64 * 1024


class BodyError(Exception):
    """The body is not what its headers promise."""


class Stream(Protocol):
    """What is needed of a socket's file."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Body:
    """The blocks of one request body, sized or chunked, read once.

    Attributes:
        boundary: Mark between the parts, empty unless the body is ``multipart/form-data``.
        size_bytes: What has been read so far, without any chunked coding.
    """

    def __init__(self, stream: Stream, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._left = int(headers.get("Content-Length") or 0)
        multipart = headers.get_content_type() == "multipart/form-data"
        self.boundary = (headers.get_boundary() or "") if multipart else ""
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read():
            yield block

    def read(self) -> bytes:
        """Next block, empty at the end."""
        if self._chunked and not self._left:
            self._begin_chunk()
        if not self._left:
            return b""
        block = self._stream.read(min(BLOCK, self._left))
        if not block:
            raise ConnectionError("the client went away in the middle of its body")
        self._left -= len(block)
        self.size_bytes += len(block)
        if self._chunked and not self._left:
            self._stream.readline()
        return block

    def drain(self) -> None:
        """Read the rest and forget it."""
        for _ in self:
            pass

    def _begin_chunk(self) -> None:
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the client went away between two chunks")
        self._left = int(line.split(b";")[0], 16)
        if not self._left:
            self._chunked = False
            while self._stream.readline().strip():
                pass


class Multipart:
    """Header and content of each part, in constant memory. Source: RFC 2046 5.1, RFC 7578.

    The content of a part must be read before the next part is asked for; a rest is passed over.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._mark = b"\r\n--" + body.boundary.encode()
        self._buffer = b"\r\n"

    def __iter__(self) -> Iterator[tuple[Message, Iterator[bytes]]]:
        self._skip()
        while self._take(2) != b"--":
            head = b"".join(self._until(b"\r\n\r\n"))
            content = self._until(self._mark)
            yield HeaderParser().parsestr(head.decode()), content
            for _ in content:  # whatever the taker has left
                pass

    def _skip(self) -> None:
        for _ in self._until(self._mark):
            pass

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        head, self._buffer = self._buffer[:size], self._buffer[size:]
        return head

    def _until(self, mark: bytes) -> Iterator[bytes]:
        while (at := self._buffer.find(mark)) < 0:
            keep = len(mark) - 1  # the mark may have begun
            head, self._buffer = self._buffer[:-keep], self._buffer[-keep:]
            if head:
                yield head
            self._fill()
        head, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
        yield head

    def _fill(self) -> None:
        block = self._body.read()
        if not block:
            raise BodyError("There was an error parsing the body")
        self._buffer += block
