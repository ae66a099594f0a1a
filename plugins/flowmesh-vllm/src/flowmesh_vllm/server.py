"""vLLM's server as a process with children of its own, from start to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowmesh_core import ExecutionError, ask_status

__all__ = ["Server"]

_POLL_S = 0.02
_GRACE_S = 3.0  # between SIGTERM and SIGKILL; less than a worker waits for a cancelled task
_PATIENCE_S = 5.0  # for processes that were killed


class Server:
    """A running server; a context manager that leaves none of its processes behind.

    Args:
        command: What to start.
        environment: All of its environment.
        address: Where it will listen.
        port: The same.
        api_key: What it asks for, or None.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        address: str,
        port: int,
        api_key: str | None,
    ) -> None:
        self._address, self._port, self._api_key = address, port, api_key
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,  # a group of its own, to be ended as a whole
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process and process group."""
        return self._process.pid

    def ask(self) -> int:
        """Ask over HTTP for the models; return the status, 0 without an answer.

        Raises:
            ExecutionError: The server has ended.
        """
        self.check()
        return ask_status(self._address, self._port, "/v1/models", api_key=self._api_key)

    def check(self) -> None:
        """Return while the server runs.

        Raises:
            ExecutionError: It has ended; retriable when a signal ended it.
        """
        if ended := self._look():
            killed = ended.si_code != os.CLD_EXITED
            how = signal.Signals(ended.si_status).name if killed else f"code {ended.si_status}"
            raise ExecutionError(
                f"vLLM's server ended with {how}; the task's log has its reason", retriable=killed
            )

    def close(self) -> None:
        """Ask the server to end, and end it and all that it started; may come twice."""
        if self._process.returncode is not None:
            return
        if self._look() is None:
            os.kill(self.pid, signal.SIGTERM)
        give_up_s = time.monotonic() + _GRACE_S
        while self._look() is None and time.monotonic() < give_up_s:
            time.sleep(_POLL_S)
        # Its number is nobody else's before it has been waited for.
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        give_up_s = time.monotonic() + _PATIENCE_S
        while _has_living(self.pid) and time.monotonic() < give_up_s:
            time.sleep(_POLL_S)

    def _look(self) -> os.waitid_result | None:
        """Return how it ended, without taking note of it; None while it runs."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _has_living(group: int) -> bool:
    """Tell whether a process of a group holds memory yet; one that has died holds none."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            state, _, found = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False
