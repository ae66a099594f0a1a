"""Kahneman-Tversky optimization: answers that are good or bad, without pairs."""

from __future__ import annotations

from typing import Any

from trl import KTOTrainer

from flowmesh_trl.job import TrainingJob
from flowmesh_trl.parts import Parts

__all__ = ["build_trainer"]


def build_trainer(_job: TrainingJob, parts: Parts) -> Any:
    """Put a ``KTOTrainer`` together; what is trained starts as its own reference."""
    return KTOTrainer(
        model=parts.model,
        ref_model=parts.load_reference(),
        peft_config=parts.peft_config,
        **parts.common(),
    )
