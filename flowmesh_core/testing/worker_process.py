"""A real ``flowmesh worker`` process for tests, ended by its own pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """Starts a worker on a Redis.

    Args:
        redis_url: Where it takes tasks.
        results_dir: Its RESULTS_DIR.
        worker_id: Its WORKER_ID.
        environ: Further variables; an empty value removes one.
        arguments: Further arguments of ``flowmesh worker``.
    """

    def __init__(
        self,
        redis_url: str,
        results_dir: Path,
        *,
        worker_id: str = "w1",
        environ: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.worker_id = worker_id
        self.results_dir = results_dir
        self.stderr_path = results_dir.with_name(f"{results_dir.name}-{worker_id}.stderr")
        self._argv = [sys.executable, "-m", "flowmesh_core", "worker", *arguments]
        variables = {
            **os.environ,  # noqa: TID251 - a child of the test run inherits its environment
            "REDIS_URL": redis_url,
            "RESULTS_DIR": str(results_dir),
            "WORKER_ID": worker_id,
            "HEARTBEAT_INTERVAL_SEC": "1",
            "PYTHONUNBUFFERED": "1",
            **(environ or {}),
        }
        self._environ = {key: value for key, value in variables.items() if value}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> psutil.Process:
        """The running process."""
        if self._process is None:
            raise RuntimeError("the worker was not started")
        return psutil.Process(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        return self.stderr_path.read_text(errors="replace")

    def start(self) -> None:
        """Start it; it may not be ready yet."""
        self.stderr_path.parent.mkdir(parents=True, exist_ok=True)
        with self.stderr_path.open("ab") as stderr:
            self._process = subprocess.Popen(self._argv, env=self._environ, stderr=stderr)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Wait until it ends and return its exit code."""
        if self._process is None:
            raise RuntimeError("the worker was not started")
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 20.0) -> int:
        """End it with SIGTERM, then SIGKILL, and return its exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return self.wait(5)

    def __enter__(self) -> WorkerProcess:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.alive:
            self.stop()
