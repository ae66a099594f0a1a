"""Serves a model over HTTP, as clients of OpenAI expect it, until its task is stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from flowmesh_core import (
    Executor,
    RunContext,
    check_host,
    serve_result,
    served_model,
    wait_until_answering,
)
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
        check_host(ctx)
        endpoint = self.open_endpoint(ctx)
        try:
            wait_until_answering(ctx, endpoint.ask, within_s=_ANSWER_WITHIN_S)
            result = serve_result(ctx, endpoint.port)
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
            model=served_model(ctx),
            host=serve.host,
            port=serve.port,
            api_key=serve.api_key and serve.api_key.get_secret_value(),
        )
