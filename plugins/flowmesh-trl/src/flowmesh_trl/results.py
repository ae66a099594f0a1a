"""What a training answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["TrainingResult"]


class TrainingResult(BaseModel):
    """Result of every task type that trains.

    ``metrics`` has the latest value of each number that was logged; ``train_loss`` is the mean over
    all steps, null when none was logged.
    """

    model_config = ConfigDict(extra="allow")  # the core adds where the archive is

    task_id: str
    training_successful: Literal[True]
    training_time_seconds: float
    error_message: None
    model_name: str
    dataset_size: int
    resume_from_path: str | None
    steps: int
    epochs: float | None
    train_loss: float | None
    metrics: dict[str, Any]
    output_dir: str
    checkpoints_dir: str
