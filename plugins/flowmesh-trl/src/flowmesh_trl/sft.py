"""Supervised fine-tuning, of all weights or of an adapter."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from flowmesh_trl.job import TrainingJob
from flowmesh_trl.parts import Parts

__all__ = ["build_trainer"]


def build_trainer(_job: TrainingJob, parts: Parts) -> Any:
    """Put an ``SFTTrainer`` together."""
    return SFTTrainer(model=parts.model, peft_config=parts.peft_config, **parts.common())
