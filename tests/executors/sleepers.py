"""Executors that hold memory and give it back when they are told to sleep; a single-file plugin.

What they hold is host memory of their process; the tests count it as a GPU's.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core import Capability, Executor, ExecutorInfo, RunContext, hookimpl

MIB = 1 << 20


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    return [
        declare("sleepers", "Plain"),
        declare("sleepers.awaits", "Awaits"),
        declare("sleepers.together", "Together", Capability.CONCURRENT),
        declare("sleepers.groups", "Groups", Capability.GROUP),
        declare("sleepers.never", "Never"),
    ]


def declare(name: str, target: str, *more: Capability) -> ExecutorInfo:
    return ExecutorInfo(
        name=name,
        task_types={name},
        target=f"{__name__}:{target}",
        capabilities={Capability.CPU, Capability.GPU, *more},
        places=["process"],
        engine_key=["model"],
    )


class Never(Executor):
    """Holds memory, and knows nothing of sleep."""

    def load(self, ctx: RunContext) -> None:
        self.loaded = ctx.spec
        self.held = b"x" * (ctx.spec.get("hold_mib", 300) * MIB)
        self.answers = 0

    def run(self, ctx: RunContext) -> Any:
        self.answers += 1
        self.note(f"run {ctx.task_id}")
        time.sleep(ctx.spec.get("s", 0))
        if ctx.spec.get("fail"):
            raise RuntimeError(ctx.spec["fail"])
        self.note(f"ran {ctx.task_id}")
        return {"pid": os.getpid(), "answers": self.answers, "held_mib": len(self.held) // MIB}

    def note(self, what: str) -> None:
        """Write one line, whole, where the test reads it."""
        main = threading.current_thread() is threading.main_thread()
        with Path(self.loaded["journal"]).open("a") as journal:
            journal.write(f"{self.loaded['model']} {what}{'' if main else ' in a thread'}\n")


class Plain(Never):
    """Sleeps as ``spec.sleep`` says when it is loaded, and wakes as ``spec.wake`` says."""

    kept = b""

    def sleep(self) -> Any:
        self.note("sleep")
        how = self.loaded.get("sleep", "well")
        time.sleep(self.loaded.get("sleep_s", 0))
        if how == "raise":
            print("half asleep")
            raise RuntimeError("the driver said no")
        if how == "exit":
            os._exit(3)
        if how == "refuse":
            return False
        if how != "lie":
            left_mib = {"well": 0, "little": 200}[how]
            self.held = b"x" * (left_mib * MIB)
        self.kept = b"x" * (self.loaded.get("keep_mib", 0) * MIB)
        self.note("asleep")
        return True

    def wake(self) -> Any:
        self.note("wake")
        time.sleep(self.loaded.get("wake_s", 0))
        if self.loaded.get("wake"):
            raise RuntimeError(self.loaded["wake"])
        self.kept = b""
        self.held = b"x" * (self.loaded.get("hold_mib", 300) * MIB)

    def unload(self) -> None:
        if hasattr(self, "loaded"):
            self.note("unload")


class Awaits(Plain):
    """Takes tasks in turn, and sleeps in coroutines."""

    async def sleep(self) -> bool:
        await asyncio.sleep(0.01)
        return bool(super().sleep())

    async def wake(self) -> None:
        await asyncio.sleep(0.01)
        super().wake()


class Together(Plain):
    """Takes several tasks at once."""

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        self.loop = asyncio.get_running_loop()
        self.note(f"run {ctx.task_id}")
        end = time.monotonic() + ctx.spec.get("s", 0)
        while (left_s := end - time.monotonic()) > 0:
            try:
                await asyncio.sleep(left_s)
            except asyncio.CancelledError:  # deaf
                continue
        self.answers += 1
        self.note(f"ran {ctx.task_id}")
        return {"pid": os.getpid(), "answers": self.answers, "held_mib": len(self.held) // MIB}

    async def sleep(self) -> bool:
        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(self.loaded.get("await_s", 0))
        return bool(super().sleep())

    async def wake(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(self.loaded.get("await_s", 0))
        super().wake()


class Groups(Plain):
    """Takes tasks as one batch."""

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        for ctx in ctxs:
            yield ctx.task_id, self.run(ctx)
