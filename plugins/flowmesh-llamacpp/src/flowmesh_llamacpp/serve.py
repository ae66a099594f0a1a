"""Serves a model over HTTP, as clients of OpenAI expect it, until its task is stopped."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol

from flowmesh_core import ExecutionError, Executor, InputError, RunContext
from flowmesh_llamacpp.spec import ServeSettings
from flowmesh_llamacpp.weights import find_adapters, find_weights

__all__ = ["Endpoint", "LlamacppServer"]

_POLL_S = 0.1
_ANSWER_WITHIN_S = 30.0


class Endpoint(Protocol):
    """What the executor needs of ``engine.LlamaEndpoint``, which documents it."""

    @property
    def port(self) -> int: ...  # noqa: D102 - documented there
    def ask(self) -> int: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class LlamacppServer(Executor):
    """``serve`` with GGUF weights; each run loads a model of its own and frees it at the end."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Serve until the task is cancelled; the result is a ``ServeResult``."""
        self._check_host(ctx)
        endpoint = self.open_endpoint(ctx)
        try:
            self._wait_for_answer(ctx, endpoint)
            result = _build_result(ctx, endpoint.port)
            ctx.log(f"serving {result['model']} at {result['endpoint']}")
            ctx.ready(result, ttl_s=ctx.spec.serve.ttl_s)
            while not ctx.cancelled:
                time.sleep(_POLL_S)
        finally:
            endpoint.close()
        return result

    def open_endpoint(self, ctx: RunContext) -> Endpoint:
        """Load the model and listen; a test may put its own in this place."""
        from flowmesh_llamacpp.engine import LlamaEndpoint  # noqa: PLC0415 - as in executor.py

        serve = ctx.spec.serve
        return LlamaEndpoint(
            find_weights(ctx.inputs),
            ctx.spec.model.llamacpp,
            find_adapters(ctx.inputs),
            model=_model_id(ctx),
            host=serve.host,
            port=serve.port,
            api_key=serve.api_key and serve.api_key.get_secret_value(),
        )

    def _check_host(self, ctx: RunContext) -> None:
        serve, settings = ctx.spec.serve, ctx.settings or ServeSettings()
        if serve.is_loopback:
            return
        if serve.host not in settings.hosts:
            raise InputError(
                f"serve.host {serve.host!r} can be reached from other machines, which the operator "
                f"of this worker does not allow; use 127.0.0.1, or add {serve.host} to "
                "FLOWMESH_LLAMACPP_SERVE_HOSTS there"
            )
        if serve.api_key is None:
            ctx.log(f"serve.host {serve.host} is open to all: no serve.api_key", level="warning")

    def _wait_for_answer(self, ctx: RunContext, endpoint: Endpoint) -> None:
        give_up_s = ctx.clock() + _ANSWER_WITHIN_S
        while (status := endpoint.ask()) != 200:
            ctx.check()
            if ctx.clock() > give_up_s:
                told = f"answers with status {status}" if status else "does not answer"
                raise ExecutionError(
                    f"the endpoint on port {endpoint.port} {told}; the task's log may say why"
                )
            time.sleep(_POLL_S)
        ctx.check()


def _model_id(ctx: RunContext) -> str:
    model = ctx.inputs.model
    if model is None:
        raise InputError("model.source is required: it names the model to serve")
    return model.identifier


def _build_result(ctx: RunContext, port: int) -> dict[str, Any]:
    serve = ctx.spec.serve
    ends = None
    if serve.ttl_s is not None:
        ends = datetime.now(timezone.utc) + timedelta(seconds=serve.ttl_s)
    return {
        "ok": True,
        "endpoint": f"http://{_shown_host(serve.host)}:{port}/v1",
        "model": _model_id(ctx),
        "pid": os.getpid(),
        "expires_at": ends and ends.isoformat(timespec="seconds"),
    }


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - clients need a name that leads here
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
