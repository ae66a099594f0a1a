"""Group relative policy optimization: several answers are tried, and compared by their rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import GRPOTrainer

from flowmesh_trl.job import TrainingJob
from flowmesh_trl.parts import Parts
from flowmesh_trl.reward_model import load_reward_model
from flowmesh_trl.rewards import Reward, load_rewards

__all__ = ["build_trainer", "gather_rewards"]


def build_trainer(job: TrainingJob, parts: Parts) -> Any:
    """Put a ``GRPOTrainer`` together."""
    rewards = gather_rewards(job, parts)
    parts.arguments.reward_weights = [reward.weight for reward in rewards]
    if parts.arguments.beta and not parts.trains_adapter:
        _name_reference(parts, job.folder / ".reference")
    return GRPOTrainer(
        model=parts.model,
        reward_funcs=list(rewards),
        peft_config=parts.peft_config,
        **parts.common(),
    )


def gather_rewards(job: TrainingJob, parts: Parts) -> list[Reward]:
    """Load all that the document rewards, the reward model among them."""
    rewards = load_rewards([entry.model_dump() for entry in parts.spec.reward])
    block = parts.spec.reward_model
    if block is None:
        return rewards
    scorer = load_reward_model(
        job.inputs.models["reward_model"],
        kind=block.type,
        scale=block.scale,
        max_length=block.max_length,
        positive_label=block.positive_label,
        negative_label=block.negative_label,
        device=parts.arguments.device,
    )
    return [*rewards, scorer]


def _name_reference(parts: Parts, folder: Path) -> None:
    """Have the trainer find the reference: it loads one by the name in the model's configuration.

    That name says nothing of a revision, a checkpoint, a merged adapter or a GGUF file, so the
    weights are written as they are now.
    """
    if parts.weights.is_plain_folder:
        return
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            parts.model.save_pretrained(folder)
            parts.tokenizer.save_pretrained(folder)
    parts.model.config._name_or_path = str(folder)  # noqa: SLF001 - what the trainer reads
