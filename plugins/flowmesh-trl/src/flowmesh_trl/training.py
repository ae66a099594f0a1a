"""The way of one training: data, model, trainer, steps, final model, numbers."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import attrs
import datasets
import torch
from pydantic import ValidationError
from torch import distributed
from transformers import PrinterCallback
from transformers.utils import logging as library_logging

from flowmesh_core import (
    ContractError,
    CrashError,
    ExecutionError,
    ExecutorUnavailableError,
    InputError,
)
from flowmesh_trl.arguments import build_arguments
from flowmesh_trl.callbacks import AlreadyDone, Reporter, StopAtStepEnd
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.parts import Parts, gather_parts, widen_trained
from flowmesh_trl.plot import draw_loss
from flowmesh_trl.resume import latest_whole
from flowmesh_trl.saving import mean_loss, save_final, trained_model, write_card, write_metrics
from flowmesh_trl.spec import SPECS

__all__ = ["import_trainer", "train"]

_MODULES = {"lora_sft": "sft"}


def import_trainer(task_type: str) -> Any:
    """Return the module that builds a task type's trainer; TRL imports each on first use."""
    return importlib.import_module(f"flowmesh_trl.{_MODULES.get(task_type, task_type)}")


def train(job: TrainingJob, link: Link) -> dict[str, Any]:
    """Train, and leave the final model, ``training_metrics.json`` and a plot in the job's folder.

    One of several ranks when torchrun's variables say so: all compute, the first one writes. Where
    memory runs out in a training of one process, it goes on with half the micro batch.

    Returns:
        The task's result, but for where its files will lie; the same in every rank.

    Raises:
        InputError: Data, model or checkpoint cannot be used, or there are too few rows.
        ContractError: TRL refuses what the document asks for.
        ExecutorUnavailableError: Something is missing here.
        CancelledError: ``link`` asked to stop; the checkpoint is in place.
        ExecutionError: The training went astray.
        CrashError: Memory ran out even with the smallest micro batch.
    """
    library_logging.disable_progress_bar()  # they would fill the task's log
    datasets.disable_progress_bars()
    spec = _validate(job)
    while True:
        try:
            return _run(job, spec, link)
        except (RuntimeError, MemoryError) as exc:
            shortage = _shortage(exc)
            if not shortage:
                raise
        # Outside of the handler: its traceback holds the model that is to be freed.
        _free()
        job = _smaller(job, spec, shortage, link)


def _validate(job: TrainingJob) -> Any:
    try:
        return SPECS[job.task_type].model_validate(dict(job.spec))
    except ValidationError as exc:
        problems = [
            f"spec.{'.'.join(map(str, error['loc']))}: {error['msg']}"
            for error in exc.errors(include_url=False, include_input=False)
        ]
        raise ContractError(problems, where=f"task {job.task_id}") from exc


def _run(job: TrainingJob, spec: Any, link: Link) -> dict[str, Any]:
    begun = time.monotonic()
    arguments = build_arguments(job, spec)
    if arguments.process_index == 0 and job.batch_scale < 1:
        link.log(
            f"micro batch {arguments.per_device_train_batch_size}, "
            f"{arguments.gradient_accumulation_steps} of them for one step"
        )
    callbacks = [
        StopAtStepEnd(link, task_id=job.task_id),
        Reporter(link),
        *_trackers(job, spec, arguments),
    ]
    parts = gather_parts(job, spec, arguments, callbacks, link)
    trainer = _build_trainer(job, parts)
    try:
        with contextlib.suppress(AlreadyDone):
            trainer.train(**({"resume_from_checkpoint": str(job.resume)} if job.resume else {}))
        _check_steps(trainer, rows=len(parts.dataset))
        _check_finite(trainer)
        return _finish(job, parts, trainer, seconds=time.monotonic() - begun)
    finally:
        _end_tracking()
        del trainer, parts
        _free()


def _build_trainer(job: TrainingJob, parts: Parts) -> Any:
    module = import_trainer(job.task_type)
    with _refusals(job):
        trainer = module.build_trainer(job, parts)
    trainer.remove_callback(PrinterCallback)  # the log gets our own lines
    if not trainer.is_deepspeed_enabled:  # it keeps long copies of its own
        widen_trained(trainer.model, generates=job.task_type == "grpo")
    for config in getattr(trained_model(trainer), "peft_config", {}).values():
        config.base_model_name_or_path = None  # each checkpoint would ask the hub about it
    return trainer


