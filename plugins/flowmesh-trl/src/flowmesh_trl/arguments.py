"""From the blocks of a document to TRL's own configuration object."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flowmesh_core import ContractError, ExecutorUnavailableError
from flowmesh_trl.job import TrainingJob
from flowmesh_trl.options import CONFIGS

__all__ = ["build_arguments", "config_class", "split_batch"]

_INSTALL = "pip install 'flowmesh-trl[engine]' 'trl==1.12.0'"
_GRPO_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# The document's `generation` under the names of TRL's configurations.
_GENERATION: Mapping[str, Mapping[str, str]] = {
    "grpo": {"max_new_tokens": "max_completion_length", **{name: name for name in _GRPO_SAMPLING}},
    "ppo": {"max_new_tokens": "response_length", "temperature": "temperature"},
}
# Tracker to its distribution; the module is the first word of that.
_TRACKERS = (
    *("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)
_TRACKER_PACKAGES: Mapping[str, str] = {
    **{name: name for name in _TRACKERS},
    "azure_ml": "azureml-core",
    "flyte": "flytekit",
}


def config_class(task_type: str) -> Any:
    """Return TRL's configuration class of a task type.

    Raises:
        ExecutorUnavailableError: This TRL does not have it.
    """
    module, name = CONFIGS[task_type]
    try:
        with warnings.catch_warnings():  # TRL warns of all that it calls experimental
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as exc:
        version = importlib.import_module("trl").__version__
        left = "; PPO left it after 1.12" if task_type == "ppo" else ""
        raise ExecutorUnavailableError(
            f"task type {task_type!r} needs {module}.{name}, which TRL {version} does not "
            f"have{left}; run: {_INSTALL}",
            needs=[module],
            install=_INSTALL,
        ) from exc


def split_batch(micro: int, scale: float, *, least: int = 1) -> tuple[int, int]:
    """Return a smaller micro batch, and how many of them make up the one that was asked for.

    Args:
        micro: Rows that were to be computed at once.
        scale: 1 or less: the share of them that is to be.
        least: Rows that must be computed at once.
    """
    divisors = [size for size in range(1, micro + 1) if micro % size == 0 and size >= least]
    small = [size for size in divisors if size <= micro * scale]
    found = max(small, default=min(divisors, default=micro))
    return found, micro // found


def build_arguments(job: TrainingJob, spec: Any) -> Any:
    """Return TRL's configuration for a job.

    Args:
        job: What to train, and on how small a micro batch.
        spec: The document's ``spec``, validated.

    Raises:
        ContractError: TRL refuses a value, or values together.
        ExecutorUnavailableError: This TRL has no such trainer, or what was asked for needs a GPU.
    """
    kind = config_class(job.task_type)
    use_cpu = job.use_cpu or not torch.cuda.is_available()
    values = {**_defaults(job, use_cpu=use_cpu), **spec.training.config_arguments}
    if use_cpu and values.get("fp16"):
        raise ExecutorUnavailableError(
            "training.fp16 needs a GPU, and this task has none; use bf16, or neither"
        )
    values |= _generation(job.task_type, spec)
    values |= {"output_dir": str(job.folder / "checkpoints"), "use_cpu": use_cpu}
    _check_trackers(values["report_to"])
    # Our own callback does it, into the task's folder.
    values["report_to"] = [name for name in values["report_to"] if name != "tensorboard"]
    _rename_checkpointing(values, kind)
    _shrink(values, job)
    _plan_evaluation(values, has_eval=spec.data.has_eval_rows)
    try:
        return kind(**values)
    except (ValueError, TypeError, NotImplementedError) as exc:
        text = " ".join(str(exc).split())
        raise ContractError(
            f"training: TRL refuses it: {text}", where=f"task {job.task_id}"
        ) from exc
    except ImportError as exc:
        raise ExecutorUnavailableError(f"task {job.task_id}: {exc}") from exc


def _defaults(job: TrainingJob, *, use_cpu: bool) -> dict[str, Any]:
    """Return values of ours where TRL's own would be wrong here."""
    values: dict[str, Any] = {
        "dataloader_pin_memory": not use_cpu,
        "disable_tqdm": True,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide them
    }
    if job.task_type == "ppo":
        values["num_sample_generations"] = 0  # tables for people at a terminal
        values["response_length"] = 64
    return values


def _check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed here."""
    packages = {name: _TRACKER_PACKAGES[name] for name in names if name in _TRACKER_PACKAGES}
    missing = {
        name: package
        for name, package in packages.items()
        if importlib.util.find_spec(package.partition("-")[0]) is None
    }
    if missing:
        install = f"pip install {' '.join(missing.values())}"
        raise ExecutorUnavailableError(
            f"training.report_to {', '.join(missing)}: not installed here; run: {install}",
            needs=[*missing.values()],
            install=install,
        )


def _generation(task_type: str, spec: Any) -> dict[str, Any]:
    block = getattr(spec, "generation", None)
    given = block.model_dump(exclude_none=True) if block else {}
    names = _GENERATION.get(task_type, {})
    return {names[key]: value for key, value in given.items() if key in names}


def _rename_checkpointing(values: dict[str, Any], kind: Any) -> None:
    """Call it as this Transformers does; where there are two names, the older one warns."""
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        if old in values and hasattr(kind, new):
            values.setdefault(new, values.pop(old))


def _shrink(values: dict[str, Any], job: TrainingJob) -> None:
    asked = values["per_device_train_batch_size"]
    least = 2 if job.task_type == "kto" else 1  # its loss compares rows of one micro batch
    micro, parts = split_batch(asked, job.batch_scale, least=least)
    values["per_device_train_batch_size"] = micro
    group = values.get("num_generations_eval") or values.get("num_generations") or 1
    groups, rest = divmod(values["per_device_eval_batch_size"], group)
    if not rest:  # or several processes share the answers to one prompt
        smaller, _ = split_batch(groups, job.batch_scale, least=least)
        values["per_device_eval_batch_size"] = group * smaller
    values["gradient_accumulation_steps"] *= parts
    if values.get("steps_per_generation"):
        values["steps_per_generation"] *= parts
    if job.task_type == "ppo":
        most = values.get("local_rollout_forward_batch_size", 64)
        values["local_rollout_forward_batch_size"] = max(1, int(most * job.batch_scale))


def _plan_evaluation(values: dict[str, Any], *, has_eval: bool) -> None:
    asked = values.get("eval_strategy")
    if asked not in (None, "no") and not has_eval:
        raise ContractError(
            f"training.eval_strategy {asked!r} needs rows to evaluate on; give data.eval or "
            "data.eval_fraction"
        )
    if asked is None and has_eval:
        values["eval_strategy"] = "steps" if values.get("eval_steps") else "epoch"
