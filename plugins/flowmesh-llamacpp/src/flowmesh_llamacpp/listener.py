"""The sockets of an HTTP server that runs in this process but belongs to a library."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from flowmesh_core import ExecutionError

__all__ = ["ask_status", "find_address", "sever"]

_OWN_FILES = Path("/proc/self/fd")


def find_address(host: str, port: int) -> str:
    """Return the IP address of ``host``, on which a server could listen at this moment.

    Raises:
        ExecutionError: The host is not this machine's, or the port is taken or reserved;
            retriable when it is taken, since another worker may have it free.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        socket.create_server(address, family=family).close()
    except OSError as exc:
        taken = exc.errno == errno.EADDRINUSE
        reason = str(exc.strerror).partition(" (while")[0]
        raise ExecutionError(
            f"cannot listen on {host} port {port}: {reason}; give another serve.host, or another "
            "serve.port (0 takes a free one)",
            retriable=taken,
        ) from exc
    return str(address[0])


def ask_status(address: str, port: int, path: str, *, api_key: str | None) -> int:
    """Return the status with which a server answers a GET; 0 when it does not answer in time."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with contextlib.closing(HTTPConnection(address, port, timeout=5)) as connection:
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        except (OSError, HTTPException):
            return 0


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
