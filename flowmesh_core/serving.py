"""What all executors of ``serve`` share: who may be served, where to listen, when it is up."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.client import HTTPConnection, HTTPException
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flowmesh_core.errors import ExecutionError, InputError
from flowmesh_core.executor import RunContext
from flowmesh_core.validation import CommaSeparated

__all__ = [
    "ServeSettings",
    "ask_status",
    "check_host",
    "find_address",
    "hold_port",
    "serve_result",
    "served_model",
    "wait_until_answering",
]

_POLL_S = 0.1


class ServeSettings(BaseModel):
    """What the operator allows endpoints.

    Attributes:
        hosts: Values of ``serve.host`` that documents may use beside this machine's loopback;
            the variable holds them separated by commas, for all engines.
    """

    model_config = ConfigDict(populate_by_name=True)

    hosts: CommaSeparated = Field(default=(), alias="FLOWMESH_SERVE_HOSTS")


def check_host(ctx: RunContext) -> None:
    """Refuse a host that others can reach, unless ``ctx.settings`` allow it.

    One that is open to all, without a key, is a warning in the task's log.

    Raises:
        InputError: The operator does not allow it.
    """
    serve, settings = ctx.spec.serve, ctx.settings or ServeSettings()
    if serve.is_loopback:
        return
    if serve.host not in settings.hosts:
        raise InputError(
            f"serve.host {serve.host!r} can be reached from other machines, which the operator "
            f"of this worker does not allow; use 127.0.0.1, or add {serve.host} to "
            "FLOWMESH_SERVE_HOSTS there"
        )
    if serve.api_key is None:
        ctx.log(f"serve.host {serve.host} is open to all: no serve.api_key", level="warning")


def find_address(host: str, port: int) -> str:
    """Return the IP address of ``host``, on which a server could listen at this moment.

    Raises:
        ExecutionError: The host is not this machine's, or the port is taken or reserved;
            retriable when it is taken, since another worker may have it free.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        socket.create_server(address, family=family).close()
    except OSError as exc:
        raise _no_place(host, port, exc) from exc
    return str(address[0])


@contextlib.contextmanager
def hold_port(address: str, port: int) -> Iterator[int]:
    """Keep a port for a server in another process, which may take minutes to listen on it.

    Until the block ends nobody else gets it: no connection of this machine, no server that takes
    a free port, no second ``hold_port``. The server itself must set ``SO_REUSEADDR``, as nearly
    all do.

    Args:
        address: From ``find_address``.
        port: 0 takes a free one.

    Returns:
        The port's number.

    Raises:
        ExecutionError: It is taken; retriable.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as held, socket.socket(socket.AF_UNIX) as claim:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((address, port))
            number: int = held.getsockname()[1]
            # Two holders would not disturb each other; a name is held by one only.
            claim.bind(f"\0flowmesh/{address}/{number}")
        except OSError as exc:
            raise _no_place(address, port, exc) from exc
        yield number


def _no_place(host: str, port: int, exc: OSError) -> ExecutionError:
    reason = str(exc.strerror).partition(" (while")[0]
    return ExecutionError(
        f"cannot listen on {host} port {port}: {reason}; give another serve.host, or another "
        "serve.port (0 takes a free one)",
        retriable=exc.errno == errno.EADDRINUSE,
    )


def ask_status(address: str, port: int, path: str, *, api_key: str | None) -> int:
    """Return the status with which a server answers a GET; 0 when it does not answer in time."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with contextlib.closing(HTTPConnection(address, port, timeout=5)) as connection:
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        except (OSError, HTTPException):
            return 0


def wait_until_answering(
    ctx: RunContext, ask: Callable[[], int], *, within_s: float | None = None
) -> None:
    """Return when an endpoint answers with status 200.

    Args:
        ctx: Its deadline and its cancel end the wait.
        ask: Asks once; returns the status, 0 without an answer, and raises when there will
            never be one. ``ask_status`` does the asking.
        within_s: Seconds that it may take; without it, as long as the task has time.

    Raises:
        ExecutionError: It does not answer in time, or with another status.
        CancelledError: The task was cancelled.
        DeadlineError: Its time is over.
    """
    give_up_s = None if within_s is None else ctx.clock() + within_s
    while (status := ask()) != 200:
        ctx.check()
        if give_up_s is not None and ctx.clock() > give_up_s:
            told = f"answers with status {status}" if status else "does not answer"
            raise ExecutionError(f"the endpoint {told}; the task's log may say why")
        time.sleep(_POLL_S)
    ctx.check()


def serve_result(ctx: RunContext, port: int, *, model: str | None = None) -> dict[str, Any]:
    """Return the ``ServeResult`` of an endpoint that is up now.

    Args:
        ctx: Of its task.
        port: The one on which it listens.
        model: What clients ask for; ``served_model`` without it.

    Raises:
        InputError: The task names no model.
    """
    serve = ctx.spec.serve
    ends = None
    if serve.ttl_s is not None:
        ends = datetime.now(timezone.utc) + timedelta(seconds=serve.ttl_s)
    return {
        "ok": True,
        "endpoint": f"http://{_shown_host(serve.host)}:{port}/v1",
        "model": model or served_model(ctx),
        "pid": os.getpid(),
        "expires_at": ends and ends.isoformat(timespec="seconds"),
    }


def served_model(ctx: RunContext) -> str:
    """Return the id under which a task's model is served: what results call it.

    Raises:
        InputError: The task names no model.
    """
    model = ctx.inputs.model
    if model is None:
        raise InputError("model.source is required: it names the model to serve")
    return model.identifier


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - clients need a name that leads here
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
