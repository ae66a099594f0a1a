"""A web server on a real port."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["HERE", "Route", "Site"]

HERE = "127.0.0.1"
Route = tuple[int, dict[str, str], bytes]


class Site:
    """A web server, in a ``with`` block, that remembers what it was asked.

    Args:
        routes: Status, headers and body by path; 404 elsewhere.
    """

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.routes = dict(routes)
        site = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                site.requests.append(
                    (f"{self.command} {self.path}", headers, self.rfile.read(size))
                )
                status, told, body = site.routes.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {**told, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the library asks for these

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer((HERE, 0), Handler)
        self.url = f"http://{HERE}:{self.server.server_port}"

    def __enter__(self) -> Site:
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    @property
    def asked(self) -> list[str]:
        return [line for line, _, _ in self.requests]