@contextlib.contextmanager
def _refusals(job: TrainingJob) -> Iterator[None]:
    """Tell what a trainer refuses as a fault of the document."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as exc:
        text = " ".join(str(exc).split())
        raise ContractError(
            f"TRL refuses to train ({job.task_type}): {text}", where=f"task {job.task_id}"
        ) from exc
    except ImportError as exc:
        raise ExecutorUnavailableError(f"task {job.task_id}: {exc}") from exc


def _finish(job: TrainingJob, parts: Parts, trainer: Any, *, seconds: float) -> dict[str, Any]:
    """Save what was trained, and tell how it went."""
    history = trainer.state.log_history
    loss = mean_loss(history)
    base = job.inputs.model.identifier if job.inputs.model else job.task_id
    size = len(parts.dataset)
    summary = {
        "task_id": job.task_id,
        "training_successful": True,
        "training_time_seconds": round(seconds, 3),
        "error_message": None,
        "model_name": base,
        "dataset_size": size,
        "resume_from_path": str(job.resume or job.inputs.checkpoint or "") or None,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": loss,
        "metrics": _last_metrics(history),
    }
    if parts.spec.training.save_model:
        card = write_card(
            task_type=job.task_type,
            base=base,
            dataset_size=size,
            steps=trainer.state.global_step,
            loss=loss,
            adapter=parts.trains_adapter,
        )
        save_final(trainer, job.folder, base=base, card=card)
    if trainer.args.should_save:
        told = {**summary, "seed": trainer.args.seed, "batch": _batch(trainer.args)}
        write_metrics(job.folder / "training_metrics.json", told, history)
        draw_loss(history, job.folder / "artifacts" / "loss.png", title=f"{base}, {job.task_type}")
    return summary


def _batch(arguments: Any) -> dict[str, int]:
    """Return how the rows of one step were shared out."""
    micro = arguments.per_device_train_batch_size
    parts = arguments.gradient_accumulation_steps
    ranks = arguments.distributed_state.num_processes
    return {
        "per_device": micro,
        "accumulation": parts,
        "processes": ranks,
        "effective": micro * parts * ranks,
    }


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the latest value of each number that was logged and is one."""
    merged: dict[str, Any] = {}
    for entry in history:
        merged.update(entry)
    return {
        key: value
        for key, value in merged.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def _check_steps(trainer: Any, *, rows: int) -> None:
    """Refuse to call a training done that ran out of batches.

    Raises:
        InputError: It ended before its last step.
    """
    made, expected = trainer.state.global_step, max(trainer.state.max_steps, 1)
    if made < expected:
        raise InputError(
            f"the training ended after {made} of {expected} steps: {rows} rows to train on made no "
            "more batches; give more rows, or a smaller training.batch_size or "
            "gradient_accumulation_steps"
        )


def _check_finite(trainer: Any) -> None:
    """Refuse to save what is no model any more.

    Raises:
        ExecutionError: The last loss or a weight is not a finite number.
    """
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = (weight for weight in trainer.model.parameters() if weight.requires_grad)
    if losses and not math.isfinite(losses[-1]):
        wrong = f"the loss is {losses[-1]}"
    elif not all(bool(torch.isfinite(weight).all()) for weight in weights):
        wrong = "weights are no numbers any more"
    else:
        return
    raise ExecutionError(
        f"after {trainer.state.global_step} steps {wrong}, so nothing was saved; try a lower "
        "training.learning_rate or max_grad_norm, or bf16 in place of fp16"
    )


def _trackers(job: TrainingJob, spec: Any, arguments: Any) -> list[Any]:
    if "tensorboard" not in spec.training.report_to or arguments.process_index:
        return []
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - rarely wanted
    from transformers.integrations import TensorBoardCallback  # noqa: PLC0415 - as above

    # The library's own choice is named after the machine.
    return [TensorBoardCallback(SummaryWriter(str(job.folder / "artifacts" / "tensorboard")))]


def _end_tracking() -> None:
    """End the run that wandb keeps open, or the next task of this process would log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def _shortage(exc: BaseException) -> str:
    """Return what the library said when memory ran out, or nothing when something else did."""
    text = " ".join(str(exc).split())
    short = isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text
    return text[:300] or type(exc).__name__ if short else ""


def _smaller(job: TrainingJob, spec: Any, shortage: str, link: Link) -> TrainingJob:
    """Return the same job with half the micro batch, from its latest checkpoint.

    Raises:
        CrashError: It cannot be halved, or other ranks are in the midst of it.
    """
    alone = not (distributed.is_available() and distributed.is_initialized())
    if not alone or spec.training.batch_size * job.batch_scale <= 1:
        raise CrashError(f"task {job.task_id}: memory ran out: {shortage}", oom=True)
    resume = latest_whole(job.folder / "checkpoints") or job.resume
    link.log(f"memory ran out; half the micro batch, from {resume.name if resume else 'the start'}")
    return attrs.evolve(job, batch_scale=job.batch_scale / 2, resume=resume)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
