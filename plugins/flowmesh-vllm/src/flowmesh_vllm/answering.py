"""The rows of one task on their way through the engine, and the result that they make."""

from __future__ import annotations

import abc
import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from flowmesh_core import (
    Answer,
    ExecutionError,
    InputError,
    Row,
    RunContext,
    build_item,
    build_messages,
    build_result,
    build_text,
    build_vector_item,
    derive_seed,
    normalize,
)
from flowmesh_vllm.lora import AdapterIds, check_adapter, prepare
from flowmesh_vllm.media import clean_media
from flowmesh_vllm.sampling import build_sampling
from flowmesh_vllm.streaming import PartialAnswers
from flowmesh_vllm.weights import find_runtime_adapter

__all__ = ["Answering", "Embedding", "Engine"]

_READ_AHEAD = 64  # rows read from their source in one go
_LOOK_S = 0.05


class Engine(Protocol):
    """What is needed of ``engine.VllmEngine``, which documents it."""

    has_chat_template: bool
    takes_adapters: bool
    at_once: int

    async def render_messages(  # noqa: D102 - documented there
        self, messages: Sequence[Mapping[str, Any]], *, salt: str
    ) -> Any: ...
    async def render_text(self, text: str, *, salt: str) -> Any: ...  # noqa: D102
    async def generate(  # noqa: D102
        self,
        prompt: Any,
        sampling: Mapping[str, Any],
        adapter: Any = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer: ...
    async def embed(self, prompt: Any, adapter: Any = None) -> list[float]: ...  # noqa: D102
    async def open_adapter(self, name: str, number: int, path: str) -> Any: ...  # noqa: D102
    async def sleep(self) -> bool: ...  # noqa: D102
    async def wake(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class _Task(abc.ABC):
    """One task.

    Args:
        ctx: The task.
        engine: Loaded for its engine key.
        ids: Of the adapters that this engine has seen.
        settings: The operator's.
    """

    def __init__(self, ctx: RunContext, engine: Engine, ids: AdapterIds, settings: Any) -> None:
        self.ctx = ctx
        self.engine = engine
        self.salt = _salt(ctx.owner)
        self.adapter: Any = None
        self.done = 0
        self._ids = ids
        self._settings = settings
        self._items: dict[int, Mapping[str, Any]] = {}
        self._prompt_tokens = self._answer_tokens = 0

    async def run(self) -> Mapping[str, Any]:
        """Work until all rows are answered or the task is stopped.

        Raises:
            FlowmeshError: The first row that failed, a cancel or the deadline.
        """
        work = asyncio.ensure_future(self._work())
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else watch.result()
        finally:
            watch.cancel()
            work.cancel()
            await asyncio.wait([work, watch])

    async def _watch(self) -> Any:
        while True:
            self.ctx.check()
            await asyncio.sleep(_LOOK_S)

    async def _work(self) -> Mapping[str, Any]:
        ctx = self.ctx
        if ctx.inputs.rows is None:
            raise InputError("data is required: give data.type and the prompts")
        self.check()
        started_s = ctx.clock()
        self.adapter = await self._open_adapter()
        self.expected = await asyncio.to_thread(ctx.inputs.rows.count) * self.choices
        await self._answer_all(_in_chunks(iter(ctx.inputs.rows)))
        if not self._items:
            raise InputError("data has no rows: there is nothing to answer")
        items = [self._items[index] for index in sorted(self._items)]
        return build_result(
            ctx.inputs.model,
            items,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._answer_tokens,
            latency_s=ctx.clock() - started_s,
            **self.summary(items),
        )

    async def _answer_all(self, rows: AsyncIterator[Row]) -> None:
        """Answer rows, read no faster than the engine takes them; the first failure ends all."""
        most = max(1, 2 * self.engine.at_once // self.choices)
        running: dict[asyncio.Future[None], int] = {}
        try:
            async for row in rows:
                running[asyncio.ensure_future(self._answer_row(row))] = row.index
                while len(running) >= most:
                    await _take_out_ended(running)
            while running:
                await _take_out_ended(running)
        finally:
            for one in running:
                one.cancel()
            if running:
                await asyncio.wait(running)

    async def _answer_row(self, row: Row) -> None:
        try:
            prompt = await self.write(row)
            item, tokens = await self.answer(row, prompt)
        except (InputError, ExecutionError) as exc:
            raise type(exc)(f"row {row.index}: {exc}", retriable=exc.retriable) from exc
        self._items[row.index] = item
        self._prompt_tokens += prompt.tokens
        self._answer_tokens += tokens

    async def _open_adapter(self) -> Any:
        adapter = find_runtime_adapter(self.ctx.inputs)
        if adapter is None:
            return None
        if not self.engine.takes_adapters:
            raise InputError(
                f"adapter {adapter.name}: vLLM cannot apply adapters to a model of this "
                "architecture at run time; give it apply: merge"
            )
        check_adapter(adapter, max_rank=self.ctx.spec.model.vllm.max_lora_rank)
        known = await asyncio.to_thread(self._ids.identify, adapter)
        path = await asyncio.to_thread(prepare, adapter, self.ctx.folder)
        try:
            return await self.engine.open_adapter(known.name, known.number, str(path))
        except InputError as exc:
            raise InputError(f"adapter {adapter.name}: {exc}") from exc

    def count(self, what: str, **values: Any) -> None:
        """Report one more of what was asked for."""
        self.done += 1
        self.report(f"{self.done} of {self.expected} {what}", **values)

    def report(self, message: str, **values: Any) -> None:
        """Report how far the task is."""
        self.ctx.progress(min(self.done / self.expected, 1.0), message, **values)

    choices = 1

    def check(self) -> None:  # noqa: B027 - a text has one form only
        """Raise if no row can be written as the document wants it."""

    def summary(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the result says beside the items."""
        return {}

    @abc.abstractmethod
    async def write(self, row: Row) -> Any:
        """Return the prompt of a row."""

    @abc.abstractmethod
    async def answer(self, row: Row, prompt: Any) -> tuple[Mapping[str, Any], int]:
        """Return the item of a row, and how many tokens were written for it."""


class Answering(_Task):
    """A task of type ``inference``."""

    def __init__(self, ctx: RunContext, engine: Engine, ids: AdapterIds, settings: Any) -> None:
        super().__init__(ctx, engine, ids, settings)
        self._params = ctx.spec.inference
        self.choices = self._params.n
        self._chat = self._params.prompt_format != "plain" and engine.has_chat_template
        self._partial = PartialAnswers(self.report) if self._params.stream else None

    def check(self) -> None:
        """Refuse a chat without a template."""
        if self._params.prompt_format == "chat" and not self.engine.has_chat_template:
            raise InputError(
                "inference.prompt_format is 'chat', but the model has no chat template; set "
                "model.vllm.chat_template, or use plain"
            )

    async def write(self, row: Row) -> Any:
        """Return the prompt of a row, through the chat template when there is one."""
        system = self._params.system_prompt
        if not self._chat:
            return await self.engine.render_text(build_text(row, system), salt=self.salt)
        messages = await asyncio.to_thread(
            clean_media, build_messages(row, system), self._settings.http_allow
        )
        return await self.engine.render_messages(messages, salt=self.salt)

    async def answer(self, row: Row, prompt: Any) -> tuple[Mapping[str, Any], int]:
        """Return the item of a row with all of its choices."""
        running = [
            asyncio.ensure_future(self._answer_once(row, prompt, choice))
            for choice in range(self.choices)
        ]
        try:
            answers = await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.wait(running)
        return build_item(row, prompt.text, answers), sum(one.tokens for one in answers)

    async def _answer_once(self, row: Row, prompt: Any, choice: int) -> Answer:
        sampling = build_sampling(self._params, derive_seed(self._params.seed, row.index, choice))
        listener = self._partial.listener(row.index, choice) if self._partial else None
        answer = await self.engine.generate(prompt, sampling, self.adapter, listener)
        self.count("answers")
        return answer


class Embedding(_Task):
    """A task of type ``embedding``."""

    async def write(self, row: Row) -> Any:
        """Return a text as it is."""
        if not isinstance(row.prompt, str):
            raise InputError("an embedding needs a text, got chat messages")
        return await self.engine.render_text(row.prompt, salt=self.salt)

    async def answer(self, row: Row, prompt: Any) -> tuple[Mapping[str, Any], int]:
        """Return the item of a row with its vector."""
        vector = await self.engine.embed(prompt, self.adapter)
        self.count("vectors")
        return build_vector_item(row, normalize(vector) if self.ctx.spec.normalize else vector), 0

    def summary(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the length of the vectors."""
        return {"dimensions": len(items[0]["embedding"])}


def _salt(owner: str) -> str:
    """Return what keeps owners apart: none can tell from the time what another one asked."""
    return hashlib.sha256(owner.encode()).hexdigest() if owner else ""


async def _in_chunks(rows: Iterator[Row]) -> AsyncIterator[Row]:
    """Read rows on a thread, since their source may be a disk or a network."""
    while chunk := await asyncio.to_thread(lambda: list(islice(rows, _READ_AHEAD))):
        for row in chunk:
            yield row


async def _take_out_ended(running: dict[asyncio.Future[None], int]) -> None:
    """Wait until some have ended; raises what the one of the lowest number raised."""
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    ended = sorted(done, key=running.pop)
    failed = [one for one in ended if one.exception() is not None]
    if failed:
        failed[0].result()
