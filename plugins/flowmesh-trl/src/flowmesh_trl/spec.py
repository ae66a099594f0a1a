"""Specs of the task types that train: what each reads, and what cannot be together.

A block that a type does not read is refused, so that no line of a document goes unheard.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flowmesh_core import Model, StrictBlock, TaskSpec
from flowmesh_trl.data_block import ROLES, DataBlock
from flowmesh_trl.findings import OnceBlock, validate_beside
from flowmesh_trl.rules import RULES
from flowmesh_trl.training_block import (
    DpoTraining,
    GrpoTraining,
    KtoTraining,
    LoraSftTraining,
    PpoTraining,
    RewardTraining,
    SftTraining,
    TrainingBlock,
)

__all__ = [
    "SPECS",
    "DpoSpec",
    "GenerationBlock",
    "GrpoSpec",
    "KtoSpec",
    "LoraBlock",
    "LoraSftSpec",
    "PpoSpec",
    "RewardFunctionBlock",
    "RewardModelBlock",
    "RewardSpec",
    "SftSpec",
    "TrainingSpec",
]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _layers(value: Any) -> Any:
    return [value] if isinstance(value, str) and value != "all-linear" else value


class LoraBlock(OnceBlock):
    """``lora``: train a small adapter and leave the model as it is.

    Attributes:
        r: Rank.
        alpha: Scale, divided by the rank, or with ``use_rslora`` by its root; as ``lora_alpha``.
        dropout: Share of the adapter's input that is dropped, as ``lora_dropout``.
        bias: Which biases are trained too.
        target_modules: Names of the layers that it is put on, or ``all-linear``.
        task_type: What peft takes the model for; without it, what the task type trains.
        use_rslora: See ``alpha``.
        modules_to_save: Layers that are trained whole and saved with the adapter.
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, alias="lora_alpha")
    dropout: float = Field(default=0.05, ge=0, lt=1, alias="lora_dropout")
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Annotated[list[str] | Literal["all-linear"], BeforeValidator(_layers)] = Field(
        default_factory=lambda: list(_ATTENTION), min_length=1
    )
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] | None = None
    use_rslora: bool = False
    modules_to_save: list[str] | None = None


class RewardModelBlock(StrictBlock):
    """``reward_model``: a classifier that scores answers.

    Attributes:
        source: Where it comes from, like ``model.source``.
        identifier: Short for ``source.identifier``.
        revision: Short for ``source.revision``.
        type: ``classification`` scores with logits, ``sentiment`` with probabilities.
        scale: Factor on every score.
        max_length: Tokens of a text that it reads.
        positive_label: The label whose score counts.
        negative_label: The label whose score is taken off.
    """

    source: dict[str, Any] | None = None
    identifier: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    type: Literal["classification", "sentiment"] = "classification"
    scale: float = Field(default=1.0, allow_inf_nan=False)
    max_length: int = Field(default=512, ge=1, le=512)
    positive_label: str | None = None
    negative_label: str | None = None

    @model_validator(mode="after")
    def _named_once(self) -> RewardModelBlock:
        if (self.source is None) == (self.identifier is None):
            raise ValueError("must have either source or identifier")
        return self


