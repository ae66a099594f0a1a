"""The executor that ``PlaceSuite`` lets a place run; imported wherever that runs it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flowmesh_core.errors import InputError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, Outcome, RunContext

__all__ = ["INFO", "STEPS", "Probe"]

STEPS = 50
# A thread of a place that fails its checks must not live for ever.
_LONGEST_S = 60.0
INFO = ExecutorInfo(
    name="kit.probe",
    task_types={"kit.probe"},
    target=f"{__name__}:Probe",
    capabilities={Capability.CPU, Capability.GROUP},
    engine_key=["engine"],
    group_key=["engine"],
)


class Probe(Executor):
    """Does what its task says under ``do``.

    Attributes:
        living: How many engines are loaded in this process.
    """

    living: ClassVar[int] = 0
    loaded = False

    def load(self, ctx: RunContext) -> None:
        """Take the engine that the task names."""
        self.key = ctx.raw_spec["engine"]
        self.served = 0
        self.loaded = True
        Probe.living += 1

    def unload(self) -> None:
        """Give it back, once."""
        Probe.living -= self.loaded
        self.loaded = False

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Leave a file, then do it."""
        (ctx.folder / "made.txt").write_text(f"by {ctx.task_id}")
        self.served += 1
        answer: Mapping[str, Any] = getattr(self, f"_{ctx.raw_spec['do']}")(ctx)
        return {"task_id": ctx.task_id, **answer}

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        """One after the other, each for itself."""
        for ctx in ctxs:
            try:
                yield ctx.task_id, self.run(ctx)
            except InputError as exc:
                yield ctx.task_id, Outcome(error=exc)

    def _tell(self, ctx: RunContext) -> Mapping[str, Any]:
        return {
            "engine": self.key,
            "served": self.served,
            "read": [Path(path).read_text("utf-8") for path in ctx.raw_spec["reads"]],
            "attempt": ctx.attempt,
            "metadata": dict(ctx.metadata),
            "devices": list(ctx.devices),
            "raw_spec": dict(ctx.raw_spec),
            "remaining_s": ctx.remaining_s,
        }

    def _report(self, ctx: RunContext) -> Mapping[str, Any]:
        for step in range(1, STEPS + 1):
            ctx.progress(step=step, total=STEPS)
            ctx.log(f"line {step} 漢字", level="warning")
        return {}

    def _refuse(self, _ctx: RunContext) -> Mapping[str, Any]:
        raise InputError("the kit's input", retriable=True)

    def _blunder(self, _ctx: RunContext) -> Mapping[str, Any]:
        raise ValueError("the kit's mistake")

    def _wait(self, ctx: RunContext) -> Mapping[str, Any]:
        until = self._say_where(ctx)
        while not ctx.cancelled and time.monotonic() < until:
            time.sleep(0.01)
        return {"stopped": ctx.cancelled}

    def _ignore(self, ctx: RunContext) -> Mapping[str, Any]:
        until = self._say_where(ctx)
        while time.monotonic() < until:
            time.sleep(0.01)
        return {}

    def _say_where(self, ctx: RunContext) -> float:
        """Return how long it may take at most."""
        ctx.progress(message="waiting", pid=os.getpid(), host=socket.gethostname())
        return time.monotonic() + _LONGEST_S
