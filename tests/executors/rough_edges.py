"""Executors for the edges of a process's life; a single-file plugin like ``rough.py``."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flowmesh_core import (
    Capability,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    hookimpl,
)

# Opened by a test to let abandoned inline threads end.
GATE = threading.Event()


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    def declare(
        name: str, target: str, *more: Capability, place: str = "process", **fields: Any
    ) -> ExecutorInfo:
        return ExecutorInfo(
            name=name,
            task_types={name},
            target=f"{__name__}:{target}",
            capabilities={Capability.CPU, *more},
            places=[place],
            **fields,
        )

    together = Capability.CONCURRENT
    return [
        declare("edge", "Edge", engine_key=["model"]),
        declare("edge.together", "Together", together, engine_key=["model"]),
        declare("edge.groups", "Edge", Capability.GROUP, group_key=["model"]),
        declare("edge.slow_end", "SlowEnd", together, engine_key=["model"]),
        declare("edge.slow_load", "SlowLoad", together),
        declare("edge.no_load", "NoLoad", together),
        declare("edge.serves", "Serves", Capability.SERVICE),
        declare("edge.settings", "Configured", settings=f"{__name__}:EdgeSettings"),
        declare("edge.inline", "Inline", place="inline"),
        declare("edge.inline_together", "InlineTogether", together, place="inline"),
        declare("edge.shrinks", "Shrinks", Capability.SHRINK),
    ]


class OddError(BaseException):
    """What test frameworks and structured concurrency raise: no Exception."""


class Edge(Executor):
    """Does what ``spec.do`` names."""

    def run(self, ctx: RunContext) -> Any:
        action: Callable[[RunContext], Any] = globals()[f"do_{ctx.spec.get('do', 'nothing')}"]
        answer = action(ctx)
        return answer if isinstance(answer, Outcome) else {"pid": os.getpid(), "told": answer}


def do_nothing(ctx: RunContext) -> None: ...


def do_begin(ctx: RunContext) -> None:
    """Leave a mark, then see whether the task is cancelled."""
    Path(ctx.spec["marker"]).write_text(f"begun, cancelled: {ctx.cancelled}")
    while not ctx.cancelled:
        time.sleep(0.01)


def do_sleep(ctx: RunContext) -> None:
    time.sleep(ctx.spec.get("s", 60))


def do_leave_child(ctx: RunContext) -> None:
    """Return while the task that it started runs on."""
    ctx.run_task(ctx.spec["child"])
    time.sleep(ctx.spec.get("s", 1.0))


def do_child(ctx: RunContext) -> Any:
    outcome = ctx.run_task(ctx.spec["child"]).result(30)
    time.sleep(ctx.spec.get("s", 0))
    return {"result": dict(outcome.result), "error": str(outcome.error)}


def do_tick(ctx: RunContext) -> None:
    """Grow a file for as long as it lives, until it is told to stop."""
    for _ in range(500):
        with Path(ctx.spec["marker"]).open("a") as file:
            file.write(".")
        time.sleep(0.02)
        if ctx.cancelled:
            return


def do_say(ctx: RunContext) -> None:
    print(ctx.spec["text"], file=sys.stderr, flush=True)


def do_ready(ctx: RunContext) -> None:
    ctx.ready({})
    print("said after ready", flush=True)


def do_exit(ctx: RunContext) -> None:
    os._exit(3)


def do_long_line(ctx: RunContext) -> None:
    print("Error: " + "x" * 285 + ctx.spec["text"], file=sys.stderr, flush=True)
    os._exit(3)


def do_log_number(ctx: RunContext) -> None:
    ctx.log(42)  # type: ignore[arg-type]
    time.sleep(0.5)


def do_log_level(ctx: RunContext) -> None:
    ctx.log("as logging has it", level=logging.INFO)  # type: ignore[arg-type]
    time.sleep(0.5)


def do_progress_object(ctx: RunContext) -> None:
    ctx.progress(0.5, Path("/somewhere"))  # type: ignore[arg-type]


def do_artifact_text(ctx: RunContext) -> Outcome:
    return Outcome(result={"pid": os.getpid()}, artifacts=["made.txt"])  # type: ignore[list-item]


def do_foreign_error(ctx: RunContext) -> Outcome:
    return Outcome(error=ValueError("not of the tree"))  # type: ignore[arg-type]


def do_list(ctx: RunContext) -> Outcome:
    return Outcome(result=["no", "mapping"])  # type: ignore[arg-type]


def do_surrogate(ctx: RunContext) -> None:
    raise ValueError("cannot read caf\udce9.txt")


def do_result_surrogate(ctx: RunContext) -> Any:
    return {"name": "caf\udce9", "nan": float("nan"), "inf": float("inf")}


def do_bytes(ctx: RunContext) -> None:
    os.write(1, b"\xff\xfe caf\xe9 \xc3")
    os.write(2, bytes(range(256)) * 100)


def do_fork(ctx: RunContext) -> None:
    os.fork()


def do_odd(ctx: RunContext) -> None:
    raise OddError("no Exception")


def do_replace_stdout(ctx: RunContext) -> None:
    class Stream:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None:
            raise RuntimeError("no flush here")

    sys.stdout = Stream()


def do_flood_progress(ctx: RunContext) -> None:
    for step in range(1_000_000):
        ctx.progress(step=step)


def do_flood_log(ctx: RunContext) -> None:
    while True:
        ctx.log("x" * 200)


def do_flood_output(ctx: RunContext) -> None:
    while True:
        os.write(1, b"y" * 65536)


def do_garbage(ctx: RunContext) -> None:
    os.write(3, b"\xff" * 100_000)
    time.sleep(60)


def do_close_control(ctx: RunContext) -> None:
    os.close(3)
    time.sleep(60)


def do_chdir(ctx: RunContext) -> str:
    here = str(Path.cwd())
    os.chdir("/")
    return here


def do_cwd(ctx: RunContext) -> str:
    time.sleep(ctx.spec.get("s", 0))
    Path("here.txt").write_text("x")
    return str(Path.cwd())


def do_oom(ctx: RunContext) -> None:
    raise RuntimeError("CUDA out of memory")


class Together(Executor):
    """Takes several tasks at once."""

    async def run(self, ctx: RunContext) -> Any:
        do = ctx.spec.get("do", "sleep")
        if do == "impatient":
            try:
                await asyncio.wait_for(_child(ctx), 0.3)
            except asyncio.TimeoutError:
                await asyncio.sleep(2)
            return {"pid": os.getpid()}
        if do == "gives_up":
            marker = Path(ctx.spec["child"]["marker"])
            child = asyncio.ensure_future(_child(ctx))
            while not marker.exists():
                await asyncio.sleep(0.02)
            child.cancel()
            await asyncio.sleep(0.5)
            size = marker.stat().st_size
            await asyncio.sleep(0.5)
            return {"before": size, "after": marker.stat().st_size}
        if do == "polite":
            while not ctx.cancelled:
                await asyncio.sleep(0.02)
            Path(ctx.spec["marker"]).write_text("stopped politely")
            return {"pid": os.getpid()}
        if do == "sleep":
            await asyncio.sleep(ctx.spec.get("s", 0.2))
            return {"pid": os.getpid()}
        answer = globals()[f"do_{do}"](ctx)
        return answer if isinstance(answer, Outcome) else {"told": answer}


async def _child(ctx: RunContext) -> Outcome:
    return await ctx.run_task(ctx.spec["child"])


class SlowLoad(Together):
    """Loads for a while."""

    def load(self, ctx: RunContext) -> None:
        time.sleep(3)


class SlowEnd(Together):
    """Takes its time to unload."""

    def unload(self) -> None:
        time.sleep(1)


class NoLoad(Together):
    """Cannot load, and needs a while to see that."""

    def load(self, ctx: RunContext) -> None:
        time.sleep(1)
        raise RuntimeError("no such weights")


class Serves(Executor):
    """Is up, then does what ``spec.then`` names."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        ctx.ready({"pid": os.getpid()}, ttl_s=ctx.spec.get("ttl_s"))
        if ctx.spec.get("then") == "fail":
            time.sleep(0.3)
            raise ValueError(f"the service broke {ctx.spec.get('text', '')}")
        if ctx.spec.get("then") == "crash":
            print(ctx.spec["text"], file=sys.stderr, flush=True)
            time.sleep(0.3)
            os._exit(9)
        if ctx.spec.get("then") == "child":
            told = ctx.run_task({"taskType": "echo", "m": 1}).result(10)
            Path(ctx.spec["marker"]).write_text("answered" if told.ok else str(told.error))
        while not ctx.cancelled:
            time.sleep(0.02)
        return {}


