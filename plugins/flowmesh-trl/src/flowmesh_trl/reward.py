"""Training of a reward model: one score per text, higher for the answer that was chosen."""

from __future__ import annotations

from typing import Any

from trl import RewardTrainer

from flowmesh_trl.job import TrainingJob
from flowmesh_trl.parts import Parts

__all__ = ["build_trainer"]


def build_trainer(_job: TrainingJob, parts: Parts) -> Any:
    """Put a ``RewardTrainer`` together."""
    return RewardTrainer(model=parts.model, peft_config=parts.peft_config, **parts.common())
