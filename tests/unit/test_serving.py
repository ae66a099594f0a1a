"""Real sockets and a real HTTP server; the clock alone is moved by hand."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest

from flowmesh_core import Inputs, ModelRef, RunContext, ServeResult, ServeSettings, ServeSpec
from flowmesh_core.config import load_plugin_settings, plugin_variables
from flowmesh_core.errors import CancelledError, DeadlineError, ExecutionError, InputError
from flowmesh_core.serving import (
    ask_status,
    check_host,
    find_address,
    hold_port,
    serve_result,
    served_model,
    wait_until_answering,
)


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
def lines() -> list[str]:
    return []


@pytest.fixture
def make_context(tmp_path: Path, lines: list[str]) -> Callable[..., RunContext]:
    def make(settings: object = None, **serve: Any) -> RunContext:
        return RunContext(
            task_id="task-1",
            task_type="serve",
            spec=ServeSpec.model_validate({"serve": serve}),
            raw_spec={},
            folder=tmp_path,
            clock=time.monotonic,
            settings=settings,
            inputs=Inputs(model=ModelRef(identifier="acme/small")),
            on_log=lambda level, message: lines.append(f"{level} {message}"),
        )

    return make


def port_of(own: socket.socket) -> int:
    port: int = own.getsockname()[1]
    return port


# Who may be served.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker.example"])
def test_a_host_that_others_can_reach_needs_the_operators_leave(
    make_context: Callable[..., RunContext], host: str
) -> None:
    for settings in (None, ServeSettings(), ServeSettings(hosts=("10.0.0.2",))):
        message = f"serve.host '{host}' can be reached .* add {host} to FLOWMESH_SERVE_HOSTS"
        with pytest.raises(InputError, match=message):
            check_host(make_context(settings, host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_this_machine_needs_nobodys_leave(
    make_context: Callable[..., RunContext], lines: list[str], host: str
) -> None:
    check_host(make_context(host=host))
    assert lines == []


def test_a_host_that_is_allowed_is_warned_of_without_a_key(
    make_context: Callable[..., RunContext], lines: list[str]
) -> None:
    settings = ServeSettings(hosts=("10.0.0.1",))
    check_host(make_context(settings, host="10.0.0.1", api_key="sk-1"))
    assert lines == []
    check_host(make_context(settings, host="10.0.0.1"))
    assert lines == ["warning serve.host 10.0.0.1 is open to all: no serve.api_key"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [("", ()), ("0.0.0.0", ("0.0.0.0",)), ("10.0.0.1, ::,", ("10.0.0.1", "::"))],
)
def test_the_operator_lists_hosts_in_one_variable_for_all_engines(
    text: str, hosts: tuple[str, ...]
) -> None:
    for plugin in ("llamacpp.serve", "acme.serve"):
        environ = {"FLOWMESH_SERVE_HOSTS": text}
        found = load_plugin_settings(ServeSettings, plugin=plugin, environ=environ)
        assert found.hosts == hosts
        assert plugin_variables(ServeSettings, plugin=plugin) == ("FLOWMESH_SERVE_HOSTS",)


# Where it listens.


def test_a_free_port_is_found_free_and_stays_so() -> None:
    assert find_address("localhost", 0) == "127.0.0.1"
    with socket.create_server((find_address("127.0.0.1", 0), 0)) as own:
        port = port_of(own)
    for _ in range(2):
        assert find_address("127.0.0.1", port) == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_named_and_may_be_free_on_another_try(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = port_of(own)
        message = rf"cannot listen on {host} port {port}: Address already in use; give another"
        with pytest.raises(ExecutionError, match=message) as caught:
            find_address(host, port)
    assert caught.value.retriable


@pytest.mark.parametrize(
    ("host", "reason"),
    [("203.0.113.9", "Cannot assign requested address"), ("no-such-host.invalid", r"\w+")],
)
def test_a_host_of_another_machine_is_named_and_stays_wrong(host: str, reason: str) -> None:
    message = rf"cannot listen on {host} port 0: {reason}"
    with pytest.raises(ExecutionError, match=message) as caught:
        find_address(host, 0)
    assert not caught.value.retriable


@pytest.mark.parametrize("wanted", ["any", "this"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_held_port_is_for_its_server_alone(address: str, wanted: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as own:
        free = port_of(own)
    with hold_port(address, free if wanted == "this" else 0) as port:
        assert port == free or wanted == "any"
        message = f"cannot listen on {address} port {port}: Address already in use"
        with pytest.raises(ExecutionError, match=message) as caught, hold_port(address, port):
            pass
        assert caught.value.retriable
        with socket.socket(family) as other, pytest.raises(OSError, match="already in use"):
            other.bind((address, port))
        with pytest.raises(ConnectionRefusedError, match="refused"):
            socket.create_connection((address, port), timeout=5)
        with socket.create_server((address, port), family=family):
            socket.create_connection((address, port), timeout=5).close()
    with hold_port(address, port):
        """It is free again, whatever became of the connection."""


def test_a_port_with_a_listener_cannot_be_held() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = port_of(own)
        message = f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        with pytest.raises(ExecutionError, match=message), hold_port("127.0.0.1", port):
            pass


# When it is up.


def test_the_status_of_an_answer_is_told_and_0_without_one(http_port: int) -> None:
    statuses = [
        ask_status("127.0.0.1", http_port, "/", api_key=key) for key in (None, "good", "bad")
    ]
    assert statuses == [200, 200, 401]
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = port_of(own)
    assert ask_status("127.0.0.1", port, "/", api_key=None) == 0


def test_what_speaks_no_http_gives_no_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:

        def babble() -> None:
            with own.accept()[0] as client:
                client.sendall(b"220 mail.example ready\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        assert ask_status("127.0.0.1", port_of(own), "/", api_key=None) == 0
        thread.join()


def test_the_wait_ends_with_the_first_good_answer(make_context: Callable[..., RunContext]) -> None:
    statuses = [0, 503, 200, 500]
    wait_until_answering(make_context(), lambda: statuses.pop(0))
    assert statuses == [500]


@pytest.mark.parametrize(
    ("status", "told"), [(0, "does not answer"), (401, "answers with status 401")]
)
def test_what_never_answers_well_is_an_error_after_its_time(
    make_context: Callable[..., RunContext], status: int, told: str
) -> None:
    message = f"the endpoint {told}; the task's log may say why"
    with pytest.raises(ExecutionError, match=message):
        wait_until_answering(make_context(), lambda: status, within_s=0.2)


def test_without_a_bound_the_task_alone_decides_how_long_it_may_take(
    make_context: Callable[..., RunContext],
) -> None:
    now_s = [0.0]
    ctx = attrs.evolve(make_context(), clock=lambda: now_s[0], deadline=86_400.0)

    def ask() -> int:
        now_s[0] += 40_000
        return 0

    with pytest.raises(DeadlineError, match="task-1 reached its deadline"):
        wait_until_answering(ctx, ask)
    assert now_s == [120_000]


@pytest.mark.parametrize("status", [0, 200])
def test_a_cancel_comes_before_an_answer(
    make_context: Callable[..., RunContext], status: int
) -> None:
    ctx = attrs.evolve(make_context(), is_cancelled=lambda: True)
    with pytest.raises(CancelledError, match="task-1 was cancelled"):
        wait_until_answering(ctx, lambda: status)


def test_what_can_never_answer_says_so_itself(make_context: Callable[..., RunContext]) -> None:
    def ask() -> int:
        raise ExecutionError("the server is gone")

    with pytest.raises(ExecutionError, match="the server is gone"):
        wait_until_answering(make_context(), ask)


# What is told of it.


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        *[("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")],
        *[("0.0.0.0", socket.gethostname()), ("::", socket.gethostname())],
    ],
)
def test_the_endpoint_is_a_url_that_leads_there(
    make_context: Callable[..., RunContext], host: str, shown: str
) -> None:
    result = ServeResult.model_validate(serve_result(make_context(host=host), 4711))
    assert result.endpoint == f"http://{shown}:4711/v1"
    assert (result.model, result.expires_at) == ("acme/small", None)


def test_a_time_to_live_becomes_a_date(make_context: Callable[..., RunContext]) -> None:
    ends = datetime.now(timezone.utc) + timedelta(seconds=90)
    result = ServeResult.model_validate(serve_result(make_context(ttl_s=90), 1))
    assert result.expires_at is not None
    assert abs(result.expires_at - ends) < timedelta(seconds=5)
    assert result.expires_at.utcoffset() == timedelta(0)


def test_another_id_may_be_what_clients_ask_for(make_context: Callable[..., RunContext]) -> None:
    assert serve_result(make_context(), 1, model="tuned")["model"] == "tuned"


def test_what_serves_has_a_model(make_context: Callable[..., RunContext]) -> None:
    assert served_model(make_context()) == "acme/small"
    with pytest.raises(InputError, match=r"model\.source is required"):
        served_model(attrs.evolve(make_context(), inputs=Inputs()))
