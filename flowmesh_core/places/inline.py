"""The place inside the worker's own process: a coroutine on its loop, a plain ``run`` in a thread.

One engine per executor stays warm. Python cannot end a thread, so a plain ``run`` that ignores
``ctx.cancelled`` goes on after its task was given up; the next task then gets a fresh engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import attrs

from flowmesh_core.executor import Capability, Executor, ExecutorInfo, Outcome, RunContext
from flowmesh_core.merge import engine_key
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.places.settle import as_execution_error, as_outcome

__all__ = ["InlinePlace"]

_log = logging.getLogger(__name__)


class _AbandonedError(asyncio.CancelledError):
    """The task was cancelled while a thread still works for it, and keeps the executor busy."""


@attrs.define(eq=False)
class _Engine:
    """What agrees on one key; ``executor`` is None until it is loaded, and again without it."""

    concurrent: bool
    executor: Executor | None = None
    users: int = 0
    turn: asyncio.Lock = attrs.field(factory=asyncio.Lock)

    async def unload(self) -> None:
        executor, self.executor = self.executor, None
        if executor is not None:
            await asyncio.to_thread(_unload, executor)


class InlinePlace(Place):
    """Runs executors in this process."""

    def __init__(self, context: PlaceContext) -> None:
        super().__init__(context)
        self._engines: dict[tuple[str, str], _Engine] = {}

    async def run(self, job: Job) -> Outcome:
        """Run one task; tasks of one engine take turns unless it is CONCURRENT."""
        info, ctx = job.info, job.ctx
        key = (info.name, f"{engine_key(info, ctx.raw_spec)} {ctx.inputs.weights_state()}")
        engine = self._engines.get(key)
        if engine is None:
            engine = self._engines[key] = _Engine(Capability.CONCURRENT in info.capabilities)
        engine.users += 1
        try:
            return await self._run(key, engine, info, ctx)
        except _AbandonedError:
            engine.executor = None
            raise
        except asyncio.CancelledError:
            raise
        except Exception:
            raise
        except BaseException as exc:
            raise as_execution_error(exc) from exc
        finally:
            engine.users -= 1

    async def _run(
        self, key: tuple[str, str], engine: _Engine, info: ExecutorInfo, ctx: RunContext
    ) -> Outcome:
        executor = engine.executor
        if executor is None or not engine.concurrent:
            async with engine.turn:
                executor = engine.executor
                if executor is None:
                    await self._unload_idle(key)
                    executor = engine.executor = await self._load(info, ctx)
                if not engine.concurrent:
                    return await _call(executor, ctx)
        return await _call(executor, ctx)

    async def _load(self, info: ExecutorInfo, ctx: RunContext) -> Executor:
        # The import may take seconds, and the loop has other tasks.
        executor = await asyncio.to_thread(lambda: self.context.load_class(info)(ctx.settings))
        if type(executor).load is not Executor.load:
            try:
                await _on_thread(executor, executor.load, ctx)
            except _AbandonedError:
                raise
            except BaseException:
                await asyncio.to_thread(_unload, executor)
                raise
        return executor

    async def _unload_idle(self, wanted: tuple[str, str]) -> None:
        """Free the engines that this executor holds for other keys and nobody uses."""
        for key, engine in list(self._engines.items()):
            if key[0] != wanted[0] or key == wanted:
                continue
            if not engine.users:
                async with engine.turn:  # a task that comes meanwhile waits, and loads again
                    if not engine.users:
                        await engine.unload()
            if not engine.users and self._engines.get(key) is engine:
                del self._engines[key]

    async def close(self) -> None:
        """Unload everything."""
        engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            await engine.unload()


async def _on_thread(
    executor: Executor, method: Callable[[RunContext], Any], ctx: RunContext
) -> Any:
    """Call a method of the executor; a cancelled task leaves the executor to the thread's end."""
    call = _Call(method, ctx)
    try:
        return await asyncio.wrap_future(call.start())
    except asyncio.CancelledError:
        if not call.abandon(executor):
            raise
        raise _AbandonedError from None


class _Call:
    """One call on a thread of its own: what never returns takes no thread from others."""

    def __init__(self, method: Callable[[RunContext], Any], ctx: RunContext) -> None:
        self._method, self._ctx = method, ctx
        self._future: Future[Any] = Future()
        self._ending = threading.Lock()
        self._ended = False
        self._orphan: Executor | None = None

    def start(self) -> Future[Any]:
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run,), name="flowmesh-inline").start()
        return self._future

    def _run(self) -> None:
        answer, error = None, None
        try:
            answer = self._method(self._ctx)
        except Exception as exc:  # noqa: BLE001 - executor boundary
            error = as_execution_error(exc) if isinstance(exc, StopIteration) else exc
        except BaseException as exc:  # noqa: BLE001 - it must not end the worker
            error = as_execution_error(exc)
        with self._ending:
            self._ended = True
        if self._orphan is not None:
            _unload(self._orphan)
        with contextlib.suppress(InvalidStateError):  # given up
            self._future.set_result(answer) if error is None else self._future.set_exception(error)

    def abandon(self, executor: Executor) -> bool:
        """Let the thread unload the executor when it ends; return whether it still runs."""
        with self._ending:
            if not self._ended:
                self._orphan = executor
            return not self._ended


def _unload(executor: Executor) -> None:
    try:
        executor.unload()
    except BaseException:  # noqa: BLE001 - executor boundary: the next task is not to blame
        _log.exception("executor %s: unload raised", type(executor).__name__)


async def _answer(executor: Executor, ctx: RunContext) -> Any:
    if inspect.iscoroutinefunction(executor.run):
        return await executor.run(ctx)
    answer: Any = await _on_thread(executor, executor.run, ctx)
    return await answer if inspect.isawaitable(answer) else answer


async def _call(executor: Executor, ctx: RunContext) -> Outcome:
    return as_outcome(executor, await _answer(executor, ctx))
