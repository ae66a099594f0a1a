"""Answers the prompts of a task with llama.cpp, as many at once as there are slots."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

from flowmesh_core import (
    AdapterRef,
    Answer,
    ExecutionError,
    Executor,
    FlowmeshError,
    InferenceParams,
    InputError,
    ModelRef,
    Row,
    RowSource,
    RunContext,
    build_item,
    build_messages,
    build_result,
    build_text,
    derive_seed,
)
from flowmesh_llamacpp.request import build_sampling
from flowmesh_llamacpp.spec import LlamacppOptions
from flowmesh_llamacpp.weights import find_adapters, find_weights

__all__ = ["Completion", "Engine", "LlamacppExecutor"]


class Completion(Protocol):
    """What an engine gives back; ``engine.Completion`` says what the fields mean."""

    @property
    def text(self) -> str: ...  # noqa: D102 - as above
    @property
    def finish_reason(self) -> Literal["stop", "length"]: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102
    @property
    def completion_tokens(self) -> int: ...  # noqa: D102


class Engine(Protocol):
    """What the executor needs of ``engine.LlamaEngine``, which documents it."""

    has_chat_template: bool

    def complete(  # noqa: D102 - documented there
        self, request: Mapping[str, Any], *, stopped: Callable[[], bool]
    ) -> Completion | None: ...
    def build_grammar(self, schema: Mapping[str, Any]) -> str: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class LlamacppExecutor(Executor):
    """``inference`` with GGUF weights.

    A cancel or the deadline ends a task within a token, or within ``n_batch`` tokens of a prompt
    that is still being read.
    """

    _engine: Engine | None = None

    def load(self, ctx: RunContext) -> None:
        """Load the model with its adapters; does nothing when it is loaded."""
        if self._engine is None:
            weights, adapters = find_weights(ctx.inputs), find_adapters(ctx.inputs)
            self._engine = self.open_engine(weights, ctx.spec.model.llamacpp, adapters)

    def open_engine(
        self, weights: Path, options: LlamacppOptions, adapters: Sequence[AdapterRef]
    ) -> Engine:
        """Open the engine; a test may put its own in this place."""
        from flowmesh_llamacpp.engine import LlamaEngine

        return LlamaEngine(weights, options, adapters)

    def unload(self) -> None:
        """Free the model; may come twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Answer every row of ``data``; the result is an ``InferenceResult``."""
        return await asyncio.to_thread(self._answer, ctx)

    def _answer(self, ctx: RunContext) -> Mapping[str, Any]:
        engine, model, rows = self._engine, ctx.inputs.model, ctx.inputs.rows
        if engine is None or model is None:
            raise ExecutionError(f"task {ctx.task_id}: run came before load")
        if rows is None:
            raise InputError("data is required: give data.type and the prompts")
        started_s = ctx.clock()
        work = _Work(ctx, engine, rows)
        answered = work.answer(rows)
        if not answered:
            raise InputError("data has no rows: there is nothing to answer")
        return _build_result(model, answered, ctx.clock() - started_s)


class _Work:
    """The prompts of one task on their way through the slots."""

    def __init__(self, ctx: RunContext, engine: Engine, rows: RowSource) -> None:
        self._ctx = ctx
        self._engine = engine
        self._params: InferenceParams = ctx.spec.inference
        self._system = self._params.system_prompt
        self._chat = _wants_chat(self._params, engine)
        self._request = build_sampling(self._params)
        schema = self._params.response_format.schema_object
        self._must_be_json = schema is not None and not self._params.stop
        if schema is not None:
            self._request["grammar"] = engine.build_grammar(schema)
        self._slots: int = ctx.spec.model.llamacpp.n_parallel
        self._free = threading.Semaphore(self._slots)
        self._halt = threading.Event()
        self._counting = threading.Lock()
        self._done, self._expected = 0, rows.count() * self._params.n

    def answer(self, rows: Iterable[Row]) -> list[tuple[Row, list[Completion]]]:
        """Answer all rows; the first failure in their order ends the task."""
        futures: list[tuple[Row, list[Future[Completion | None]]]] = []
        with ThreadPoolExecutor(self._slots, thread_name_prefix="llamacpp") as pool:
            fed = False
            try:
                for row in rows:
                    choices = range(self._params.n)
                    futures.append((row, [self._submit(pool, row, i) for i in choices]))
                    if self._halt.is_set():
                        break
                fed = True
            finally:
                if not fed:
                    self._halt.set()
        answered = [(row, [future.result() for future in choices]) for row, choices in futures]
        self._ctx.check()
        return [(row, [choice for choice in choices if choice]) for row, choices in answered]

    def _submit(self, pool: ThreadPoolExecutor, row: Row, choice: int) -> Future[Completion | None]:
        self._free.acquire()  # rows are read no faster than they are answered
        self._ctx.check()
        return pool.submit(self._answer_one, row, choice)

    def _answer_one(self, row: Row, choice: int) -> Completion | None:
        try:
            answer = self._engine.complete(self._build(row, choice), stopped=self._stopped)
            if answer:
                self._check(answer)
                self._count()
            return answer
        except (FlowmeshError, ValueError) as exc:
            self._halt.set()
            kind = type(exc) if isinstance(exc, InputError | ExecutionError) else InputError
            raise kind(f"row {row.index}: {exc}") from exc
        finally:
            self._free.release()

    def _build(self, row: Row, choice: int) -> dict[str, Any]:
        request = dict(self._request)
        if self._chat:
            request["messages"] = build_messages(row, self._system)
        else:
            request["prompt"] = build_text(row, self._system)
        if self._params.seed is not None:
            request["seed"] = derive_seed(self._params.seed, row.index, choice)
        return request

    def _stopped(self) -> bool:
        return self._halt.is_set() or self._ctx.cancelled or self._ctx.remaining_s == 0.0

    def _check(self, answer: Completion) -> None:
        if not answer.prompt_tokens:
            raise InputError("the prompt is empty and this model has no token to begin with")
        if self._must_be_json and answer.finish_reason == "stop":
            try:
                json.loads(answer.text)
            except ValueError as exc:
                raise ExecutionError(f"the answer is not the JSON asked for: {exc}") from exc

    def _count(self) -> None:
        with self._counting:  # reports must not overtake each other
            self._done += 1
            self._ctx.progress(
                min(self._done / self._expected, 1.0), f"{self._done} of {self._expected} answers"
            )


def _wants_chat(params: InferenceParams, engine: Engine) -> bool:
    if params.prompt_format == "chat" and not engine.has_chat_template:
        raise InputError(
            "inference.prompt_format is 'chat', but the model has no chat template; set "
            "model.llamacpp.chat_template, or use plain"
        )
    return params.prompt_format != "plain" and engine.has_chat_template


def _build_result(
    model: ModelRef, answered: Sequence[tuple[Row, Sequence[Completion]]], latency_s: float
) -> dict[str, Any]:
    return build_result(
        model,
        [_build_item(row, completions) for row, completions in answered],
        prompt_tokens=sum(completions[0].prompt_tokens for _, completions in answered),
        completion_tokens=sum(one.completion_tokens for _, given in answered for one in given),
        latency_s=latency_s,
    )


def _build_item(row: Row, completions: Sequence[Completion]) -> dict[str, Any]:
    answers = [
        Answer(text=one.text, finish_reason=one.finish_reason, tokens=one.completion_tokens)
        for one in completions
    ]
    return build_item(row, completions[0].prompt, answers)
