from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from flowmesh_vllm.guard import KeyGuard

KEY = b"Bearer sk-1"


async def receive() -> dict[str, Any]:
    raise AssertionError("nothing is read of a request before it may pass")


async def app(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "passed", "path": scope.get("path")})


def sent(scope: dict[str, Any], *keys: bytes, guard: KeyGuard | None = None) -> list[Any]:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"accept", b"*/*"), *((b"authorization", key) for key in keys)]
    guard = guard or KeyGuard(app, "sk-1")
    asyncio.run(guard({"type": "http", "headers": headers, **scope}, receive, send))
    return messages


@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/metrics", "/", "/healthy"])
@pytest.mark.parametrize(
    "keys",
    [(), (b"Bearer sk-2",), (b"sk-1",), (b"Basic sk-1",), (b"Bearer sk-1 ",), (KEY, b"Bearer x")],
)
def test_without_its_key_no_path_is_answered(path: str, keys: tuple[bytes, ...]) -> None:
    head, body = sent({"path": path, "method": "OPTIONS"}, *keys)
    assert (head["type"], head["status"]) == ("http.response.start", 401)
    assert b"invalid_api_key" in body["body"]
    assert b"sk-1" not in body["body"]


@pytest.mark.parametrize("key", [KEY, b"bearer sk-1"])
def test_with_its_key_every_path_is_answered(key: bytes) -> None:
    assert sent({"path": "/invocations"}, key) == [{"type": "passed", "path": "/invocations"}]


def test_whether_it_is_up_may_be_asked_by_all() -> None:
    assert sent({"path": "/health"}) == [{"type": "passed", "path": "/health"}]


def test_a_websocket_is_closed_unheard_without_the_key() -> None:
    scope = {"path": "/v1/realtime", "type": "websocket"}
    assert sent(scope) == [{"type": "websocket.close", "code": 1008}]
    assert sent(scope, KEY) == [{"type": "passed", "path": "/v1/realtime"}]


def test_what_is_no_request_passes() -> None:
    assert sent({"type": "lifespan"}) == [{"type": "passed", "path": None}]


def test_the_key_is_the_one_that_vllm_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = SimpleNamespace(envs=SimpleNamespace(VLLM_API_KEY="sk-1"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    guard = KeyGuard(app)
    assert sent({"path": "/x"}, guard=guard)[0]["status"] == 401
    assert sent({"path": "/x"}, KEY, guard=guard)[0]["type"] == "passed"


@pytest.mark.parametrize("key", [None, ""])
def test_a_guard_without_a_key_does_not_start(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    vllm = SimpleNamespace(envs=SimpleNamespace(VLLM_API_KEY=key))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with pytest.raises(ValueError, match="KeyGuard needs a key"):
        KeyGuard(app)
