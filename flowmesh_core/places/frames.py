"""Messages between a worker and a child process: JSON, in frames of at most 64 KiB.

Each message belongs to a channel: 0 for the process itself, one more for each task. Frames of
several channels may alternate, so that a long message of one task holds up no other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from flowmesh_core.wire import encode_json

__all__ = ["MAX_FRAME_BYTES", "MAX_MESSAGE_BYTES", "Decoder", "FrameError", "encode"]

# Payload length, channel, whether more frames of the message follow.
_HEAD = struct.Struct(">II?")
MAX_FRAME_BYTES = 65536
MAX_MESSAGE_BYTES = 256 << 20
_MAX_PAYLOAD = MAX_FRAME_BYTES - _HEAD.size


class FrameError(ValueError):
    """What was read is no frame, or a message is too long to be sent."""


def encode(channel: int, message: Any) -> Iterator[bytes]:
    """Yield the frames of one message.

    Raises:
        TypeError: The message is no JSON; says where.
        FrameError: It is longer than ``MAX_MESSAGE_BYTES``.
    """
    payload = encode_json(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise FrameError(
            f"a message must not exceed {MAX_MESSAGE_BYTES} bytes, got {len(payload)}; "
            "write large data to a file"
        )
    start = 0
    while True:
        piece = payload[start : start + _MAX_PAYLOAD]
        start += _MAX_PAYLOAD
        more = start < len(payload)
        yield _HEAD.pack(len(piece), channel, more) + piece
        if not more:
            return


class Decoder:
    """Turns what arrives, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun: dict[int, bytearray] = {}

    def feed(self, data: bytes) -> list[tuple[int, Any]]:
        """Return channel and message of each message that is complete now.

        Raises:
            FrameError: The data cannot be frames.
        """
        self._buffer += data
        complete: list[tuple[int, Any]] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            size, channel, more = _HEAD.unpack_from(self._buffer, start)
            if size > _MAX_PAYLOAD:
                raise FrameError(f"a frame must not exceed {MAX_FRAME_BYTES} bytes, got {size}")
            end = start + _HEAD.size + size
            if len(self._buffer) < end:
                break
            payload = self._buffer[start + _HEAD.size : end]
            start = end
            if more or channel in self._begun:
                begun = self._begun.setdefault(channel, bytearray())
                begun += payload
                if len(begun) > MAX_MESSAGE_BYTES:
                    raise FrameError(f"a message must not exceed {MAX_MESSAGE_BYTES} bytes")
                payload = begun
            if not more:
                self._begun.pop(channel, None)
                complete.append((channel, _parse(payload)))
        del self._buffer[:start]
        return complete


def _parse(payload: bytearray) -> Any:
    try:
        return json.loads(payload)
    except ValueError as exc:
        raise FrameError(f"a message must be JSON: {exc}") from None
