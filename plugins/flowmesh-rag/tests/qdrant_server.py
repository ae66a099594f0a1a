"""A stand-in for a Qdrant server: its REST routes, answered by the client's own local mode.

What it reads and writes is checked by the client library's own models, so the real client speaks
real HTTP to it. Faults are switched on by the test.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs
from pydantic import BaseModel, TypeAdapter
from qdrant_client import QdrantClient
from qdrant_client import models as m

__all__ = ["Fault", "QdrantServer", "Seen", "serve_qdrant"]

_ROUTE = re.compile(r"/collections/(?P<name>[^/]+)(?P<rest>.*)")


@attrs.frozen(kw_only=True)
class Seen:
    """One request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@attrs.frozen(kw_only=True)
class Fault:
    """What is answered instead; ``status`` 0 hangs up without a word."""

    status: int = 0
    text: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)


class RefusedError(Exception):
    """A request that a real server would answer with an error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@attrs.define(kw_only=True)
class QdrantServer:
    """The collections and switches of a running stand-in.

    Attributes:
        url: Where it listens.
        client: The local store behind it; tests may prepare old collections with it.
        seen: Every request so far.
        fault: Answered to every request while it is set.
        delay_s: Slept before each answer.
        embed: Turns a text into a vector, for server-side embedding.
    """

    url: str = ""
    client: QdrantClient = attrs.field(factory=lambda: QdrantClient(":memory:"))
    seen: list[Seen] = attrs.field(factory=list)
    fault: Fault | None = None
    delay_s: float = 0.0
    embed: Callable[[str], list[float]] | None = None
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    def answer(self, method: str, path: str, body: Any) -> Any:
        """Do what a route asks; the local store is not made for several threads at once."""
        found = _ROUTE.fullmatch(path)
        if found is None:
            raise RefusedError(404, "")
        name, route = found["name"], f"{method} {found['rest']}"
        with self.lock:
            if route == "GET /exists":
                return {"exists": self.client.collection_exists(name)}
            if route == "PUT ":
                return self._create(name, body)
            if not self.client.collection_exists(name):
                raise RefusedError(404, f"Not found: Collection `{name}` doesn't exist!")
            return getattr(self, _METHODS[route])(name, body)

    def _create(self, name: str, body: Any) -> bool:
        if self.client.collection_exists(name):
            raise RefusedError(409, f"Wrong input: Collection `{name}` already exists!")
        asked = m.CreateCollection.model_validate(body)
        return self.client.create_collection(
            name,
            vectors_config=asked.vectors,
            sparse_vectors_config=asked.sparse_vectors,
            metadata=asked.metadata,
        )

    def _info(self, name: str, _body: Any) -> Any:
        return self.client.get_collection(name)

    def _index(self, _name: str, body: Any) -> Any:
        return _done(m.CreateFieldIndex.model_validate(body))  # the local store needs none

    def _upsert(self, name: str, body: Any) -> Any:
        points = m.PointsList.model_validate(body).points
        for point in points:
            for vector_name, vector in _by_name(point.vector).items():
                self._check(name, vector_name, vector)
        return _done(self.client.upsert(name, points))

    def _delete(self, name: str, body: Any) -> Any:
        selector: Any = TypeAdapter(m.PointsSelector).validate_python(body)
        return _done(self.client.delete(name, points_selector=selector))

    def _scroll(self, name: str, body: Any) -> Any:
        asked = m.ScrollRequest.model_validate(body)
        points, following = self.client.scroll(
            name,
            scroll_filter=asked.filter,
            limit=asked.limit or 10,
            offset=asked.offset,
            with_payload=asked.with_payload,
            with_vectors=asked.with_vector or False,
        )
        return {"points": points, "next_page_offset": following}

    def _count(self, name: str, body: Any) -> Any:
        asked = m.CountRequest.model_validate(body)
        return self.client.count(name, count_filter=asked.filter)

    def _query(self, name: str, body: Any) -> Any:
        return self._batch(name, {"searches": [body]})[0]

    def _batch(self, name: str, body: Any) -> Any:
        asked = m.QueryRequestBatch.model_validate(self._with_vectors(body)).searches
        for one in asked:
            for part in [one, *(one.prefetch or [])]:
                part.params = None  # the local store always looks at every vector
                query = getattr(part.query, "nearest", part.query)
                if isinstance(query, list | m.SparseVector):
                    self._check(name, part.using or "", query)
        return self.client.query_batch_points(name, asked)

    def _with_vectors(self, body: Any) -> Any:
        """Embed texts as a server with an inference service does."""
        if isinstance(body, list):
            return [self._with_vectors(item) for item in body]
        if not isinstance(body, dict):
            return body
        if set(body) >= {"text", "model"}:
            if self.embed is None:
                raise RefusedError(400, "Wrong input: InferenceService is not configured")
            return self.embed(body["text"])
        return {key: self._with_vectors(value) for key, value in body.items()}

    def _check(self, name: str, using: str, vector: Any) -> None:
        """Refuse what the local store would take silently or answer with an error of NumPy."""
        params = self.client.get_collection(name).config.params
        dense = _by_name(params.vectors)
        if using in (params.sparse_vectors or {}):
            return
        if using not in dense:
            raise RefusedError(400, f"Wrong input: Not existing vector name error: {using}")
        if len(vector) != dense[using].size:
            raise RefusedError(
                400,
                f"Wrong input: Vector dimension error: expected dim: {dense[using].size},"
                f" got {len(vector)}",
            )


_METHODS = {
    "GET ": "_info",
    "PUT /index": "_index",
    "PUT /points": "_upsert",
    "POST /points/delete": "_delete",
    "POST /points/scroll": "_scroll",
    "POST /points/count": "_count",
    "POST /points/query": "_query",
    "POST /points/query/batch": "_batch",
}


def _by_name(vectors: Any) -> dict[str, Any]:
    """Return vectors by name, where the unnamed one has the empty name."""
    return vectors if isinstance(vectors, dict) else {"": vectors}


def _done(_result: Any) -> dict[str, Any]:
    return {"operation_id": 0, "status": "completed"}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet; two would wait for each other for 40 ms
    state: QdrantServer

    def log_message(self, *_args: Any) -> None:
        """Write nothing."""

    def _handle(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.partition("?")[0]
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = json.loads(raw) if raw else None
        self.state.seen.append(Seen(method=self.command, path=path, headers=headers, body=body))
        time.sleep(self.state.delay_s)
        fault = self.state.fault
        if fault is not None and fault.status == 0:
            self.close_connection = True
            return
        if fault is not None:
            self._send(fault.status, fault.text.encode(), fault.headers)
            return
        try:
            result = _plain(self.state.answer(self.command, path, body))
            status, answer = 200, {"result": result, "status": "ok", "time": 0.0}
        except RefusedError as exc:
            status, answer = exc.status, {"status": {"error": str(exc)}, "time": 0.0}
        except ValueError as exc:
            status, answer = 400, {"status": {"error": f"Format error: {exc}"}, "time": 0.0}
        self._send(status, json.dumps(answer).encode(), {})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"content-type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = _handle  # noqa: N815 - names of the standard library


@contextlib.contextmanager
def serve_qdrant(embed: Callable[[str], list[float]] | None = None) -> Iterator[QdrantServer]:
    """Run a stand-in on a free port of this machine until the block ends."""
    state = QdrantServer(embed=embed)
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
            state.client.close()
