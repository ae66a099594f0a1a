"""Trains nothing, and behaves as if it did: time, memory, files, progress and failures."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import Artifact, ExecutionError, Executor, Outcome, RunContext
from flowmesh_sim.profiles import Epoch, measure, measure_seconds
from flowmesh_sim.spec import FailureBlock, SimulateBlock

__all__ = ["SimulatedTraining"]

_CHECKPOINT = Path("checkpoints", "checkpoint.json")
_MB = 1_000_000
_LOOK_S = 0.05
_FOR_EVER_S = 1e9


class SimulatedTraining(Executor):
    """``simulate``, as a coroutine, so that many tasks may share a process."""

    async def run(self, ctx: RunContext) -> Outcome:
        """Go through all epochs; the result is a ``SimulateResult``."""
        started_s = ctx.clock()
        sim: SimulateBlock = ctx.spec.simulate
        failure = sim.failure if sim.failure and _is_due(sim.failure, ctx) else None
        memory = bytearray(int(sim.memory_mb * _MB))  # zeros that are written, so really taken
        curve = partial(measure, sim.profile, sim.model_type, sim.seed)
        done = _resume(ctx, sim)
        history = [curve(epoch) for epoch in range(done)]
        ctx.progress(step=done * sim.steps_per_epoch, total=sim.epochs * sim.steps_per_epoch)
        for epoch in range(done, sim.epochs):
            if failure and epoch == failure.at_epoch:
                await _fail(ctx, failure, sim.time_scale)
            history.append(curve(epoch))
            await _train(ctx, sim, history[-1])
            if sim.checkpoint_every and (epoch + 1) % sim.checkpoint_every == 0:
                _save_checkpoint(ctx, sim, epoch + 1)
        artifacts = await _write_weights(ctx, sim)
        del memory  # it was held until here
        result = _summarize(sim, history, ctx.clock() - started_s)
        result["resume_from_path"] = (
            str(ctx.previous / _CHECKPOINT) if ctx.previous and done else None
        )
        return Outcome(result=result, artifacts=artifacts)


async def _train(ctx: RunContext, sim: SimulateBlock, now: Epoch) -> None:
    """Let the time of one epoch pass, and report each of its steps."""
    seconds = measure_seconds(sim.profile, now.epoch, sim.epochs, sim.seed, sim.epoch_seconds)
    total, before = sim.epochs * sim.steps_per_epoch, now.epoch * sim.steps_per_epoch
    for step in range(1, sim.steps_per_epoch + 1):
        await _wait(ctx, seconds * sim.time_scale / sim.steps_per_epoch)
        ctx.progress(step=before + step, total=total, **attrs.asdict(now))
    ctx.log(f"epoch {now.epoch}: loss {now.loss:g}, accuracy {now.accuracy:g}")


async def _wait(ctx: RunContext, seconds: float) -> None:
    """Let time pass; a cancel or the deadline ends it at once."""
    until_s = ctx.clock() + seconds
    while (left_s := until_s - ctx.clock()) > 0:
        ctx.check()
        await asyncio.sleep(min(left_s, _LOOK_S))
    ctx.check()
    await asyncio.sleep(0)  # tasks beside it have their turn, however fast this one is


def _summarize(sim: SimulateBlock, history: Sequence[Epoch], seconds: float) -> dict[str, Any]:
    return {
        "training_successful": True,
        "training_time_seconds": round(seconds, 3),
        "model_name": f"{sim.profile}/{sim.model_type}",
        "seed": sim.seed,
        "steps": sim.epochs * sim.steps_per_epoch,
        "epochs": sim.epochs,
        "train_loss": round(sum(one.loss for one in history) / len(history), 6),
        "metrics": {"loss": history[-1].loss, "accuracy": history[-1].accuracy},
        "history": [attrs.asdict(one) for one in history],
    }


async def _write_weights(ctx: RunContext, sim: SimulateBlock) -> list[Artifact]:
    """Write ``final_model`` in the size asked for: the same bytes for the same seed."""
    left = int(sim.artifact_mb * _MB)
    if not left:
        return []
    block = random.Random(sim.seed).randbytes(_MB)  # noqa: S311 - to be hard to compress
    folder = ctx.folder / "final_model"
    folder.mkdir()
    with (folder / "weights.bin").open("wb") as file:
        while left:
            await _wait(ctx, 0)
            left -= file.write(block[:left])
    return [Artifact("final_model", archive=True)]


def _save_checkpoint(ctx: RunContext, sim: SimulateBlock, done: int) -> None:
    path = ctx.folder / _CHECKPOINT
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"done": done, **_identify(sim)}), encoding="utf-8")
    unfinished.replace(path)  # whole or not at all, whenever the process is killed


def _resume(ctx: RunContext, sim: SimulateBlock) -> int:
    """Return how many epochs an earlier attempt saved, and save them for a later one too."""
    path = ctx.previous and ctx.previous / _CHECKPOINT
    if not path or not path.is_file():
        return 0
    saved = json.loads(path.read_text(encoding="utf-8"))
    done: int = saved.pop("done")
    if saved != _identify(sim):
        ctx.log(f"{path} is of another training; begun anew", level="warning")
        return 0
    _save_checkpoint(ctx, sim, done)
    ctx.log(f"going on after {done} epochs with {path}")
    return done


def _identify(sim: SimulateBlock) -> dict[str, Any]:
    """Return what must be the same for a training to go on."""
    return sim.model_dump(include={"profile", "model_type", "seed", "epochs", "steps_per_epoch"})


def _is_due(failure: FailureBlock, ctx: RunContext) -> bool:
    if failure.attempts is not None and ctx.attempt > failure.attempts:
        return False
    chance = random.Random(f"{failure.seed}:{ctx.task_id}:{ctx.attempt}")  # noqa: S311 - reproducible
    return chance.random() < failure.probability


async def _fail(ctx: RunContext, failure: FailureBlock, time_scale: float) -> None:
    """Let happen what the document asks for; only ``late`` comes back."""
    told = f"{failure.kind} on demand before epoch {failure.at_epoch}"
    ctx.log(told, level="warning")
    match failure.kind:
        case "error":
            raise ExecutionError(told, retriable=failure.retriable)
        case "out_of_memory":
            raise MemoryError(told)
        case "crash":
            os.kill(os.getpid(), signal.Signals[failure.signal])
        case "exit":
            os._exit(failure.code)
        case "hang" if failure.deaf:
            time.sleep(_FOR_EVER_S)  # it blocks, as what does not listen does
        case "hang":
            await _wait(ctx, _FOR_EVER_S)
        case "late":
            await _wait(ctx, failure.late_s * time_scale)
