"""Executors that do on purpose what heavy libraries do by accident; a single-file plugin."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from pydantic import BaseModel, Field

from flowmesh_core import (
    Capability,
    CrashError,
    ExecutionError,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    hookimpl,
)

# Stands in the command line of everything that these executors start, so that tests find it.
MARK = "flowmesh-rough"


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

    return [
        declare("rough", "Rough", engine_key=["model"]),
        declare("rough.groups", "Groups", Capability.GROUP, group_key=["model", "inference"]),
        attrs.evolve(
            declare("rough.infers", "Groups", Capability.GROUP, group_key=["model", "inference"]),
            task_types={"inference"},
        ),
        declare("rough.fetches", "Rough", inputs={"checkpoint"}),
        declare("rough.settings", "Licensed", settings=f"{__name__}:Settings"),
        declare("rough.gpu", "Rough", Capability.GPU),
        declare("rough.together", "Together", Capability.CONCURRENT, engine_key=["model"]),
        declare("rough.shrinks", "Shrinks", Capability.SHRINK),
        declare("rough.serves", "Serves", Capability.SERVICE),
        declare("rough.loads", "FailsToLoad"),
        declare("rough.absent", "NotThere"),
        declare("rough.elsewhere", "Rough", place="staged", inputs={"rows", "checkpoint"}),
    ]


class Rough(Executor):
    """Does what ``spec.do`` names."""

    loads = 0

    def load(self, ctx: RunContext) -> None:
        type(self).loads += 1

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        action: Callable[[RunContext], Any] = globals()[f"do_{ctx.spec.get('do', 'nothing')}"]
        return {"pid": os.getpid(), "loads": self.loads, "told": action(ctx)}


def do_nothing(ctx: RunContext) -> None: ...


def do_fail(ctx: RunContext) -> None:
    raise ValueError("no good")


def do_exit(ctx: RunContext) -> None:
    print("going down", file=sys.stderr)
    os._exit(3)


def do_segfault(ctx: RunContext) -> None:
    ctypes.string_at(0)


def do_kill(ctx: RunContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_hold_gil(ctx: RunContext) -> None:
    ctypes.PyDLL(None).sleep(60)  # unlike CDLL, it keeps the interpreter's lock


def do_sleep(ctx: RunContext) -> None:
    ctx.progress(0.5, "sleeping")
    time.sleep(60)


def do_wait(ctx: RunContext) -> None:
    ctx.progress(0.5, "waiting")
    while True:
        ctx.check()
        time.sleep(0.01)


def do_shell(ctx: RunContext) -> None:
    ctx.progress(0.5, "in the shell")
    subprocess.run(["/bin/sh", "-c", f"sleep 60 && true {MARK}"], check=True)


def do_ignore_sigterm(ctx: RunContext) -> None:
    script = f"import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60) # {MARK}"
    with subprocess.Popen([sys.executable, "-c", script]):
        do_sleep(ctx)


def do_detach(ctx: RunContext) -> int:
    """Leave a grandchild in a session of its own, whose parent is gone."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            os.execv("/bin/sh", ["/bin/sh", "-c", f"sleep 60 && true {MARK}"])
        os._exit(0)
    os.wait()
    pid = int(os.read(reader, 32))
    if ctx.spec.get("then"):
        globals()[f"do_{ctx.spec['then']}"](ctx)
    return pid


def do_print(ctx: RunContext) -> None:
    sys.stdout.write("x" * ctx.spec["size"])
    os.write(2, b"to stderr\n")


def do_print_lines(ctx: RunContext) -> None:
    for number in range(ctx.spec["count"]):
        print(f"line {number:08} of a job that prints as fast as it can, eighty bytes in all...")


def do_close_stdout(ctx: RunContext) -> None:
    os.close(1)
    os.close(2)


def do_close_everything(ctx: RunContext) -> None:
    os.closerange(3, 64)


def do_eat(ctx: RunContext) -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (16 << 20))
        time.sleep(0.02)


def do_hold(ctx: RunContext) -> None:
    """Keep memory for as long as the process lives, as a loaded model does."""
    globals()["held"] = b"x" * ctx.spec["size"]


def do_look_around(ctx: RunContext) -> Any:
    """Say where everything lies, and leave a file even when it fails."""
    (ctx.folder / "made.txt").write_text(f"by attempt {ctx.attempt}")
    rows, checkpoint = ctx.inputs.rows, ctx.inputs.checkpoint
    if ctx.spec.get("fail"):
        raise ValueError("after writing")
    return {
        "folder": str(ctx.folder),
        "final": str(ctx.final_folder),
        "file": str(rows.path) if rows else None,
        "prompts": [row.prompt for row in rows or ()],
        "weights": (checkpoint / "weights").read_text() if checkpoint else None,
        "before": (ctx.previous / "made.txt").read_text() if ctx.previous else None,
    }


