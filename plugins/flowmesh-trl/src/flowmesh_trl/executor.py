"""Trains one model per task: in this process, or in several that it starts and ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import (
    Artifact,
    ContractError,
    Executor,
    InputError,
    Inputs,
    Outcome,
    RunContext,
)
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.launch import launch
from flowmesh_trl.plan import auto_deepspeed, plan_processes
from flowmesh_trl.resume import (
    adopt,
    discard_checkpoints,
    find_checkpoint,
    fingerprint,
    mark,
    read_batch,
)

__all__ = ["TrlExecutor"]

_FILES = ("resume_from_path", "deepspeed", "fsdp_config", "accelerate_config")


class TrlExecutor(Executor):
    """Serves every task type of TRL; keeps the libraries loaded from task to task, no model."""

    def load(self, ctx: RunContext) -> None:
        """Import what trains in this process: that changes the warnings of all its tasks."""
        devices, training = ctx.devices, ctx.spec.training.model_dump()
        with contextlib.suppress(ContractError):  # the task's own fault, which ``run`` tells
            if plan_processes(training, devices, use_cpu=not devices).in_process:
                from flowmesh_trl.training import import_trainer

                import_trainer(ctx.task_type)

    def run(self, ctx: RunContext) -> Outcome:
        """Train, from the latest whole checkpoint if an earlier attempt left one.

        Raises:
            FlowmeshError: See ``training.train`` and ``launch.launch``.
        """
        _check_paths(ctx)
        use_cpu = not ctx.devices
        training = ctx.spec.training.model_dump()
        plan = plan_processes(training, ctx.devices, use_cpu=use_cpu)
        spec = ctx.spec.model_dump(exclude_unset=True)
        if sharing := auto_deepspeed(ctx.task_type, training, plan):
            spec.setdefault("training", {})["deepspeed"] = sharing
        resume, spec = _resume(ctx, spec, plan.processes)
        job = TrainingJob(
            task_id=ctx.task_id,
            task_type=ctx.task_type,
            spec=spec,
            inputs=_inputs(ctx),
            folder=ctx.folder,
            resume=resume,
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


def _check_paths(ctx: RunContext) -> None:
    """Refuse relative paths: they would count from this process's own working folder.

    Raises:
        InputError: It names all of them.
    """
    given = {name: getattr(ctx.spec.training, name) for name in _FILES}
    relative = [
        f"spec.training.{name} must be an absolute path on the worker"
        f"{'' if name == 'resume_from_path' else ', or an object'}, got {value!r}"
        for name, value in given.items()
        if isinstance(value, str) and not value.startswith(("/", "{"))  # or JSON
    ]
    if relative:
        raise InputError(f"task {ctx.task_id}: {'; '.join(relative)}")


def _resume(
    ctx: RunContext, spec: dict[str, Any], processes: int
) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint to go on from, in this attempt's folder, and the spec to do it with."""
    key = fingerprint(ctx.raw_spec)
    training = ctx.spec.training
    rows = training.batch_size * processes
    batch = rows * training.gradient_accumulation_steps
    found = find_checkpoint(_attempts(ctx), key)
    if found is not None:
        before = read_batch(found)
        changed = _with_batch(spec, before, rows) if before != batch else spec
        unfit = _unfit(ctx, found, changed, same_processes=before == batch)
        if not unfit:
            ctx.log(f"going on from {found.name} of {found.parents[1].name}")
            adopted = adopt(found, ctx.folder)
            mark(ctx.folder, key, batch=before)
            return adopted, changed
        ctx.log(f"beginning anew instead of going on from {found.name}: {unfit}")
    discard_checkpoints(ctx.folder)
    mark(ctx.folder, key, batch=batch)
    return None, spec


def _attempts(ctx: RunContext) -> list[Path]:
    """Return where checkpoints may lie: here, if memory ran out before; then latest first."""
    stem = ctx.folder.name.removesuffix(str(ctx.attempt))
    older = [ctx.folder.with_name(f"{stem}{number}") for number in range(ctx.attempt - 1, 0, -1)]
    previous = [] if ctx.previous is None else [ctx.previous]
    return list(dict.fromkeys([ctx.folder, *previous, *older]))


def _with_batch(spec: dict[str, Any], batch: int, rows: int) -> dict[str, Any]:
    """Return the spec with the accumulation that makes a batch of ``rows`` at a time.

    It is 0, which no spec allows, where none does.
    """
    accumulation = 0 if batch % rows else batch // rows
    training = {**spec.get("training", {}), "gradient_accumulation_steps": accumulation}
    return {**spec, "training": training}


def _unfit(ctx: RunContext, checkpoint: Path, spec: dict[str, Any], *, same_processes: bool) -> str:
    """Say why a checkpoint cannot be gone on with; empty when it can."""
    sharded = (checkpoint / "latest").is_file()
    training = spec.get("training", {})
    if not training.get("accelerate_config") and sharded != bool(training.get("deepspeed")):
        return "only one of the two shares the work through DeepSpeed"
    if sharded and not same_processes:
        return "DeepSpeed needs as many processes as before"
    try:
        type(ctx.spec).model_validate(spec)
    except ValueError:  # pydantic's is one
        return "its batch cannot be shared out over the processes of this attempt"
    return ""


def _must_stop(ctx: RunContext) -> bool:
    return ctx.cancelled or ctx.remaining_s == 0.0


def _places(ctx: RunContext) -> dict[str, Any]:
    """Return where the files will lie, as the contract names it."""
    return {
        "output_dir": str(ctx.final_folder),
        "checkpoints_dir": str(ctx.final_folder / "checkpoints"),
    }
