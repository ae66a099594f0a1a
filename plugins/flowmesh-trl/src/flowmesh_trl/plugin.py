"""Declares one executor for each task type that trains; imports no engine."""

from __future__ import annotations

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

_SPECS = {
    "sft": "SftSpec",
    "lora_sft": "LoraSftSpec",
    "dpo": "DpoSpec",
    "ppo": "PpoSpec",
    "grpo": "GrpoSpec",
    "reward": "RewardSpec",
    "kto": "KtoSpec",
}
# Where they score answers, those of a reward model too.
_REWARDED = ("ppo", "grpo")
# How trackers and launchers are set up; what a child keeps anyway is not repeated.
_VARIABLES = (
    *("WANDB_*", "WANDB_API_KEY", "MLFLOW_*", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("TENSORBOARD_*", "TRACKIO_*", "HF_TOKEN"),
    *("ACCELERATE_*", "DS_*", "GLOO_*"),
)


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what trains.

    Without an engine key: one process trains any model, since each training loads its own.
    """
    return [_declare(task_type) for task_type in _SPECS]


def _declare(task_type: str) -> ExecutorInfo:
    needs = ["torch", "trl", "peft", "datasets", "matplotlib"]
    return ExecutorInfo(
        name=f"trl.{task_type}",
        task_types={task_type},
        target="flowmesh_trl.executor:TrlExecutor",
        needs=[*needs, "trl.experimental.ppo"] if task_type == "ppo" else needs,
        install=_install(task_type),
        capabilities={Capability.CPU, Capability.GPU, Capability.SHRINK},
        places=["process"],  # ranks are ended with it, and so is what a training leaves in memory
        spec=f"flowmesh_trl.spec:{_SPECS[task_type]}",
        result="flowmesh_trl.results:TrainingResult",
        example=f"flowmesh_trl.examples:{task_type}",
        inputs={"rows", "eval_rows", "model", "checkpoint"},
        models=["reward_model"] if task_type in _REWARDED else [],
        model_formats={"hf", "gguf"},
        variables=_VARIABLES,
    )


def _install(task_type: str) -> str:
    # PPO left TRL after 1.12.
    return "pip install 'flowmesh-trl[engine]'" + (" 'trl<1.13'" if task_type == "ppo" else "")
