"""One training as data that crosses to the ranks that do it, and their way to talk back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import Inputs

__all__ = ["Link", "TrainingJob"]


@attrs.frozen(kw_only=True)
class TrainingJob:
    """What one training needs to know; the same in every rank.

    Attributes:
        task_id: For the result and for messages.
        task_type: ``sft``, ``lora_sft``, ``dpo``, ``ppo``, ``grpo``, ``reward`` or ``kto``.
        spec: The document's ``spec``, its secrets resolved.
        inputs: Rows, model, checkpoint and further models, all at hand.
        folder: The attempt's folder; nothing is written elsewhere.
        resume: A whole ``checkpoint-<step>`` folder to go on from, or None to begin.
        batch_scale: Factor on the micro batch; accumulation grows by its inverse.
        use_cpu: Whether GPUs are to be left alone.
    """

    task_id: str
    task_type: str
    spec: Mapping[str, Any]
    inputs: Inputs
    folder: Path
    resume: Path | None = None
    batch_scale: float = 1.0
    use_cpu: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON data."""
        return {
            **attrs.asdict(self, recurse=False),
            "inputs": self.inputs.to_dict(),
            "folder": str(self.folder),
            "resume": self.resume and str(self.resume),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingJob:
        """Build a job from ``to_dict``."""
        return cls(
            **{
                **data,
                "inputs": Inputs.from_dict(data["inputs"]),
                "folder": Path(data["folder"]),
                "resume": data["resume"] and Path(data["resume"]),
            }
        )


@attrs.frozen(kw_only=True)
class Link:
    """How a running training reports, and learns that it must stop.

    Attributes:
        report: Gets what ``RunContext.progress`` takes by keyword.
        say: Gets lines for the task's log.
        must_stop: Cheap enough to ask at every step.
    """

    report: Callable[..., None] = lambda **_values: None
    say: Callable[[str], None] = lambda _line: None
    must_stop: Callable[[], bool] = lambda: False

    def progress(self, *, step: int, total: int | None = None, **values: Any) -> None:
        """Report one step and its numbers."""
        self.report(step=step, total=total, **values)

    def log(self, line: str) -> None:
        """Write one line to the task's log."""
        self.say(line)

    @property
    def stopping(self) -> bool:
        """Whether to save a checkpoint and end."""
        return self.must_stop()
