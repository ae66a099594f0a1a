"""Runs tasks through one engine of vLLM, as many at once as come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowmesh_core import ExecutionError, Executor, RunContext
from flowmesh_vllm.answering import Answering, Embedding, Engine
from flowmesh_vllm.arguments import (
    Room,
    build_arguments,
    check_download_dir,
    refuse_unknown,
    trusts_code,
)
from flowmesh_vllm.lora import AdapterIds
from flowmesh_vllm.merging import merged
from flowmesh_vllm.room import find_room
from flowmesh_vllm.spec import VllmSettings
from flowmesh_vllm.weights import find_config, find_weights

__all__ = ["VllmExecutor"]


class VllmExecutor(Executor):
    """``inference`` and ``embedding``.

    Requests of all tasks share the running batch, whatever adapters they bring. A cancel or the
    deadline ends a task within a token.
    """

    _engine: Engine | None = None

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings or VllmSettings())
        self._ids = AdapterIds()

    def load(self, ctx: RunContext) -> None:
        """Load the model, with the adapters that are to be merged; nothing when it is loaded."""
        if self._engine is None:
            self._engine = self.open_engine(ctx, find_room(ctx.devices))

    def open_engine(self, ctx: RunContext, room: Room) -> Engine:
        """Open the engine; a test may put its own in this place."""
        options = ctx.spec.model.vllm
        trusts = trusts_code(options, ctx.inputs.model, self.settings)
        check_download_dir(options, self.settings)
        weights = find_weights(ctx.inputs)
        with merged(weights, ctx.folder, trust_remote_code=trusts) as whole:
            arguments = build_arguments(
                options,
                whole,
                room=room,
                config=find_config(whole) if room.gpus > 1 else None,
                embeds=ctx.task_type == "embedding",
                trust_remote_code=trusts,
                defaults=self.settings.engine_args,
            )
            from flowmesh_vllm.engine import VllmEngine
            from flowmesh_vllm.loading import known_arguments

            refuse_unknown(options.further, known_arguments())
            return VllmEngine(arguments, chat_template=options.chat_template)

    def unload(self) -> None:
        """Free the model; may come twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    async def sleep(self) -> bool:
        """Give the GPU back while nothing runs, where vLLM can."""
        return self._engine is not None and await self._engine.sleep()

    async def wake(self) -> None:
        """Take the GPU again."""
        if self._engine is not None:
            await self._engine.wake()

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Answer every row of ``data``; the result is an ``InferenceResult`` or its like."""
        if self._engine is None:
            raise ExecutionError(f"task {ctx.task_id}: run came before load")
        kind = Embedding if ctx.task_type == "embedding" else Answering
        return await kind(ctx, self._engine, self._ids, self.settings).run()
