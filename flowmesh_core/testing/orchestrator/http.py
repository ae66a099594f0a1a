"""HTTP side of the stand-in: results and files over plain http.server, with faults on request."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from email.utils import collapse_rfc2231_value
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs

from flowmesh_core.testing.orchestrator.body import Body, BodyError, Multipart
from flowmesh_core.testing.orchestrator.results import ResultStore, now

__all__ = ["HttpRequest", "OrchestratorHttp"]

RESULT = re.compile(r"/api/v1/results/([^/]+)")
FILES = re.compile(r"/api/v1/results/([^/]+)/files")
FILE = re.compile(r"/api/v1/results/([^/]+)/files/(.*)")


@attrs.frozen(kw_only=True)
class HttpRequest:
    """One request as it arrived.

    Attributes:
        headers: Names in lower case.
        body_bytes: Length of the body after any chunked coding.
        status: What was answered; 0 when the client went away before the end of its body.
    """

    method: str
    path: str
    headers: dict[str, str]
    body_bytes: int
    status: int


class OrchestratorHttp:
    """The server on 127.0.0.1 and the record of what it was asked.

    Args:
        store: Where results and files go.
        on_result: Called with the task id after a document was stored.
        token: Required bearer token; None leaves everything open.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        store: ResultStore,
        on_result: Callable[[str], None],
        *,
        token: str | None = None,
        port: int = 0,
    ) -> None:
        self.store = store
        self.on_result = on_result
        self.requests: list[HttpRequest] = []
        self._token = token
        self._faults: list[tuple[int, str]] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="standin-http", daemon=True
        )

    @property
    def url(self) -> str:
        """Base address without a path."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and give the port back."""
        if self._thread.ident is not None:  # shutdown() would wait for ever for a loop not begun
            self._server.shutdown()
            self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def fail_next(self, times: int, status: int, only: str = "") -> None:
        """Answer the next requests whose path contains ``only`` with an error."""
        with self._lock:
            self._faults += [(status, only)] * times

    def refuse(self, path: str, authorization: str) -> None:
        """Raise what stands in the way of a request: a missing token or an ordered fault."""
        if self._token is not None and path != "/healthz":
            scheme, _, given = authorization.partition(" ")
            if scheme.lower() != "bearer" or not given:
                raise _Refusal(401, "Missing bearer token")
            if given != self._token:
                raise _Refusal(403, "Invalid token")
        with self._lock:
            fault = next((fault for fault in self._faults if fault[1] in path), None)
            if fault:
                self._faults.remove(fault)
                raise _Refusal(fault[0], "fault ordered by the test")


class _Refusal(Exception):  # noqa: N818 - an answer, not a fault of the server
    def __init__(self, status: int, detail: Any) -> None:
        self.status = status
        self.detail = detail


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for the handlers

    def __init__(self, address: tuple[str, int], site: OrchestratorHttp) -> None:
        self.site = site
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End kept-alive connections, whose handlers would wait for the next request."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its handler has just closed it


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the record is ``requests``."""

    def _serve(self) -> None:
        body = Body(self.rfile, self.headers)
        try:
            status, answer = self._answer(body)
            body.drain()  # a client in the middle of its body could not read the answer
        except ConnectionError:
            self._note(body, 0)
            self.close_connection = True
            return
        self._note(body, status)
        self._send(status, answer)

    def _answer(self, body: Body) -> tuple[int, Any]:
        path = unquote(urlsplit(self.path).path)
        try:
            self.server.site.refuse(path, self.headers.get("Authorization", ""))
            return 200, self._route(path, body)
        except _Refusal as refusal:
            return refusal.status, {"detail": refusal.detail}
        except BodyError as exc:
            return 400, {"detail": str(exc)}
        except ConnectionError:
            raise
        except OSError as exc:
            return 500, {"detail": str(exc)}

    def _route(self, path: str, body: Body) -> Any:
        store = self.server.site.store
        if self.command == "GET" and path == "/healthz":
            return {"ok": True}
        if self.command == "POST" and path == "/api/v1/results":
            return self._ingest(body)
        if self.command == "POST" and (match := FILES.fullmatch(path)):
            return {"ok": True, "path": str(_receive(store, match[1], body))}
        if self.command == "GET" and (match := FILE.fullmatch(path)):
            found = store.find(match[1], _plain(match[2]))
            return _known(found, "artifact not found")
        if self.command == "GET" and (match := RESULT.fullmatch(path)):
            return _known(store.load(match[1]), "result not found")
        raise _Refusal(404, "Not Found")

    def _ingest(self, body: Body) -> dict[str, Any]:
        posted = _parse_result(b"".join(body))
        task_id = posted["task_id"].strip()
        if not task_id:
            raise _Refusal(400, "task_id must not be blank")
        document = {
            "task_id": task_id,
            "worker_id": posted.get("worker_id"),
            "metadata": posted.get("metadata") or {},
            "received_at": posted.get("received_at") or now(),
            "result": posted["result"],
        }
        path = self.server.site.store.save(task_id, document)
        self.server.site.on_result(task_id)
        return {"ok": True, "path": str(path.resolve())}

    def _note(self, body: Body, status: int) -> None:
        self.server.site.requests.append(
            HttpRequest(
                method=self.command,
                path=self.path,
                headers={name.lower(): value for name, value in self.headers.items()},
                body_bytes=body.size_bytes,
                status=status,
            )
        )

    def _send(self, status: int, answer: Any) -> None:
        content = answer.read_bytes() if isinstance(answer, Path) else json.dumps(answer).encode()
        kind = "application/octet-stream" if isinstance(answer, Path) else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _receive(store: ResultStore, task_id: str, body: Body) -> Path:
    stored = None
    if not body.boundary:
        raise _missing("file")
    for header, content in Multipart(body):
        if header.get_param("name", header="content-disposition") == "file":
            name = header.get_param("filename", header="content-disposition")
            if name is not None:
                stored = store.receive(task_id, _plain(collapse_rfc2231_value(name)), content)
    if stored is None:
        raise _missing("file")
    return stored


def _plain(name: str) -> str:
    if name in {"", ".", ".."} or "/" in name or "\\" in name:
        raise _Refusal(400, "invalid filename")
    return name


def _known(found: Any, otherwise: str) -> Any:
    if found is None:
        raise _Refusal(404, otherwise)
    return found


def _parse_result(text: bytes) -> dict[str, Any]:
    try:
        posted = json.loads(text)
    except ValueError as exc:
        raise _Refusal(422, f"JSON decode error: {exc}") from exc
    if not isinstance(posted, dict) or not isinstance(posted.get("task_id"), str):
        raise _missing("task_id")
    if not isinstance(posted.get("result"), dict):
        raise _missing("result")
    return posted


def _missing(field: str) -> _Refusal:
    return _Refusal(422, [{"loc": ["body", field], "msg": "Field required", "type": "missing"}])