def do_lose_engine(ctx: RunContext) -> None:
    """Say that what this process had started has died."""
    raise CrashError("the engine has died", exit_code=9)


def do_cuda_oom(ctx: RunContext) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def do_read_stdin(ctx: RunContext) -> str:
    return sys.stdin.read()


def do_environment(ctx: RunContext) -> dict[str, str]:
    return dict(os.environ)


def do_write(ctx: RunContext) -> None:
    (ctx.folder / "made.txt").write_text(f"by attempt {ctx.attempt}")


def do_write_after_stop(ctx: RunContext) -> None:
    """Go on writing whatever is said, as a thread that nobody can stop does."""
    ctx.progress(0.1)
    for number in range(3000):
        (ctx.folder / f"late-{number}").write_text("late")
        time.sleep(0.02)


def do_child(ctx: RunContext) -> Any:
    outcome = ctx.run_task(ctx.spec["child"]).result(30)
    error = str(outcome.error) if outcome.error else None
    return {"result": dict(outcome.result), "error": error, "folder": str(outcome.folder)}


def do_huge(ctx: RunContext) -> Any:
    return {"text": "y" * ctx.spec["size"], "asked": len(ctx.spec.get("text", ""))}


def do_not_json(ctx: RunContext) -> Any:
    return {"path": Path("/tmp")}


def do_report(ctx: RunContext) -> None:
    for step in range(1, 101):
        ctx.progress(step=step, total=100, loss=1 / step)


def do_devices(ctx: RunContext) -> Any:
    time.sleep(ctx.spec.get("pause_s", 0))
    return {"devices": ctx.devices, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}


class Together(Executor):
    """Takes several tasks at once."""

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        if ctx.spec.get("crash"):
            await asyncio.sleep(0.3)
            os._exit(7)
        if ctx.spec.get("deaf"):
            time.sleep(60)
        if ctx.spec.get("lose_engine"):
            await asyncio.sleep(ctx.spec["lose_engine"])
            raise CrashError("the engine has died")
        print(f"from {ctx.task_id}")
        await asyncio.sleep(ctx.spec.get("s", 0.2))
        return {"pid": os.getpid()}


class Shrinks(Executor):
    """Needs half the batch."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        if ctx.batch_scale > ctx.spec.get("fits", 0.5):
            raise RuntimeError("CUDA out of memory")
        return {"scale": ctx.batch_scale, "pid": os.getpid()}


class Serves(Executor):
    """Is up until it is told to stop."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        marker = Path(ctx.spec["marker"])
        marker.write_text("up")
        ctx.ready({"pid": os.getpid()}, ttl_s=ctx.spec.get("ttl_s"))
        while not ctx.cancelled:
            time.sleep(0.02)
            if ctx.spec.get("crash"):
                os._exit(9)
        marker.write_text("down")
        return {}


class FailsToLoad(Executor):
    """Prints, then cannot load."""

    def load(self, ctx: RunContext) -> None:
        print("loading")
        raise RuntimeError("no such weights")

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        return {}


class Groups(Executor):
    """Takes tasks together; ``spec.do`` says what one of them does."""

    runs = 0

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        type(self).runs += 1
        names = [ctx.task_id for ctx in ctxs]
        for ctx in sorted(ctxs, key=lambda ctx: ctx.spec.get("s", 0)):
            time.sleep(ctx.spec.get("s", 0))
            do = ctx.spec.get("do")
            if do == "fail":
                yield ctx.task_id, Outcome(error=ExecutionError("this one alone"))
            elif do == "lose_engine":
                yield ctx.task_id, Outcome(error=CrashError("the engine has died"))
            elif do == "raise":
                raise ValueError("everybody who waits")
            elif do == "die":
                os._exit(5)
            elif do == "forget":
                continue
            elif do == "shrink" and ctx.batch_scale == 1.0:
                raise RuntimeError("CUDA out of memory")
            elif do == "wait":
                while not ctx.cancelled:
                    time.sleep(0.01)
            else:
                (ctx.folder / "made.txt").write_text(ctx.task_id)
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                told = {"data": ctx.spec.get("data"), "with": names, "run": self.runs}
                yield ctx.task_id, {**told, "scale": ctx.batch_scale, "usage": usage}


class Settings(BaseModel):
    """One under its own name, one under another's."""

    level: str = "low"
    licence: str = Field(default="demo", alias="ACME_LICENCE")


class Licensed(Executor):
    """Says what the operator decided."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        return {"level": self.settings.level, "licence": ctx.settings.licence}
