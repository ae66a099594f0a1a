"""The place inside the worker's own process: a coroutine on its loop, a plain ``run`` in a thread.

One engine per executor stays warm. Python cannot end a thread, so a plain ``run`` that ignores
``ctx.cancelled`` goes on after its task was given up.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from flowmesh_core.contract import encode_json
from flowmesh_core.errors import ExecutionError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, Outcome, RunContext
from flowmesh_core.places.base import Place

__all__ = ["InlinePlace", "engine_key"]

_log = logging.getLogger(__name__)


def engine_key(info: ExecutorInfo, spec: Mapping[str, Any]) -> str:
    """Return the text on which tasks must agree to share a loaded engine."""
    return encode_json([_value_at(spec, path) for path in info.engine_key]).decode()


def _value_at(spec: Mapping[str, Any], path: str) -> Any:
    value: Any = spec
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return _sorted(value)


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


@attrs.define(eq=False)
class _Engine:
    executor: Executor
    concurrent: bool
    users: int = 0
    loaded: bool = False
    turn: asyncio.Lock = attrs.field(factory=asyncio.Lock)


class InlinePlace(Place):
    """Runs executors in this process."""

    def __init__(self, load_class: Callable[[ExecutorInfo], type[Executor]]) -> None:
        super().__init__(load_class)
        self._engines: dict[tuple[str, str], _Engine] = {}

    async def run(self, info: ExecutorInfo, ctx: RunContext) -> Outcome:
        """Run one task; tasks of one engine take turns unless it is CONCURRENT."""
        key = (info.name, engine_key(info, ctx.raw_spec))
        engine = self._engines.get(key)
        if engine is None:
            engine = self._engines[key] = self._create(info, ctx)
        engine.users += 1
        try:
            if not engine.loaded or not engine.concurrent:
                async with engine.turn:
                    await self._load(key, engine, ctx)
                    if not engine.concurrent:
                        return await _call(engine.executor, ctx)
            return await _call(engine.executor, ctx)
        finally:
            engine.users -= 1

    def _create(self, info: ExecutorInfo, ctx: RunContext) -> _Engine:
        executor = self.load_class(info)(ctx.settings)
        return _Engine(executor, Capability.CONCURRENT in info.capabilities)

    async def _load(self, key: tuple[str, str], engine: _Engine, ctx: RunContext) -> None:
        if engine.loaded:
            return
        await self._unload_idle(key)
        if type(engine.executor).load is not Executor.load:
            try:
                await asyncio.to_thread(engine.executor.load, ctx)
            except BaseException:
                self._engines.pop(key, None)
                await asyncio.to_thread(_unload, engine.executor)
                raise
        engine.loaded = True

    async def _unload_idle(self, wanted: tuple[str, str]) -> None:
        """Free the engines that this executor holds for other keys and nobody uses."""
        for key, engine in list(self._engines.items()):
            if key[0] == wanted[0] and key != wanted and not engine.users:
                del self._engines[key]
                await asyncio.to_thread(_unload, engine.executor)

    async def close(self) -> None:
        """Unload everything."""
        engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            await asyncio.to_thread(_unload, engine.executor)


def _unload(executor: Executor) -> None:
    try:
        executor.unload()
    except Exception:  # noqa: BLE001 - executor boundary: a failing unload must not fail the next task
        _log.exception("executor %s: unload raised", type(executor).__name__)


async def _answer(executor: Executor, ctx: RunContext) -> Any:
    if inspect.iscoroutinefunction(executor.run):
        return await executor.run(ctx)
    answer: Any = await asyncio.to_thread(executor.run, ctx)
    return await answer if inspect.isawaitable(answer) else answer


async def _call(executor: Executor, ctx: RunContext) -> Outcome:
    try:
        answer = await _answer(executor, ctx)
    except SystemExit as exc:
        raise ExecutionError(f"the executor tried to end the process: {exc!r}") from exc
    if isinstance(answer, Outcome):
        return answer
    if isinstance(answer, Mapping):
        return Outcome(result=answer)
    raise ExecutionError(
        f"executor {type(executor).__name__} must return a mapping or an Outcome, "
        f"got {type(answer).__name__}"
    )
