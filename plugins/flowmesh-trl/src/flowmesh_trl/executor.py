"""Trains one model per task: in this process, or in several that it starts and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import Artifact, Executor, InputError, Inputs, Outcome, RunContext
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.launch import launch, plan_processes
from flowmesh_trl.resume import adopt, find_checkpoint, fingerprint, mark

__all__ = ["TrlExecutor"]


class TrlExecutor(Executor):
    """Serves every task type of TRL; keeps the libraries loaded from task to task, no model."""

    def run(self, ctx: RunContext) -> Outcome:
        """Train, from the latest whole checkpoint if an earlier attempt left one.

        Raises:
            FlowmeshError: See ``training.train`` and ``launch.launch``.
        """
        training = ctx.spec.training
        use_cpu = not ctx.devices
        plan = plan_processes(training.model_dump(), ctx.devices, use_cpu=use_cpu)
        job = TrainingJob(
            task_id=ctx.task_id,
            task_type=ctx.task_type,
            spec=ctx.spec.model_dump(exclude_unset=True),
            inputs=_inputs(ctx),
            folder=ctx.folder,
            resume=_resume(ctx),
            batch_scale=ctx.batch_scale,
            use_cpu=use_cpu,
        )
        link = Link(report=ctx.progress, say=ctx.log, must_stop=lambda: _must_stop(ctx))
        if plan.in_process:
            from flowmesh_trl.training import train

            summary = train(job, link)
        else:
            summary = launch(job, link, processes=plan.processes, devices=plan.devices)
        final = [name for name in ("final_model", "final_lora") if (ctx.folder / name).is_dir()]
        return Outcome(
            result={**summary, **_places(ctx)},
            artifacts=[Artifact(name, archive=True) for name in final],
        )


def _inputs(ctx: RunContext) -> Inputs:
    """Return the inputs, ``resume_from_path`` taken for the checkpoint that it names."""
    named = ctx.spec.training.resume_from_path
    if named is None:
        return ctx.inputs
    path = Path(named)
    if not path.exists():
        raise InputError(
            f"task {ctx.task_id}: spec.training.resume_from_path: {named!r} does not exist on this"
            " worker; checkpoint.load also takes a URL or an earlier task"
        )
    return attrs.evolve(ctx.inputs, checkpoint=path)


def _resume(ctx: RunContext) -> Path | None:
    """Return the checkpoint to go on from, brought into this attempt's folder."""
    key = fingerprint(ctx.raw_spec)
    found = find_checkpoint(ctx.previous, key)
    if found is None:
        mark(ctx.folder, key)
        return None
    ctx.log(f"going on from {found.name} of attempt {ctx.attempt - 1}")
    return adopt(found, ctx.folder)


def _must_stop(ctx: RunContext) -> bool:
    return ctx.cancelled or ctx.remaining_s == 0.0


def _places(ctx: RunContext) -> dict[str, Any]:
    """Return where the files will lie, as the contract names it."""
    return {
        "output_dir": str(ctx.final_folder),
        "checkpoints_dir": str(ctx.final_folder / "checkpoints"),
    }
