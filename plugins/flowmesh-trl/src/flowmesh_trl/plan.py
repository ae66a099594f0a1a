"""How many processes train, on which GPUs, and how they share the work when nobody says it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core import ContractError

__all__ = ["Plan", "auto_deepspeed", "plan_processes"]

_SHARING = ("accelerate_config", "deepspeed", "fsdp")


@attrs.frozen(kw_only=True)
class Plan:
    """How many processes train, and on what.

    Attributes:
        processes: At least 1.
        devices: GPUs that they may see, rank 0's first; empty on CPU.
        in_process: One process, and this one sees the very same GPUs and needs no group.
    """

    processes: int
    devices: tuple[str, ...]
    in_process: bool


def plan_processes(
    training: Mapping[str, Any], devices: Sequence[str], *, use_cpu: bool = False
) -> Plan:
    """Choose processes and GPUs as ``training`` asks for them.

    ``visible_devices`` names some of the task's GPUs; ``primary_gpu`` is a position among these;
    ``nproc_per_node`` takes the first so many, and on CPU any number. Without it there is one
    process per GPU, or one alone where ``allow_multi_gpu`` is false.

    Args:
        training: ``spec.training``, validated.
        devices: What the task was given: entries of ``CUDA_VISIBLE_DEVICES``.
        use_cpu: Whether these are to be left alone.

    Raises:
        ContractError: It asks for GPUs that the task has not.
    """
    problems: list[str] = []
    count: int | None = training.get("nproc_per_node")
    chosen = _choose_devices(training, devices, problems)
    available = None if use_cpu or not devices else len(chosen)
    if count is not None and available is not None and count > available:
        problems.append(
            f"spec.training.nproc_per_node is {count}, but the task may use {available} GPU(s);"
            " ask for more in spec.resources.hardware.gpu.count"
        )
    if problems:
        raise ContractError(problems)
    if available is None:
        chosen, processes = (), count or 1
    else:
        processes = count or (1 if training.get("allow_multi_gpu") is False else available)
        chosen = chosen[:processes]
    grouped = any(training.get(key) for key in _SHARING)
    in_process = processes == 1 and (use_cpu or len(devices) < 2) and not grouped
    return Plan(processes=processes, devices=chosen, in_process=in_process)


def _choose_devices(
    training: Mapping[str, Any], devices: Sequence[str], problems: list[str]
) -> tuple[str, ...]:
    """Return the GPUs that are named, the primary one first."""
    wanted = training.get("visible_devices")
    if wanted is None:
        chosen = tuple(devices)
    else:
        chosen = tuple(dict.fromkeys(wanted))
        if not chosen or not {*chosen} <= {*devices}:
            problems.append(
                f"spec.training.visible_devices must be among the task's own GPUs"
                f" ({', '.join(devices) or 'it has none'}), got {wanted!r}"
            )
    primary: int = training.get("primary_gpu") or 0
    if not devices or problems:
        return chosen
    if not 0 <= primary < len(chosen):
        problems.append(
            f"spec.training.primary_gpu must be a position among {len(chosen)} GPU(s), from 0,"
            f" got {primary}"
        )
        return chosen
    return (chosen[primary], *chosen[:primary], *chosen[primary + 1 :])


def auto_deepspeed(
    task_type: str, training: Mapping[str, Any], plan: Plan
) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration that ``auto_deepspeed`` stands for, or None for none.

    It is for several GPUs whose sharing nobody configured, where DeepSpeed is installed, and not
    for ``ppo``, whose two models are trained as one. What is ``auto`` the trainer fills in.
    Source: the documentation of Transformers on DeepSpeed.

    Args:
        task_type: ``spec.taskType``.
        training: ``spec.training``, validated.
        plan: What ``plan_processes`` made of it.
    """
    wanted = training.get("auto_deepspeed", True) and task_type != "ppo"
    several = plan.processes > 1 and plan.devices
    if not wanted or not several or any(training.get(key) for key in (*_SHARING, "fsdp_config")):
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return None
    stage = training.get("auto_deepspeed_stage", 2)
    gathered = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    return {
        "zero_optimization": {"stage": stage, **gathered},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }
