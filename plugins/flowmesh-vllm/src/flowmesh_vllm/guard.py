"""Asks every request for the key; loaded by vLLM's server as a middleware.

vLLM itself asks only below some paths. Others answer prompts too, such as ``/invocations``.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

__all__ = ["KeyGuard"]

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]

_OPEN = ("/health",)  # for load balancers; says nothing but that it is up
_REFUSAL = {
    "message": "this endpoint needs its key as Authorization: Bearer",
    "type": "invalid_request_error",
    "code": "invalid_api_key",
}


class KeyGuard:
    """An ASGI middleware.

    Args:
        app: What answers requests that bring the key.
        key: Without it, the one that vLLM itself was given.
    """

    def __init__(self, app: App, key: str | None = None) -> None:
        if key is None:
            from vllm import envs  # noqa: PLC0415 - only vLLM's own process has it loaded

            key = envs.VLLM_API_KEY
        if not key:
            raise ValueError("KeyGuard needs a key")
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Hand on what brings the key; what is no request, such as a start, passes as well."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # Source: RFC 6455, 7.4.1
        else:
            head = {"status": 401, "headers": [(b"content-type", b"application/json")]}
            await send({"type": "http.response.start", **head})
            body = json.dumps({"error": _REFUSAL}).encode()
            await send({"type": "http.response.body", "body": body})

    def _may_pass(self, scope: Mapping[str, Any]) -> bool:
        if scope["path"] in _OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)
