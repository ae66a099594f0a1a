"""The spec and the result of ``simulate``, and an example."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flowmesh_core import StrictBlock, TaskSpec
from flowmesh_sim.profiles import ALIASES

__all__ = ["EXAMPLE", "FailureBlock", "SimulateBlock", "SimulateResult", "SimulateSpec"]

Megabytes = Annotated[float, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Profile = Annotated[
    Literal["hyperbolic", "exponential", "bounded_exponential"],
    BeforeValidator(lambda name: ALIASES.get(str(name), name)),
]
# Fields that mean something for one kind of failure only.
_FOR = {"retriable": "error", "signal": "crash", "code": "exit", "deaf": "hang", "late_s": "late"}


class FailureBlock(StrictBlock):
    """``simulate.failure``: what goes wrong before epoch ``at_epoch``, counted from 0.

    Attributes:
        kind: ``late`` is a wait after which all goes on, the others end the training or hang.
        probability: Chance of an attempt to fail; ``seed``, task id and attempt decide.
        attempts: How many attempts may fail, from the first; without it all.
        deaf: Hang without hearing a cancel or the deadline.
        late_s: Scaled by ``time_scale``.
    """

    kind: Literal["error", "crash", "exit", "hang", "out_of_memory", "late"]
    at_epoch: int = Field(default=0, ge=0)
    probability: float = Field(default=1.0, ge=0, le=1)
    seed: int = 0
    attempts: int | None = Field(default=None, ge=1)
    retriable: bool = False
    signal: Literal["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"] = "SIGKILL"
    code: int = Field(default=1, ge=0, le=255)
    deaf: bool = False
    late_s: Seconds = 1.0

    @model_validator(mode="after")
    def _refuse_what_is_not_read(self) -> FailureBlock:
        given = sorted(self.model_fields_set & _FOR.keys())
        strange = [f"{name} is for {_FOR[name]}" for name in given if _FOR[name] != self.kind]
        if strange:
            raise ValueError(f"{', '.join(strange)}; kind is {self.kind}")
        return self


class SimulateBlock(StrictBlock):
    """``simulate``: what is trained, how long it takes, and what it takes.

    Attributes:
        epoch_seconds: Least and most seconds of an epoch; without it as the profile has them.
        time_scale: Factor on all seconds; 0 is as fast as possible.
        checkpoint_every: Epochs from one checkpoint to the next; 0 writes none.
        memory_mb: Memory that it really takes, in 10^6 bytes.
        artifact_mb: Size of the weights that it leaves, in 10^6 bytes; 0 leaves none.
    """

    profile: Profile = "bounded_exponential"
    model_type: Literal["neural_network", "xgboost", "random_forest"] = "neural_network"
    seed: int = 0
    epochs: int = Field(default=10, ge=1, le=100_000, alias="num_train_epochs")
    steps_per_epoch: int = Field(default=10, ge=1, le=100_000)
    epoch_seconds: tuple[Seconds, Seconds] | None = None
    time_scale: Seconds = 1.0
    checkpoint_every: int = Field(default=1, ge=0)
    memory_mb: Megabytes = 0
    artifact_mb: Megabytes = 0
    failure: FailureBlock | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> SimulateBlock:
        problems, bounds, failure = [], self.epoch_seconds, self.failure
        if bounds and bounds[0] > bounds[1]:
            problems.append(f"epoch_seconds must be [least, most], got {[*bounds]}")
        if failure and failure.at_epoch >= self.epochs:
            text = f"failure.at_epoch must be below epochs, got {failure.at_epoch} of {self.epochs}"
            problems.append(text)
        if problems:
            raise ValueError("; ".join(problems))
        return self


class SimulateSpec(TaskSpec):
    """Spec of ``simulate``."""

    simulate: SimulateBlock = Field(default_factory=SimulateBlock)


class SimulateResult(BaseModel):
    """Result of ``simulate``, with the names of a real training's; ``history`` is per epoch."""

    model_config = ConfigDict(extra="allow")  # the core adds where the weights are

    training_successful: Literal[True]
    training_time_seconds: float
    model_name: str
    seed: int
    steps: int
    epochs: int
    train_loss: float
    metrics: dict[str, float]
    history: list[dict[str, float]]
    resume_from_path: str | None


EXAMPLE: dict[str, Any] = {
    "taskType": "simulate",
    "simulate": {"epochs": 3, "time_scale": 0, "artifact_mb": 0.1},
}
