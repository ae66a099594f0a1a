"""Runs a task: each of its rows is an item with agents, a budget, a folder and its own time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import traceback
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import attrs

from flowmesh_agent.answer import AgentAnswer
from flowmesh_agent.budget import Budget
from flowmesh_agent.configs import read_agent
from flowmesh_agent.forms import solve
from flowmesh_agent.masks import task_mask
from flowmesh_agent.results import (
    Done,
    batch_failure,
    build_result,
    task_text,
    write_batch_item,
    write_files,
)
from flowmesh_agent.runners import Runners, open_runners
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock
from flowmesh_agent.trace import Trace, TraceFile
from flowmesh_core import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    Executor,
    FlowmeshError,
    InputError,
    Outcome,
    Row,
    RowSource,
    RunContext,
    SecretMask,
)

__all__ = ["BATCH_S", "CLEANUP_S", "SINGLE_S", "AgentExecutor"]

SINGLE_S = 600.0
"""Seconds of a single task without ``agent.timeout``."""
BATCH_S = 300.0
"""Seconds of each item of a batch without ``agent.timeout``."""
CLEANUP_S = 30.0
"""Seconds that the tools of an item have to end when its time is over."""

_LOOK_S = 0.05
_ONE_TASK = ("static", "graph_template")


class AgentExecutor(Executor):
    """``agent``. A cancel ends models' requests, programs and servers within tenths of a second."""

    def load(self, ctx: RunContext) -> None:
        """Import the engine, which takes a second or two."""
        from flowmesh_agent import llm, loop, toolset  # noqa: F401

    async def run(self, ctx: RunContext) -> Outcome:
        """Work on every task that the document holds."""
        work = asyncio.ensure_future(self._run(ctx))
        watcher = asyncio.ensure_future(_wait_for_cancel(ctx))
        try:
            await asyncio.wait([work, watcher], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise CancelledError(f"task {ctx.task_id} was cancelled")
        finally:
            watcher.cancel()
            await _end(work)

    async def _run(self, ctx: RunContext) -> Outcome:
        settings: AgentSettings = ctx.settings or AgentSettings()
        block = ctx.spec.agent.over(read_agent(ctx.spec.config_name, settings.configs))
        block = block.model_copy(update={"limits": settings.cap(block.limits)})
        environ = os.environ  # noqa: TID251 - the operator's file of servers names variables
        mask = task_mask([block, *block.workers.values()], settings, environ)
        with _masking(mask), TraceFile(ctx.folder / "trace.jsonl", mask, ctx.clock) as trace:
            async with self.open_runners(ctx, block, mask) as runners:
                return Outcome(result=await _Task(ctx, block, mask, trace, runners).run())

    def open_runners(
        self, ctx: RunContext, block: AgentBlock, mask: SecretMask
    ) -> contextlib.AbstractAsyncContextManager[Runners]:
        """Open what runs agents; a test may put its own in this place."""
        return open_runners(ctx, block, mask)


class _Task:
    """A task on its way through its items."""

    def __init__(
        self,
        ctx: RunContext,
        block: AgentBlock,
        mask: SecretMask,
        trace: TraceFile,
        runners: Runners,
    ) -> None:
        data = (ctx.spec.model_extra or {}).get("data") or {}
        self._ctx = ctx
        self._block = block
        self._mask = mask
        self._trace = trace
        self._runners = runners
        self._rows = ctx.inputs.rows or RowSource.from_prompts([ctx.spec.task])
        # It depends on the document, never on how many rows there happen to be.
        self._is_batch = ctx.inputs.rows is not None and data.get("type") not in _ONE_TASK
        self._expected = 0
        self._done: list[Done] = []

    async def run(self) -> dict[str, Any]:
        """Return the result.

        Raises:
            FlowmeshError: The single task failed, or every one of a batch, or rows cannot be read.
        """
        # All of them before the first item: a bad one must not cost what the others have brought.
        read = await asyncio.to_thread(list, self._rows)
        self._expected = len(read)
        if not self._expected and not self._is_batch:
            raise InputError("spec.data: no row is left, so that there is no task")
        started = self._ctx.clock()
        rows = iter(read)  # shared: each takes the next one when it has room
        await _all([self._take(rows) for _ in range(self._block.concurrency)])
        self._done.sort(key=lambda done: done.row.index)
        folder = self._ctx.folder
        write_files(folder, self._done, is_batch=self._is_batch)
        failure = batch_failure(self._done) if self._is_batch else self._done[0].answer.error
        if failure is not None:
            raise failure
        result = build_result(
            self._done,
            config_name=self._ctx.spec.config_name,
            llm=self._runners.llm,
            is_batch=self._is_batch,
            execution_log=self._trace.execution_log,
            seconds=round(self._ctx.clock() - started, 3),
        )
        masked: dict[str, Any] = self._mask.value(result)
        return masked

    async def _take(self, rows: Iterator[Row]) -> None:
        for row in rows:
            self._ctx.check()
            done = await self._work(row)
            self._done.append(done)
            if self._is_batch:
                write_batch_item(self._ctx.folder, done)
            count = len(self._done)
            self._ctx.progress(
                min(count / self._expected, 1.0), f"{count} of {self._expected} tasks"
            )

    async def _work(self, row: Row) -> Done:
        """Work on one item, whose errors are its own."""
        ctx, trace = self._ctx, Trace(file=self._trace, item=row.index)
        started = ctx.clock()
        usual_s = BATCH_S if self._is_batch else SINGLE_S
        deadline = min(started + (self._block.timeout or usual_s), ctx.deadline or math.inf)
        budget = Budget(self._block.limits, clock=ctx.clock)
        folder = ctx.folder / "work" / (str(row.index + 1) if self._is_batch else "")
        folder.mkdir(parents=True, exist_ok=True)
        runner = self._runners.build(folder, budget, trace, deadline)
        try:
            answer = await _within(
                solve(_task(row), self._block, runner, trace), deadline - started + CLEANUP_S
            )
        except FlowmeshError as exc:
            answer = AgentAnswer(error=exc)
        except Exception as exc:  # noqa: BLE001 - the boundary of an item, which spoils no other
            ctx.log(self._mask.text(traceback.format_exc()), level="error")
            answer = AgentAnswer(error=ExecutionError(f"the agent broke: {exc!r}"))
        shutil.rmtree(folder / ".tmp", ignore_errors=True)  # what programs need no more
        usage = attrs.evolve(budget.usage, tool_calls=budget.tool_calls)
        trace.write("usage", "", **attrs.asdict(usage))
        seconds = round(ctx.clock() - started, 3)
        return Done(row=row, answer=self._masked(answer), usage=usage, seconds=seconds)

    def _masked(self, answer: AgentAnswer) -> AgentAnswer:
        with contextlib.suppress(FlowmeshError), _masking(self._mask):
            if answer.error is not None:
                raise answer.error
        return attrs.evolve(
            answer, output=self._mask.text(answer.output), data=self._mask.value(answer.data)
        )


def _task(row: Row) -> str:
    text = task_text(row)
    if not text.strip():
        raise InputError(f"row {row.index} is blank, so that there is no task")
    return text


@contextlib.contextmanager
def _masking(mask: SecretMask) -> Iterator[None]:
    """Take secrets out of the message of what is raised."""
    try:
        yield
    except FlowmeshError as exc:
        exc.args = (mask.text(str(exc)),)
        raise


async def _wait_for_cancel(ctx: RunContext) -> None:
    while not ctx.cancelled:
        await asyncio.sleep(_LOOK_S)


async def _all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; when one raises, end the others and raise that."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(*tasks)


async def _within(work: Coroutine[Any, Any, AgentAnswer], seconds: float) -> AgentAnswer:
    """Wait for a run that should end by itself, and give it up if it does not.

    Raises:
        DeadlineError: It did not, perhaps for a tool that takes no cancel.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise DeadlineError("the agent did not end in time, nor when it was told to")
        return task.result()
    finally:
        await _end(task)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done and wait for it, but not forever."""
    for task in tasks:
        if not task.done():
            task.cancel()
        task.add_done_callback(_look_at)
    await asyncio.wait(tasks, timeout=CLEANUP_S)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Say nothing of an error that came after it was given up."""
    if not task.cancelled():
        task.exception()
