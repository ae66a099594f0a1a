"""Real sockets, and a server that would wait for its clients for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flowmesh_llamacpp.listener import ask_status, find_address, sever

from flowmesh_core import ExecutionError


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] in (None, "Bearer good")
        self.send_response(200 if allowed else 401)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Be quiet."""


@pytest.fixture
def http_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def port_of(own: socket.socket) -> int:
    port: int = own.getsockname()[1]
    return port


def test_a_free_port_is_found_free_and_stays_so() -> None:
    assert find_address("localhost", 0) == "127.0.0.1"
    with socket.create_server((find_address("127.0.0.1", 0), 0)) as own:
        port = port_of(own)
    for _ in range(2):
        assert find_address("127.0.0.1", port) == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_named_and_may_be_free_on_another_try(
    host: str, listener: socket.socket
) -> None:
    port = port_of(listener)
    message = rf"cannot listen on {host} port {port}: Address already in use; give another"
    with pytest.raises(ExecutionError, match=message) as caught:
        find_address(host, port)
    assert caught.value.retriable


@pytest.mark.parametrize(
    ("host", "reason"),
    [("203.0.113.9", "Cannot assign requested address"), ("no-such-host.invalid", r"\w+")],
)
def test_a_host_of_another_machine_is_named_and_stays_wrong(host: str, reason: str) -> None:
    with pytest.raises(
        ExecutionError, match=rf"cannot listen on {host} port 0: {reason}"
    ) as caught:
        find_address(host, 0)
    assert not caught.value.retriable


def test_the_status_of_an_answer_is_told_and_0_without_one(http_port: int) -> None:
    statuses = [
        ask_status("127.0.0.1", http_port, "/", api_key=key) for key in (None, "good", "bad")
    ]
    assert statuses == [200, 200, 401]
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = port_of(own)
    assert ask_status("127.0.0.1", port, "/", api_key=None) == 0


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
