"""Ends the connections of an HTTP server that runs in this process but belongs to a library."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["sever"]

_OWN_FILES = Path("/proc/self/fd")


def sever(port: int, *, patience_s: float = 5.0) -> None:
    """End the listener and all connections of this process at a port, and wait for the server.

    A server that is asked to stop waits for its clients, and a client that sends half a request
    could hold it for as long as it likes.
    """
    give_up_s = time.monotonic() + patience_s
    while _shut_down(port) and time.monotonic() < give_up_s:
        time.sleep(0.01)


def _shut_down(port: int) -> int:
    """Shut down every socket at a port; return how many there were."""
    count = 0
    for own in _own_sockets():
        with own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.getsockname()[1] == port:
                count += 1
                with contextlib.suppress(OSError):  # it has been shut down before
                    own.shutdown(socket.SHUT_RDWR)
    return count


def _own_sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of every socket of this process; the caller closes it."""
    for file in _OWN_FILES.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile by its owner
            if file.is_socket():
                yield socket.socket(fileno=os.dup(int(file.name)))
