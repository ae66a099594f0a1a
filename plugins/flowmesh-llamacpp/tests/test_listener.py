"""Real sockets, and an owner that may never close them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from flowmesh_llamacpp.listener import sever


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def port_of(own: socket.socket) -> int:
    port: int = own.getsockname()[1]
    return port


def test_severing_ends_the_listener_and_what_it_accepted_and_nothing_else(
    listener: socket.socket,
) -> None:
    port = port_of(listener)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        accepted = stack.enter_context(listener.accept()[0])
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sever(port, patience_s=0)
        assert client.recv(1) == b""
        assert accepted.recv(1) == b""
        with pytest.raises(ConnectionRefusedError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        stack.enter_context(socket.create_connection(other.getsockname(), timeout=5))


def test_severing_waits_until_the_owner_has_closed_its_sockets(listener: socket.socket) -> None:
    closer = threading.Timer(0.2, listener.close)
    closer.start()
    sever(port_of(listener))
    assert listener.fileno() == -1
    closer.join()


def test_severing_gives_up_when_the_owner_never_closes(listener: socket.socket) -> None:
    sever(port_of(listener), patience_s=0.1)
    assert listener.fileno() != -1


def test_severing_leaves_no_descriptor_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = port_of(own)
        before = lowest_free_descriptor()
        for _ in range(3):
            sever(port, patience_s=0)
        assert lowest_free_descriptor() == before


def lowest_free_descriptor() -> int:
    with socket.socket() as probe:
        return probe.fileno()