class EdgeSettings(BaseModel):
    """What the operator decides."""

    level: str = "unset"


class Configured(Executor):
    """Says what its settings are when it loads and when it runs."""

    loaded = ""

    def load(self, ctx: RunContext) -> None:
        self.loaded = getattr(ctx.settings, "level", "no settings")

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        return {"load": self.loaded, "run": ctx.settings.level}


class Inline(Executor):
    """Runs in the worker's process, in a thread."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        do = ctx.spec.get("do")
        if do == "stuck":
            GATE.wait(60)
        if do == "stop_iteration":
            next(iter(()))
        if do == "interrupt":
            raise KeyboardInterrupt
        if do == "odd":
            raise OddError("no Exception")
        return {}


class InlineTogether(Executor):
    """Runs on the worker's loop and gives up on a child task."""

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        try:
            await asyncio.wait_for(_child(ctx), 1.0)
        except asyncio.TimeoutError:
            return {"gave": "up"}
        return {}


class Shrinks(Executor):
    """Fails for want of memory, and marks each run."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        with Path(ctx.spec["marker"]).open("a") as file:
            file.write(f"{ctx.batch_scale} {ctx.cancelled}\n")
        if ctx.batch_scale == 1:
            time.sleep(ctx.spec["s"])
            raise RuntimeError("CUDA out of memory")
        time.sleep(30)
        return {}
