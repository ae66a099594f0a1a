"""An endpoint of chat completions on a real port that answers as a script says."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import attrs

__all__ = [
    "Call",
    "Hang",
    "Refusal",
    "Reply",
    "Request",
    "ScriptedEndpoint",
    "Slow",
    "Step",
    "as_reply",
    "call",
]

TOKENS = (10, 5)


@attrs.frozen
class Call:
    """A call of a tool; arguments may be text that is no JSON."""

    tool: str
    arguments: Mapping[str, Any] | str


def call(tool: str, **arguments: Any) -> Call:
    """Return a call of a tool."""
    return Call(tool, arguments)


@attrs.frozen(kw_only=True)
class Reply:
    """An answer with everything said; ``tokens`` are the prompt's and the answer's."""

    text: str = ""
    calls: Sequence[Call] = ()
    tokens: tuple[int, int] | None = TOKENS
    finish_reason: str = ""


@attrs.frozen
class Refusal:
    """An answer with an error's status; ``body`` takes the place of one with the message."""

    status: int
    message: str = "refused"
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes = b""


@attrs.frozen
class Hang:
    """No answer until the other side has gone."""


@attrs.frozen
class Slow:
    """An answer that takes ``seconds``; ``drip`` sends it byte by byte instead of waiting first."""

    step: Any
    seconds: float
    drip: bool = False


Step = str | bytes | Call | list[Call] | Reply | Refusal | Hang | Slow | Callable[..., Any]


@attrs.frozen
class Request:
    """What came: header names in lower case."""

    path: str
    headers: Mapping[str, str]
    body: Any
    at_s: float


def as_reply(step: Any) -> Reply:
    """Return what a text, one call or several stand for."""
    if isinstance(step, Reply):
        return step
    if isinstance(step, str):
        return Reply(text=step)
    return Reply(calls=(step,) if isinstance(step, Call) else step)


class ScriptedEndpoint:
    """Answers the n-th request by the n-th step, then by ``always``.

    A step is a text, ``call(...)`` or a list of such, a ``Reply``, a ``Refusal``, ``Hang()``,
    ``Slow(step, seconds)``, bytes that are sent as they are, or a function of the request's body
    that returns one of these. Use it as a context.

    Attributes:
        requests: What came, in order.
        dropped: Requests whose client had gone before they were answered.
    """

    def __init__(self, *steps: Step, always: Step = Refusal(400, "the script has ended")) -> None:
        self.requests: list[Request] = []
        self.dropped = 0
        self._steps = list(steps)
        self._always = always
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.endpoint = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        """The base URL, which ends with ``/v1``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def text(self) -> str:
        """All that was ever sent here, to look for what never should be."""
        return json.dumps([[each.path, dict(each.headers), each.body] for each in self.requests])

    def take(self, request: Request) -> Any:
        """Note a request and return the step that answers it."""
        with self._lock:
            self.requests.append(request)
            step = self._steps.pop(0) if self._steps else self._always
        return step(request.body) if callable(step) else step

    def wait(self, connection: socket.socket, seconds: float = 3600.0) -> bool:
        """Wait, and return whether the client is still there."""
        end = time.monotonic() + seconds
        while not self._closed.is_set() and (left := end - time.monotonic()) > 0:
            if select.select([connection], [], [], min(left, 0.02))[0]:
                if not connection.recv(1, socket.MSG_PEEK):
                    self.dropped += 1
                    return False
                self._closed.wait(0.02)  # something was sent that nobody asked for
        return not self._closed.is_set()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them
    endpoint: ScriptedEndpoint

    def handle_error(self, *_args: object) -> None:
        """Say nothing of a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        endpoint = cast("_Server", self.server).endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        step = endpoint.take(Request(self.path, headers, body, time.monotonic()))
        seconds, drip = 0.0, False
        if isinstance(step, Slow):
            step, seconds, drip = step.step, step.seconds, step.drip
        if isinstance(step, Hang):
            endpoint.wait(self.connection)
            return
        if seconds and not drip and not endpoint.wait(self.connection, seconds):
            return
        self._send(*_encode(step, body, len(endpoint.requests)), seconds=seconds if drip else 0.0)

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str], *, seconds: float
    ) -> None:
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if not seconds:
            self.wfile.write(data)
            return
        endpoint = cast("_Server", self.server).endpoint
        for position in range(len(data)):
            if not endpoint.wait(self.connection, seconds / len(data)):
                return
            self.wfile.write(data[position : position + 1])


def _encode(step: Any, body: Any, number: int) -> tuple[int, bytes, Mapping[str, str]]:
    if isinstance(step, bytes):
        return 200, step, {}
    if isinstance(step, Refusal):
        error = {"error": {"message": step.message, "type": "scripted", "code": step.status}}
        return step.status, step.body or json.dumps(error).encode(), step.headers
    return 200, json.dumps(_completion(as_reply(step), body, number)).encode(), {}


def _completion(reply: Reply, body: Any, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [
            {
                "id": f"call-{number}-{index}",
                "type": "function",
                "function": {"name": each.tool, "arguments": _as_text(each.arguments)},
            }
            for index, each in enumerate(reply.calls)
        ]
    reason = reply.finish_reason or ("tool_calls" if reply.calls else "stop")
    completion: dict[str, Any] = {
        "id": f"chat-{number}",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
    }
    if reply.tokens:
        prompt, answer = reply.tokens
        completion["usage"] = {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }
    return completion


def _as_text(arguments: Mapping[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)
