"""Serves a model through vLLM's own OpenAI server, a process of its own, until its task is stopped.

This process imports neither vLLM nor torch. What the server prints goes to the task's log.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowmesh_core import (
    Executor,
    InputError,
    RunContext,
    check_host,
    find_address,
    hold_port,
    serve_result,
    served_model,
    wait_until_answering,
)
from flowmesh_vllm.arguments import (
    build_arguments,
    check_download_dir,
    refuse_unknown,
    trusts_code,
)
from flowmesh_vllm.command import build_command, build_environment, known_arguments
from flowmesh_vllm.lora import check_adapter, prepare
from flowmesh_vllm.merging import merged
from flowmesh_vllm.room import find_room
from flowmesh_vllm.server import Server
from flowmesh_vllm.sockets import SOCKETS, own_sockets
from flowmesh_vllm.spec import VllmServeSettings
from flowmesh_vllm.weights import Weights, find_config, find_runtime_adapter, find_weights

__all__ = ["VllmServer"]

_POLL_S = 0.1


class VllmServer(Executor):
    """``serve`` with vLLM; each run has a server of its own and ends it."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Serve until the task is cancelled; the result is a ``ServeResult``."""
        check_host(ctx)
        serve, trusts = ctx.spec.serve, _trusts_code(ctx)
        refuse_unknown(ctx.spec.model.vllm.further, known_arguments())
        check_download_dir(ctx.spec.model.vllm, _settings(ctx))
        weights, adapter = find_weights(ctx.inputs), find_runtime_adapter(ctx.inputs)
        address = find_address(serve.host, serve.port)
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(hold_port(address, serve.port))
            sockets = stack.enter_context(own_sockets())
            # What was merged may go once the server has read it.
            sockets = stack.enter_context(own_sockets())
            with merged(weights, ctx.folder, trust_remote_code=trusts) as whole:
                starting = self.start_server(ctx, whole, address, port, sockets)
                server = stack.enter_context(starting)
                wait_until_answering(ctx, server.ask)
            result = serve_result(ctx, port, model=adapter.name if adapter else None)
            ctx.log(f"serving {result['model']} at {result['endpoint']}")
            ctx.ready(result, ttl_s=serve.ttl_s)
            while not ctx.cancelled:
                server.check()
                time.sleep(_POLL_S)
        return result

    def start_server(
        self, ctx: RunContext, weights: Weights, address: str, port: int, sockets: str
    ) -> Server:
        """Start the server; a test may put its own in this place."""
        options, settings, key = ctx.spec.model.vllm, _settings(ctx), ctx.spec.serve.api_key
        adapters = _adapters(ctx)
        arguments = build_arguments(
            options.model_copy(update={"enable_lora": bool(adapters)}),
            weights,
            room=find_room(ctx.devices),
            config=find_config(weights) if len(ctx.devices) > 1 else None,
            trust_remote_code=_trusts_code(ctx),
            defaults={**_media_rule(settings), **settings.engine_args},
        )
        secret = key and key.get_secret_value()
        command = build_command(
            arguments,
            address=address,
            port=port,
            model=served_model(ctx),
            adapters=adapters,
            chat_template=_write_template(ctx, options.chat_template),
            guarded=key is not None,
        )
        own = os.environ  # noqa: TID251 - only read, to be handed on
        # It leaves more than sockets among temporary files.
        places = {SOCKETS: sockets, "TMPDIR": sockets}
        environment = {**build_environment(own, api_key=secret), **places}
        return Server(command, environment, address=address, port=port, api_key=secret)


def _settings(ctx: RunContext) -> VllmServeSettings:
    return ctx.settings or VllmServeSettings()


def _trusts_code(ctx: RunContext) -> bool:
    return trusts_code(ctx.spec.model.vllm, ctx.inputs.model, _settings(ctx))


def _media_rule(settings: VllmServeSettings) -> dict[str, Any]:
    """Return from where the server may fetch what its clients point to: it knows no wildcards.

    An empty list would mean everywhere; without a rule of the operator's it is nowhere, since a
    client could name any address that this machine reaches.
    """
    hosts = [host for host in settings.http_allow if "*" not in host]
    return {"allowed_media_domains": hosts or ["none.invalid"]}


def _adapters(ctx: RunContext) -> dict[str, Path]:
    """Return the adapter that clients may ask for, by its name."""
    adapter = find_runtime_adapter(ctx.inputs)
    if adapter is None:
        return {}
    if adapter.name == served_model(ctx):
        raise InputError(f"adapter {adapter.name} must not have the model's own name")
    check_adapter(adapter, max_rank=ctx.spec.model.vllm.max_lora_rank)
    return {adapter.name: prepare(adapter, ctx.folder.absolute())}


def _write_template(ctx: RunContext, text: str | None) -> Path | None:
    """Write a template to a file that goes when the task's folder is committed."""
    if text is None:
        return None
    path = ctx.folder.absolute() / ".chat_template.jinja"
    path.write_text(text, encoding="utf-8")
    return path