class RewardFunctionBlock(StrictBlock):
    """One entry of ``reward``: a function that scores answers.

    Attributes:
        name: A rule, or an entry point of ``flowmesh.trl.rewards``.
        weight: What its values count in the sum.
        options: What it is called with.
    """

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, allow_inf_nan=False)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _fits_the_rule(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        rule = RULES.get(info.data.get("name", ""))
        try:
            if rule is not None:
                rule.model_validate(value)
        except ValidationError as exc:
            if any(item["type"] == "pattern_regex" for item in exc.errors()):
                # Of a type that pydantic does not let anyone raise again.
                text = f"pattern must be a regular expression, got {value['pattern']!r:.60}"
                raise ValueError(text) from exc
            raise
        return value


class GenerationBlock(OnceBlock):
    """``generation``: how the answers are sampled that are tried out.

    Attributes:
        max_new_tokens: Tokens per answer, as ``max_tokens``; without it 64 for ``ppo``, 512 for
            ``grpo``.
        top_k: 0 for no such limit.
        stop: For ``ppo``: the token that ends an answer.
        do_sample: Only true; without sampling there is nothing to compare.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, alias="max_tokens")
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    stop: str | None = Field(default=None, min_length=1)
    do_sample: Literal[True] | None = None


class TrainingSpec(TaskSpec):
    """What the specs of all types have; ``model.source`` and ``checkpoint`` are the core's.

    Attributes:
        lora: None to train the model's own weights.
    """

    # Blocks of this plugin that the type reads.
    reads: ClassVar[frozenset[str]] = frozenset({"training", "data", "lora"})

    model: Model = Field(default_factory=Model)
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    data: DataBlock
    training: TrainingBlock
    lora: LoraBlock | None = None
    reward_model: RewardModelBlock | None = None
    reward: list[RewardFunctionBlock] = Field(default_factory=list)
    generation: GenerationBlock | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _only_what_is_read(cls, value: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(value, Mapping):
            return validate(value)
        given = {str(key): block for key, block in value.items() if block is not None}
        problems = {key: text for key in given if (text := cls._unheard(key))}
        read = {key: block for key, block in given.items() if key not in problems}
        return validate_beside(cls, read, validate, problems.values())

    @classmethod
    def _unheard(cls, key: str) -> str:
        """Say why a key is none for this type, or nothing."""
        name = cls.model_fields["training"].annotation.task_type  # type: ignore[union-attr]
        if key in TrainingSpec.model_fields:
            if key not in _BLOCKS or key in cls.reads:
                return ""
            hint = "; taskType: lora_sft trains adapters" if key == "lora" else ""
            return f"{name} reads no block {key!r}{hint}"
        if key in ("taskType", "task_type"):
            return ""
        near = difflib.get_close_matches(key, sorted({*cls.reads, "checkpoint"}), 1, 0.8)
        return f"unknown key {key!r}, did you mean {near[0]!r}?" if near else ""

    @field_validator("reward", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Read a name, an entry, a list of both, or any of these under ``function``."""
        if isinstance(value, Mapping) and "function" in value:
            rest = {key: item for key, item in value.items() if key != "function"}
            inner = value["function"]
            value = {"name": inner, **rest} if isinstance(inner, str) or rest else inner
        entries = value if isinstance(value, list) else [value]
        return [{"name": item} if isinstance(item, str) else item for item in entries]

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSpec:
        problems = [*self.conflicts()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        if self.training.resume_from_path and self.checkpoint.get("load"):
            yield "training.resume_from_path and checkpoint.load both say where to start; give one"
        if self.training.fp16 and (self.model_extra or {}).get("enforce_cpu") is True:
            yield "training.fp16 needs a GPU, and enforce_cpu: true takes none"
        if self.model.adapters:
            yield "model.adapters are for inference; checkpoint.load continues an adapter"
        if self.training.eval_strategy not in (None, "no") and not self.data.has_eval_rows:
            yield (
                f"training.eval_strategy {self.training.eval_strategy!r} needs data.eval or"
                " data.eval_fraction"
            )
        yield from self._column_conflicts()

    def _column_conflicts(self) -> Iterator[str]:
        roles = ROLES[self.training.task_type]
        blocks = {"data": self.data, "data.eval": self.data.eval}
        for where, block in blocks.items():
            strange = [] if block is None else sorted(block.columns.keys() - {*roles})
            if strange:
                yield (
                    f"{where}: {self.training.task_type} has no use for"
                    f" {', '.join(f'{role}_field' for role in strange)}; it reads"
                    f" {', '.join(f'{role}_field' for role in roles)}"
                )

    def _generation_conflicts(self, names: Mapping[str, str]) -> Iterator[str]:
        """Yield fields of ``generation`` that TRL does not have, or that stand in two places.

        Args:
            names: Field to TRL's name of it.
        """
        given = self.generation.model_fields_set if self.generation else set()
        for field in sorted(given - names.keys() - {"do_sample"}):
            yield f"generation.{field}: TRL's trainer for {self.training.task_type} has no such"
        for field in sorted(given & names.keys()):
            said = {**self.training.options, **_given(self.training)}.get(names[field])
            if said not in (None, getattr(self.generation, field)):
                yield f"generation.{field} and training.{names[field]} contradict"


def _given(block: TrainingBlock) -> dict[str, Any]:
    return {name: getattr(block, name) for name in block.model_fields_set}


class SftSpec(TrainingSpec):
    """Spec of ``sft``: learn texts, or answers to prompts, with all weights."""

    reads = frozenset({"training", "data"})

    training: SftTraining = Field(default_factory=SftTraining)

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        if self.training.completion_only_loss:
            yield from _without_answers(self.data)


class LoraSftSpec(SftSpec):
    """Spec of ``lora_sft``: the same with an adapter."""

    reads = frozenset({"training", "data", "lora"})

    training: LoraSftTraining = Field(default_factory=LoraSftTraining)
    lora: LoraBlock = Field(default_factory=LoraBlock)


class DpoSpec(TrainingSpec):
    """Spec of ``dpo``: learn to prefer one of two answers."""

    training: DpoTraining = Field(default_factory=DpoTraining)


class KtoSpec(TrainingSpec):
    """Spec of ``kto``: learn from single answers, each good or bad."""

    training: KtoTraining = Field(default_factory=KtoTraining)


class RewardSpec(TrainingSpec):
    """Spec of ``reward``: a model that scores answers, out of preferences."""

    training: RewardTraining = Field(default_factory=RewardTraining)


class GrpoSpec(TrainingSpec):
    """Spec of ``grpo``: try several answers, and learn from those with the better rewards."""

    reads = frozenset({*TrainingSpec.reads, "reward", "reward_model", "generation"})

    training: GrpoTraining = Field(default_factory=GrpoTraining)

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        yield from _without_reward(self)
        names = {name: name for name in _SAMPLING}
        yield from self._generation_conflicts({**names, "max_new_tokens": "max_completion_length"})


class PpoSpec(TrainingSpec):
    """Spec of ``ppo``: try answers, and move towards those that the reward likes."""

    reads = GrpoSpec.reads

    training: PpoTraining = Field(default_factory=PpoTraining)
    generation: GenerationBlock = Field(default_factory=GenerationBlock)

    def conflicts(self) -> Iterator[str]:
        """Yield what cannot be together."""
        yield from super().conflicts()
        yield from _without_reward(self)
        for name in ("eval", "eval_fraction"):
            if getattr(self.data, name):
                yield f"data.{name}: TRL's PPO does not evaluate; leave it out"
        names = {"max_new_tokens": "response_length", "temperature": "temperature"}
        yield from self._generation_conflicts({**names, "stop": "stop_token"})


def _without_answers(data: DataBlock) -> Iterator[str]:
    texts = data.form == "prompts" and all(isinstance(item, str) for item in data.prompts or ())
    if texts or "text" in data.columns:
        yield "training.completion_only_loss needs prompts with answers, or chats; data has texts"


def _without_reward(spec: TrainingSpec) -> Iterable[str]:
    if spec.reward_model is None and not spec.reward:
        yield f"{spec.training.task_type} needs reward_model or reward, to tell good answers by"


_BLOCKS = frozenset({"training", "data", "lora", "reward_model", "reward", "generation"})

SPECS: Mapping[str, type[TrainingSpec]] = {
    "sft": SftSpec,
    "lora_sft": LoraSftSpec,
    "dpo": DpoSpec,
    "ppo": PpoSpec,
    "grpo": GrpoSpec,
    "reward": RewardSpec,
    "kto": KtoSpec,
}
