"""Runs tasks, alone or several as one, through one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from flowmesh_core import (
    ExecutionError,
    Executor,
    InputError,
    Outcome,
    RunContext,
)
from flowmesh_transformers.batching import Budget, interleave, plan_batches
from flowmesh_transformers.members import EmbeddingMember, InferenceMember, Job, Member, Reading
from flowmesh_transformers.prompts import Answer, Request
from flowmesh_transformers.weights import find_weights

__all__ = ["Engine", "TransformersExecutor"]

_WINDOW = 8  # batches whose rows are read ahead, so that rows of similar length meet


class Engine(Reading, Protocol):
    """What the executor needs of ``engine.TransformersEngine``, which documents it."""

    def budget(self) -> Budget: ...  # noqa: D102 - as above
    def generate(  # noqa: D102
        self, requests: Sequence[Request], stopped: Callable[[int], bool]
    ) -> Iterator[tuple[int, Answer | None]]: ...
    def embed(self, requests: Sequence[Request]) -> list[list[float]]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class TransformersExecutor(Executor):
    """``inference`` and ``embedding``.

    A cancel or the deadline ends a task within a token, or within the reading of one batch's
    prompts.
    """

    _engine: Engine | None = None

    def load(self, ctx: RunContext) -> None:
        """Load the model with its adapters; does nothing when it is loaded."""
        if self._engine is None:
            self._engine = self.open_engine(ctx)

    def open_engine(self, ctx: RunContext) -> Engine:
        """Open the engine; a test may put its own in this place."""
        weights, trusts = find_weights(ctx.inputs), _trusts_code(ctx)
        from flowmesh_transformers.engine import TransformersEngine

        return TransformersEngine(
            weights,
            ctx.spec.model.transformers,
            embeds=ctx.task_type == "embedding",
            gpus=len(ctx.devices),
            trust_remote_code=trusts,
        )

    def unload(self) -> None:
        """Free the model; may come twice."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Outcome]]:
        """Answer the rows of ``data`` of tasks that agree on ``group_key``, in shared batches.

        Yields:
            Each task's id with its outcome as soon as it is known. A task that fails or is
            cancelled leaves the others alone; what is raised here concerns all that are left.
        """
        if self._engine is None:
            raise ExecutionError(f"task {ctxs[0].task_id}: run came before load")
        yield from _Group(self._engine, ctxs).answer()


class _Group:
    """Tasks on their way through one engine."""

    def __init__(self, engine: Engine, ctxs: Sequence[RunContext]) -> None:
        self._engine = engine
        self._embeds = ctxs[0].task_type == "embedding"
        kind = EmbeddingMember if self._embeds else InferenceMember
        self._open: list[Member] = [kind(ctx, engine) for ctx in ctxs]
        self._budget = engine.budget().scaled(min(ctx.batch_scale for ctx in ctxs))

    def answer(self) -> Iterator[tuple[str, Outcome]]:
        jobs = interleave([member.jobs() for member in self._open])
        while window := list(islice(jobs, _WINDOW * self._budget.rows)):
            for batch in plan_batches([job.request for job in window], self._budget):
                yield from self._compute([window[index] for index in batch])
        for member in self._open:
            yield member.ctx.task_id, member.outcome()

    def _compute(self, jobs: Sequence[Job]) -> Iterator[tuple[str, Outcome]]:
        wanted = [job for job in jobs if not job.member.is_stopped()]
        yield from self._settle()
        if not wanted:
            return
        requests = [job.request for job in wanted]
        for number, answer in self._ask(requests, lambda i: wanted[i].member.is_stopped()):
            if answer is not None:
                wanted[number].member.take(wanted[number], answer)
            yield from self._settle()

    def _ask(
        self, requests: Sequence[Request], stopped: Callable[[int], bool]
    ) -> Iterator[tuple[int, Any]]:
        if self._embeds:
            return enumerate(self._engine.embed(requests))
        return self._engine.generate(requests, stopped)

    def _settle(self) -> Iterator[tuple[str, Outcome]]:
        """Give up each member whose outcome is known."""
        for member in [one for one in self._open if one.ended]:
            self._open.remove(member)
            yield member.ctx.task_id, member.outcome()


def _trusts_code(ctx: RunContext) -> bool:
    """Tell whether the repository's own code may run: both document and operator must say so."""
    wanted: bool = ctx.spec.model.transformers.trust_remote_code
    if wanted and not (ctx.settings and ctx.settings.trust_remote_code):
        raise InputError(
            "model.transformers.trust_remote_code runs code of the model's repository, which the "
            "operator of this worker does not allow; leave it out, or set "
            "FLOWMESH_TRUST_REMOTE_CODE=1 there"
        )
    return wanted or bool(ctx.inputs.model and ctx.inputs.model.trust_remote_code)
