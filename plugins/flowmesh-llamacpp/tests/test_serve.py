"""The executor's own logic, on an endpoint that does as it is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from flowmesh_llamacpp import serve
from flowmesh_llamacpp.serve import LlamacppServer

from flowmesh_core import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    InputError,
    RunContext,
    ServeSettings,
)


class FakeEndpoint:
    port = 4711

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.asked = self.closed = 0

    def ask(self) -> int:
        self.asked += 1
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def close(self) -> None:
        self.closed += 1


class FakeServer(LlamacppServer):
    def __init__(self) -> None:
        super().__init__()
        self.endpoint = FakeEndpoint()
        self.endpoint.statuses = [200]
        self.opened = 0
        self.hold: Callable[[], object] = lambda: None

    def open_endpoint(self, ctx: RunContext) -> FakeEndpoint:
        self.opened += 1
        self.hold()
        return self.endpoint


@pytest.fixture
def server(service: Any) -> FakeServer:
    service.executor = FakeServer()
    found: FakeServer = service.executor
    return found


def test_it_is_ready_only_when_a_request_has_been_answered(
    service: Any, server: FakeServer
) -> None:
    server.endpoint.statuses = [0, 503, 200]
    service.on_ready = lambda: asked.append(server.endpoint.asked)
    asked: list[int] = []
    with service.up():
        assert asked == [3]


def test_the_result_says_where_which_model_and_who(service: Any, server: FakeServer) -> None:
    with service.up() as result:
        assert result.endpoint == "http://127.0.0.1:4711/v1"
        assert (result.model, result.pid) == ("acme/small", os.getpid())
        assert (result.expires_at, service.ttl_s) == (None, None)
    assert service.lines == ["info serving acme/small at http://127.0.0.1:4711/v1"]
    assert service.result()["endpoint"] == result.endpoint


def test_the_time_to_live_is_passed_on_and_becomes_a_date(service: Any, server: FakeServer) -> None:
    ends = datetime.now(timezone.utc) + timedelta(seconds=90)
    with service.up(ttl_s=90) as result:
        assert service.ttl_s == 90
        assert abs(result.expires_at - ends) < timedelta(seconds=5)
        assert result.expires_at.utcoffset() == timedelta(0)


def test_it_stays_until_it_is_cancelled_even_past_the_deadline(
    service: Any, server: FakeServer
) -> None:
    service.deadline = time.monotonic() + 0.3
    with service.up():
        time.sleep(0.5)
        assert server.endpoint.closed == 0
    assert server.endpoint.closed == 1


def test_a_cancel_is_felt_at_once(service: Any, server: FakeServer) -> None:
    with service.up():
        assert service.stop() < 0.5
    assert server.endpoint.closed == 1


def test_a_cancel_before_it_is_ready_ends_it(service: Any, server: FakeServer) -> None:
    server.endpoint.statuses = [503]
    with service.running(), pytest.raises(CancelledError, match="task-1 was cancelled"):
        service.stop()
    assert not service.is_ready
    assert server.endpoint.closed == 1


def test_a_cancel_while_the_model_was_loading_comes_before_ready(
    service: Any, server: FakeServer
) -> None:
    server.hold = service.cancelled.wait
    with service.running(), pytest.raises(CancelledError, match="task-1 was cancelled"):
        service.stop()
    assert not service.is_ready
    assert server.endpoint.closed == 1


def test_the_deadline_ends_what_does_not_get_ready(service: Any, server: FakeServer) -> None:
    server.endpoint.statuses = [0]
    service.deadline = time.monotonic() + 0.2
    with service.running(), pytest.raises(DeadlineError, match="task-1 reached its deadline"):
        service.result()
    assert server.endpoint.closed == 1


def test_an_endpoint_that_never_answers_well_is_an_error(
    service: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_ANSWER_WITHIN_S", 0.2)
    server.endpoint.statuses = [401]
    with service.running(), pytest.raises(ExecutionError, match=r"answers with status 401; .*log"):
        service.result()
    assert not service.is_ready
    assert server.endpoint.closed == 1


def test_the_endpoint_is_closed_when_nobody_takes_its_readiness(
    service: Any, server: FakeServer
) -> None:
    def refuse() -> None:
        raise ConnectionError("the worker is gone")

    service.on_ready = refuse
    with service.running(), pytest.raises(ConnectionError, match="the worker is gone"):
        service.result()
    assert server.endpoint.closed == 1


def test_a_host_that_others_can_reach_needs_the_operators_leave(
    service: Any, server: FakeServer
) -> None:
    message = r"serve.host '10\.0\.0\.1' can be reached .* FLOWMESH_SERVE_HOSTS"
    with service.running(host="10.0.0.1"), pytest.raises(InputError, match=message):
        service.result()
    assert server.opened == 0
    service.settings = ServeSettings(hosts=("10.0.0.1",))
    with service.up(host="10.0.0.1") as result:
        assert result.endpoint == "http://10.0.0.1:4711/v1"


def test_a_model_is_required(service: Any) -> None:
    service.inputs["model"] = None
    with service.running(), pytest.raises(InputError, match=r"model\.source must name a GGUF"):
        service.result()
