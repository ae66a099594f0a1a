"""Turns texts into vectors: the rows of all tasks of a group in batches that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from flowmesh_core import (
    ExecutionError,
    Executor,
    InputError,
    Outcome,
    Row,
    RunContext,
    build_result,
    build_vector_item,
    normalize,
)
from flowmesh_rag.embedder import Embedder
from flowmesh_rag.queries import Member, Query, do_together, open_members, read_rows, stop_all

__all__ = ["EmbeddingExecutor"]

_WINDOW = 16  # batches between two reports, in which texts of similar length meet


class EmbeddingExecutor(Executor):
    """``embedding`` by sentence-transformers; texts are embedded as documents."""

    _embedder: Embedder | None = None

    def load(self, ctx: RunContext) -> None:
        """Load the model; does nothing when it is loaded."""
        if self._embedder is None:
            self._embedder = self.open_embedder(ctx)

    def open_embedder(self, ctx: RunContext) -> Embedder:
        """Open the model; a test may put its own in this place."""
        if ctx.inputs.model is None:
            raise InputError("model.source must name a model")
        from flowmesh_rag.sentence import SentenceEmbedder  # noqa: PLC0415 - loads the engine

        options = ctx.spec.model.sentence_transformers
        return SentenceEmbedder(
            ctx.inputs.model, options, settings=ctx.settings, devices=ctx.devices
        )

    def unload(self) -> None:
        """Free the model; may come twice."""
        if self._embedder is not None:
            self._embedder.close()
            self._embedder = None

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Outcome]]:
        """Give each row of ``data`` its vector, for tasks that agree on ``group_key``.

        Yields:
            Each task's id with its outcome as soon as it is known. A task that fails or is
            cancelled leaves the others alone.
        """
        if self._embedder is None:
            raise ExecutionError(f"task {ctxs[0].task_id}: run came before load")
        self._embedder.batch_scale = min(ctx.batch_scale for ctx in ctxs)
        yield from _Group(self._embedder, ctxs).answer()


class _Group:
    """Tasks on their way through one model."""

    def __init__(self, embedder: Embedder, ctxs: Sequence[RunContext]) -> None:
        self._embedder = embedder
        self._started_s = ctxs[0].clock()
        self._members = open_members(ctxs, lambda ctx: read_rows(ctx.inputs.rows))
        self._items: dict[Member, dict[int, dict[str, Any]]] = {one: {} for one in self._members}
        self._window = _WINDOW * ctxs[0].spec.model.sentence_transformers.batch_size

    def answer(self) -> Iterator[tuple[str, Outcome]]:
        jobs = [(member, query) for member in self._members for query in member.queries]
        waiting = list(self._members)
        for start in range(0, len(jobs), self._window):
            part = jobs[start : start + self._window]
            do_together(dict.fromkeys(member for member, _ in part), partial(self._embed, part))
            while waiting and self._has_ended(waiting[0]):
                yield self._settle(waiting.pop(0))
        for member in waiting:
            yield self._settle(member)

    def _embed(self, jobs: Sequence[tuple[Member, Query]], members: Sequence[Member]) -> None:
        chosen = [(member, query) for member, query in jobs if member in members]
        texts = [query.text for _, query in chosen]
        vectors = self._embedder.embed(
            texts, role="document", stop=partial(stop_all, members), normalize=False
        )
        for (member, query), vector in zip(chosen, vectors.tolist(), strict=True):
            row = Row(index=query.index, prompt=query.text, metadata=query.metadata)
            numbers = normalize(vector) if member.ctx.spec.normalize else vector
            self._items[member][query.index] = build_vector_item(row, numbers)
        for member in members:
            done, total = len(self._items[member]), len(member.queries)
            member.ctx.progress(done / total, f"{done} of {total} vectors")

    def _has_ended(self, member: Member) -> bool:
        return member.error is not None or len(self._items[member]) == len(member.queries)

    def _settle(self, member: Member) -> tuple[str, Outcome]:
        items = self._items.pop(member)
        if member.error is not None:
            return member.ctx.task_id, Outcome(error=member.error)
        result = build_result(
            member.ctx.inputs.model,
            [items[query.index] for query in member.queries],
            prompt_tokens=sum(self._count(query.text) for query in member.queries),
            completion_tokens=0,
            latency_s=member.ctx.clock() - self._started_s,
            dimensions=self._embedder.dimensions,
        )
        return member.ctx.task_id, Outcome(result=result)

    def _count(self, text: str) -> int:
        """Return the tokens that the model has read of a text."""
        tokens = self._embedder.count_tokens(text) or 0
        return min(tokens, self._embedder.max_tokens or tokens)
