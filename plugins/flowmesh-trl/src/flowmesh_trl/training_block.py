"""The block ``training``: one model per task type, with the contract's names and defaults.

Every other key is looked up in TRL's own configuration: converted to its type when it is known,
refused when it is not. Batch sizes count rows per process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from flowmesh_trl.findings import Finding, field_names, named_once, repeated, validate_beside
from flowmesh_trl.options import OWNED, config_options, unknown_option

__all__ = [
    "DpoTraining",
    "GrpoTraining",
    "KtoTraining",
    "LoraSftTraining",
    "PpoTraining",
    "RewardTraining",
    "SftTraining",
    "TrainingBlock",
]


def _as_list(value: Any) -> Any:
    """Read ``"0,1"``, ``0`` and ``["0", 1]`` alike."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list):
        return [str(item) if type(item) is int else item for item in value]
    return value


def _trackers(value: Any) -> Any:
    names = [] if value is None else _as_list(value)
    return [] if names == ["none"] else names


def _or(name: str, *others: str) -> AliasChoices:
    return AliasChoices(name, *others)


Texts = Annotated[list[str], BeforeValidator(_as_list)]
Config = dict[str, Any] | str


class TrainingBlock(BaseModel):
    """``training``: what all task types have.

    Attributes:
        num_train_epochs: Passes over the rows.
        max_steps: Optimizer steps, which then decide instead of the epochs; -1 for no such limit.
        batch_size: Rows per process and micro batch, as ``per_device_train_batch_size``.
        per_device_eval_batch_size: The same for evaluation; ``batch_size`` without it.
        gradient_accumulation_steps: Micro batches per optimizer step.
        learning_rate: Its highest value.
        warmup_steps: Steps over which it rises; below 1 a share of all steps.
        logging_steps: Steps from one line of metrics to the next; below 1 a share of all.
        save_strategy: When checkpoints are written.
        save_steps: Steps from one checkpoint to the next, as ``save_freq``; below 1 a share of all.
        save_total_limit: Checkpoints that are kept, the latest; null keeps all.
        eval_strategy: Without it ``epoch`` if there are rows to evaluate on.
        eval_steps: Steps from one evaluation to the next; ``logging_steps`` without it.
        fp16: Mixed precision; needs a GPU.
        bf16: Mixed precision.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2`` or another of Transformers.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        seed: Of shuffling, dropout, sampling and new weights.
        save_model: Whether the trained model is a result.
        resume_from_path: Checkpoint on the worker from which to go on, in place of
            ``checkpoint.load``.
        save_safetensors: Accepted for documents that have it; weights are always safetensors.
        report_to: Trackers that get the metrics, as ``log_with``; none without it.
        tracker_project_name: The project under which trackio files the run, as ``project``.
        allow_multi_gpu: Whether to use several GPUs; without it, if the task has several.
        nproc_per_node: Processes; without it one for each GPU that is used.
        visible_devices: Those of the task's GPUs that are used: a list, or ``"0,1"``.
        primary_gpu: Which of them a single process uses, counted from 0.
        ddp_find_unused_parameters: As in PyTorch.
        deepspeed: Its configuration: an object, a file on the worker, or JSON.
        auto_deepspeed: Use it for several GPUs where it is installed.
        auto_deepspeed_stage: ZeRO stage in that case, as ``zero_stage``.
        fsdp: Options of fully sharded data parallel, in TRL's spelling.
        fsdp_config: Its further configuration: an object, or a file on the worker.
        accelerate_config: Configuration of accelerate: an object, or a file on the worker.
    """

    model_config = ConfigDict(extra="allow", populate_by_name=True, allow_inf_nan=False)

    task_type: ClassVar[str] = ""
    # Fields that are ours; all others are TRL's, under these names or its own.
    ours: ClassVar[frozenset[str]] = frozenset(
        {
            *("save_model", "resume_from_path", "save_safetensors", "attn_implementation"),
            *("allow_multi_gpu", "nproc_per_node", "visible_devices", "primary_gpu"),
            *("auto_deepspeed", "auto_deepspeed_stage", "accelerate_config"),
            *("steps", "mini_batch_size", "target_kl", "early_stopping", "optimize_cuda_cache"),
        }
    )
    renamed: ClassVar[Mapping[str, str]] = {
        "batch_size": "per_device_train_batch_size",
        "max_seq_length": "max_length",
        "tracker_project_name": "project",
        "ppo_epochs": "num_ppo_epochs",
    }

    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1)
    batch_size: int = Field(
        default=2, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    per_device_eval_batch_size: int | None = Field(default=None, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: float = Field(default=0, ge=0)
    logging_steps: float = Field(default=10, gt=0)
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = Field(default=100, gt=0, validation_alias=_or("save_steps", "save_freq"))
    save_total_limit: int | None = Field(default=2, ge=1)
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: float | None = Field(default=None, gt=0)
    fp16: bool = False
    bf16: bool = False
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    save_model: bool = True
    resume_from_path: str | None = None
    save_safetensors: bool | None = None
    report_to: Annotated[list[str], BeforeValidator(_trackers)] = Field(
        default_factory=list, validation_alias=_or("report_to", "log_with")
    )
    tracker_project_name: str | None = Field(
        default=None, validation_alias=_or("tracker_project_name", "project")
    )
    allow_multi_gpu: bool | None = None
    nproc_per_node: int | None = Field(default=None, ge=1)
    visible_devices: Texts | None = None
    primary_gpu: int = Field(default=0, ge=0)
    ddp_find_unused_parameters: bool | None = None
    deepspeed: Config | None = None
    auto_deepspeed: bool = True
    auto_deepspeed_stage: Literal[1, 2, 3] = Field(
        default=2, validation_alias=_or("auto_deepspeed_stage", "zero_stage")
    )
    fsdp: str | None = None
    fsdp_config: Config | None = None
    accelerate_config: Config | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, value: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(value, Mapping):
            return validate(value)
        block, problems = _with_options(cls, value)
        return validate_beside(cls, block, validate, problems)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingBlock:
        problems = [*self.conflicts()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        if self.fp16 and self.bf16:
            yield "fp16 and bf16 exclude each other"
        if self.deepspeed and self.fsdp:
            yield "deepspeed and fsdp exclude each other"
        processes = self.nproc_per_node or 1
        if processes > 1 and self.allow_multi_gpu is False:
            yield f"allow_multi_gpu: false contradicts nproc_per_node {processes}"
        if self.visible_devices is not None and processes > len(self.visible_devices):
            yield f"visible_devices names fewer GPUs than nproc_per_node asks for ({processes})"
        if self.tracker_project_name and self.report_to and "trackio" not in self.report_to:
            yield (
                "tracker_project_name reaches only trackio; for others set their own variable on"
                " the worker, such as WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Keys of TRL's configuration that have no field here."""
        return dict(self.model_extra or {})

    @property
    def config_arguments(self) -> dict[str, Any]:
        """All that goes to TRL's configuration, under its names."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        renamed = {
            self.renamed.get(name, name): value
            for name, value in values.items()
            if name not in self.ours and not (value is None and name not in self.model_fields_set)
        }
        renamed.setdefault("per_device_eval_batch_size", self.batch_size)
        return {**renamed, **self.options}


class _Truncating(TrainingBlock):
    """What cuts texts to a length.

    Attributes:
        max_seq_length: Tokens per row, as ``max_length``; null cuts nothing.
    """

    max_seq_length: int | None = Field(
        default=1024, ge=1, validation_alias=_or("max_seq_length", "max_length")
    )


class SftTraining(_Truncating):
    """``training`` of ``sft``.

    Attributes:
        packing: Fill each sequence of ``max_seq_length`` with several rows.
        completion_only_loss: Learn the answers and not the prompts; without it, TRL's choice.
    """

    task_type = "sft"

    learning_rate: float = Field(default=5e-5, gt=0)
    gradient_checkpointing: bool = True
    packing: bool = False
    completion_only_loss: bool | None = None

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        if self.packing and self.max_seq_length is None:
            yield "packing needs max_seq_length"


class LoraSftTraining(SftTraining):
    """``training`` of ``lora_sft``."""

    task_type = "lora_sft"

    learning_rate: float = Field(default=2e-4, gt=0)
    gradient_checkpointing: bool = False


class DpoTraining(_Truncating):
    """``training`` of ``dpo``.

    Attributes:
        beta: How strongly the trained model is held to its reference.
    """

    task_type = "dpo"

    batch_size: int = Field(
        default=4, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    learning_rate: float = Field(default=5e-7, gt=0)
    save_steps: float = Field(default=500, gt=0, validation_alias=_or("save_steps", "save_freq"))
    beta: float = Field(default=0.1, ge=0)


class KtoTraining(_Truncating):
    """``training`` of ``kto``, whose loss compares the rows of a micro batch.

    Attributes:
        beta: As for ``dpo``.
    """

    task_type = "kto"

    batch_size: int = Field(
        default=4, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    learning_rate: float = Field(default=1e-6, gt=0)
    beta: float = Field(default=0.1, ge=0)

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        if self.batch_size == 1 and self.options.get("loss_type", "kto") == "kto":
            yield "batch_size must be 2 or more to estimate the KL divergence, got 1"


class RewardTraining(_Truncating):
    """``training`` of ``reward``."""

    task_type = "reward"

    batch_size: int = Field(
        default=4, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    learning_rate: float = Field(default=1e-4, gt=0)


class GrpoTraining(TrainingBlock):
    """``training`` of ``grpo``.

    Attributes:
        num_generations: Answers per prompt that are compared; divides the answers of one step,
            which are ``batch_size * gradient_accumulation_steps`` of every process.
        beta: How strongly the trained model is held to its reference; 0 needs none.
    """

    task_type = "grpo"

    batch_size: int = Field(
        default=8, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    learning_rate: float = Field(default=1e-6, gt=0)
    num_generations: int = Field(default=8, ge=2)
    beta: float = Field(default=0.0, ge=0)

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        if self.nproc_per_node is None and self.allow_multi_gpu is not False:
            return  # as many processes as there are GPUs
        if {"generation_batch_size", "steps_per_generation"} & self.options.keys():
            return
        answers = (self.nproc_per_node or 1) * self.batch_size * self.gradient_accumulation_steps
        if answers % self.num_generations:
            yield (
                f"num_generations {self.num_generations} must divide the {answers} answers of a"
                " step (processes * batch_size * gradient_accumulation_steps)"
            )


_UNKNOWN_TO_PPO = (
    *("bf16", "fp16", "max_grad_norm"),
    *("gradient_checkpointing", "activation_checkpointing"),
)


class PpoTraining(_Truncating):
    """``training`` of ``ppo``.

    Attributes:
        batch_size: As above; an optimizer step takes ``mini_batch_size`` of the answers.
        max_seq_length: Tokens per prompt, as ``max_length``.
        steps: So that ``steps * batch_size`` answers are tried in all, over all processes; without
            it, ``num_train_epochs`` decides.
        num_mini_batches: Parts of a batch, ``batch_size * gradient_accumulation_steps``, that
            make an optimizer step each.
        mini_batch_size: Their size instead of their number.
        ppo_epochs: Passes over each batch, as ``num_ppo_epochs``.
        kl_coef: How strongly the policy is held to its reference.
        temperature: Of the answers that are tried.
        target_kl: Only with ``early_stopping: false``, which makes it void.
        early_stopping: Only false: TRL's trainer cannot leave a batch early.
        optimize_cuda_cache: Accepted; TRL's trainer empties the cache anyway.
    """

    task_type = "ppo"

    batch_size: int = Field(
        default=1, ge=1, validation_alias=_or("batch_size", "per_device_train_batch_size")
    )
    learning_rate: float = Field(default=1.41e-5, gt=0)
    max_seq_length: int | None = Field(
        default=512, ge=1, validation_alias=_or("max_seq_length", "max_length")
    )
    steps: int | None = Field(default=None, ge=1)
    num_mini_batches: int = Field(default=1, ge=1)
    mini_batch_size: int | None = Field(default=None, ge=1)
    ppo_epochs: int = Field(default=4, ge=1, validation_alias=_or("ppo_epochs", "num_ppo_epochs"))
    kl_coef: float = Field(default=0.05, ge=0)
    temperature: float = Field(default=0.7, gt=0)
    target_kl: float | None = Field(default=None, gt=0)
    early_stopping: bool | None = None
    optimize_cuda_cache: bool | None = None

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        yield from self._mini_batch_conflicts()
        if self.steps is not None and "total_episodes" in self.options:
            yield "steps and total_episodes both say how long to train; give one"
        if self.max_steps > 0:
            yield "max_steps does not bound PPO; use steps"
        if self.eval_strategy not in (None, "no"):
            yield f"eval_strategy {self.eval_strategy!r}: TRL's PPO does not evaluate"
        if self.early_stopping:
            yield "early_stopping: TRL's PPO cannot leave a batch early; raise kl_coef instead"
        if self.target_kl is not None and self.early_stopping is None:
            yield "target_kl: TRL's PPO does not know it; leave it out, or set kl_coef"
        for name in _UNKNOWN_TO_PPO:
            if getattr(self, name, None):
                yield f"{name}: TRL's PPO does not heed it; leave it out"
        if self.save_strategy in ("epoch", "best"):
            yield f"save_strategy {self.save_strategy!r}: TRL's PPO saves by steps, or not at all"

    def _mini_batch_conflicts(self) -> Iterator[str]:
        batch = self.batch_size * self.gradient_accumulation_steps
        size, number = self.mini_batch_size, self.num_mini_batches
        if batch % (size or number):
            name = "mini_batch_size" if size else "num_mini_batches"
            yield (
                f"{name} {size or number} must divide the batch of {batch}"
                " (batch_size * gradient_accumulation_steps)"
            )
        elif size and "num_mini_batches" in self.model_fields_set and batch != size * number:
            yield f"mini_batch_size {size} and num_mini_batches {number} do not make {batch}"

    @property
    def config_arguments(self) -> dict[str, Any]:
        """All that goes to TRL's configuration, under its names."""
        found = super().config_arguments
        found.pop("max_length")  # TRL's PPO leaves it to whoever makes the prompts
        if self.mini_batch_size:
            batch = self.batch_size * self.gradient_accumulation_steps
            found["num_mini_batches"] = batch // self.mini_batch_size
        if self.steps:
            found["total_episodes"] = self.steps * self.batch_size
        return found


def _with_options(
    block: type[TrainingBlock], value: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str | Finding]]:
    """Return the keys to validate, TRL's converted to their types, and the problems of the rest."""
    given, contradictions = named_once(block, value)
    problems: list[str | Finding] = [*contradictions]
    declared = {name for field in block.model_fields for name in field_names(block, field)}
    known = config_options(block.task_type)
    kept: dict[str, Any] = {}
    for key, item in given.items():
        if key in declared:
            kept[key] = item
        elif key in OWNED:
            problems.append(f"{key} is not for documents to set: {OWNED[key]}")
        elif known is None:
            kept[key] = item
        elif key not in known:
            problems.append(unknown_option(key, {*declared, *known} - OWNED.keys()))
        else:
            try:
                kept[key] = TypeAdapter(known[key]).validate_python(item)
            except ValidationError as exc:
                problems.append(repeated(exc.errors(include_url=False)[0], loc=(key,)))
    return kept, problems
