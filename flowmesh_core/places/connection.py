"""The child's end of the socket to its worker; the standard library and the frames alone."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from flowmesh_core.places.frames import Decoder, encode

__all__ = ["Connection", "give_up"]

_CHUNK = 65536
_LOST = 70


class Connection:
    """What is said and heard; ``send`` may be called from any thread."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._sending = threading.Lock()
        self._decoder = Decoder()
        self._owner = os.getpid()

    def send(self, channel: int, message: Mapping[str, Any]) -> None:
        """Send one message; without a worker to hear it the process ends at once.

        A fork of the executor's own has nothing to say.
        """
        if os.getpid() != self._owner:
            return
        for frame in encode(channel, message):
            try:
                with self._sending:
                    self._socket.sendall(frame)
            except OSError as exc:
                give_up(exc)

    def receive(self) -> list[tuple[int, Any]] | None:
        """Wait for what comes next; None when the worker is gone."""
        data = self._socket.recv(_CHUNK)
        return self._decoder.feed(data) if data else None


def give_up(exc: BaseException) -> NoReturn:
    """End the process: it cannot hear its worker any more."""
    os.write(2, f"fatal: the connection to the worker is lost: {exc!r}\n".encode())
    os._exit(_LOST)
