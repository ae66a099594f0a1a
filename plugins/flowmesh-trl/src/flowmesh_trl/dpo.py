"""Direct preference optimization."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from flowmesh_trl.job import TrainingJob
from flowmesh_trl.parts import Parts

__all__ = ["build_trainer"]


def build_trainer(_job: TrainingJob, parts: Parts) -> Any:
    """Put a ``DPOTrainer`` together; what is trained starts as its own reference."""
    return DPOTrainer(
        model=parts.model,
        ref_model=parts.load_reference(),
        peft_config=parts.peft_config,
        **parts.common(),
    )
