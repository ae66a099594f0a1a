"""Executors that do everything right, for others to break in one way each; single-file plugin."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flowmesh_core import (
    CancelledError,
    Capability,
    Executor,
    ExecutorInfo,
    InputError,
    Outcome,
    RunContext,
    StrictBlock,
    TaskSpec,
    hookimpl,
)

EXAMPLE = {"data": {"type": "list", "items": ["hello", "world"]}}
VERSE = {"text": "hello"}


class Voice(StrictBlock):
    pitch: int = 0


class ShoutSpec(TaskSpec):
    voice: Voice = Voice()
    steps: int = 2


class VerseSpec(TaskSpec):
    text: str
    steps: int = 2


class Item(BaseModel):
    index: int
    output: str


class ShoutResult(BaseModel):
    ok: bool
    items: list[Item]


def declare(name: str, *more: Capability, place: str = "process", **fields: Any) -> ExecutorInfo:
    known: dict[str, Any] = {
        "name": name,
        "task_types": {name},
        "capabilities": {Capability.CPU, *more},
        "places": [place],
        "spec": "flowmesh_plugin_sound:ShoutSpec",
        "result": "flowmesh_plugin_sound:ShoutResult",
        "example": "flowmesh_plugin_sound:EXAMPLE",
        "inputs": {"rows"},
        "engine_key": ["engine"],
        "group_key": ["voice"],
    }
    return ExecutorInfo(**{**known, **fields})


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    every = (Capability.GROUP, Capability.BATCH_INVARIANT, Capability.SHRINK)
    return [
        declare("sound", *every, target=f"{__name__}:Sound"),
        declare("sound.inline", place="inline", target=f"{__name__}:Sound"),
        declare("sound.together", Capability.CONCURRENT, target=f"{__name__}:Together"),
        declare("sound.absent", needs=["acme_no_engine"], target=f"{__name__}:Sound"),
        declare("sound.pooled", target=f"{__name__}:Pooled"),
        declare("sound.splits", result="", target=f"{__name__}:Splits"),
        declare("sound.flat", target=f"{__name__}:Flat"),
        declare("sound.keeps", Capability.SHRINK, target=f"{__name__}:Keeps"),
        declare("sound.draws", Capability.SHRINK, target=f"{__name__}:Draws"),
        declare("sound.serves", Capability.SERVICE, target=f"{__name__}:Serves"),
        declare(
            "sound.chorus",
            Capability.GROUP,
            target=f"{__name__}:Chorus",
            spec=f"{__name__}:VerseSpec",
            example=f"{__name__}:VERSE",
            inputs=(),
        ),
    ]


class Sound(Executor):
    """Shouts; stops when it is asked, knows what it cannot do, leaves nothing behind."""

    def run(self, ctx: RunContext) -> Any:
        for step in range(ctx.spec.steps):
            ctx.check()
            if ctx.spec.steps > 2:
                time.sleep(0.01)
            ctx.progress(step=step + 1, total=ctx.spec.steps)
        return self.answer(ctx)

    def answer(self, ctx: RunContext) -> Any:
        # What libraries do, and nobody minds.
        multiprocessing.get_start_method()
        Path("~/.config/shout").expanduser().mkdir(parents=True, exist_ok=True)
        (ctx.folder / "said.txt").write_text("done")
        return {"ok": True, "items": self.items(ctx)}

    def items(self, ctx: RunContext) -> list[Mapping[str, Any]]:
        prompts = [str(row.prompt) for row in ctx.inputs.rows or ()]
        if "bad" in prompts:
            raise InputError("row 'bad' must be good")
        return [{"index": n, "output": text.upper()} for n, text in enumerate(prompts)]

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        for ctx in ctxs:
            try:
                yield ctx.task_id, self.run(ctx)
            except InputError as exc:
                yield ctx.task_id, Outcome(error=exc)


class Together(Sound):
    async def run(self, ctx: RunContext) -> Any:
        for _ in range(ctx.spec.steps):
            await self.pause(0.01)
        return self.answer(ctx)

    async def pause(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)


class Pooled(Sound):
    """Keeps a pool whose threads begin as they are needed, and a cache below its home."""

    def load(self, ctx: RunContext) -> None:
        self.pool, self.wanted = ThreadPoolExecutor(5), 0
        cache = Path("~/.cache/shout").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "voices.txt").write_text("alto")

    def items(self, ctx: RunContext) -> list[Mapping[str, Any]]:
        self.wanted = min(self.wanted + 1, 5)
        together = threading.Barrier(self.wanted)
        wait([self.pool.submit(together.wait) for _ in range(self.wanted)])
        return super().items(ctx)

    def unload(self) -> None:
        self.pool.shutdown()


class Splits(Sound):
    """Answers with pieces, of which there are as many as it happens; tells once what it loaded."""

    loaded: tuple[str, ...] = ("voices",)

    def answer(self, ctx: RunContext) -> Any:
        loaded, self.loaded = self.loaded, ()
        answer = super().answer(ctx)
        pieces = [part for item in answer["items"] for part in item["output"][:40]]
        return {**answer, "items": pieces, "loaded": loaded, "tries": [0] * random.randint(1, 9)}


class Flat(Sound):
    """Answers with pieces of a thousand letters, of which most rows have one."""

    def items(self, ctx: RunContext) -> list[Mapping[str, Any]]:
        texts = [item["output"] for item in super().items(ctx)]
        pieces = [text[at : at + 1000] for text in texts for at in range(0, len(text) or 1, 1000)]
        return [{"index": n, "output": piece} for n, piece in enumerate(pieces)]


class Keeps(Sound):
    """Knows what it has met before, and loads a library as torch is one."""

    def load(self, ctx: RunContext) -> None:
        self.met: set[str] = set()
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/inductor"
        Path(cache).mkdir(parents=True, exist_ok=True)

    def items(self, ctx: RunContext) -> list[Mapping[str, Any]]:
        items = super().items(ctx)
        new = {item["output"] for item in items} - self.met
        self.met |= new
        return [{**item, "output": str(item["output"] in new)} for item in items]


class Draws(Sound):
    """Answers by chance, of which nobody can tell whether it depends on the batch."""

    def items(self, ctx: RunContext) -> list[Mapping[str, Any]]:
        return [{**item, "output": str(random.random())} for item in super().items(ctx)]


class Chorus(Executor):
    """Reads no rows, and has no other way for one task than for several."""

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        for ctx in ctxs:
            with contextlib.suppress(CancelledError):
                yield ctx.task_id, self.sing(ctx)

    def sing(self, ctx: RunContext) -> Any:
        if ctx.spec.text == "bad":
            return Outcome(error=InputError("spec.text must be good"))
        for _ in range(ctx.spec.steps):
            ctx.check()
            time.sleep(0.01)
        return {"ok": True, "items": [{"index": 0, "output": ctx.spec.text.upper()}]}


class Serves(Sound):
    def run(self, ctx: RunContext) -> Any:
        self.announce(ctx, self.answer(ctx))
        while not ctx.cancelled:
            time.sleep(0.01)
        return {"ok": True, "items": []}

    def announce(self, ctx: RunContext, result: Any) -> None:
        ctx.ready(result)
