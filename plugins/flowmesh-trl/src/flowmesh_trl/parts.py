"""Brings together what every trainer is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from peft import LoraConfig, TaskType
from transformers import set_seed

from flowmesh_trl.data import build_datasets
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.models import (
    Loading,
    Weights,
    check_adapter,
    find_weights,
    load_model,
    load_scorer,
    load_tokenizer,
)
from flowmesh_trl.saving import prepare_configs

__all__ = ["Parts", "gather_parts", "widen_trained"]


@attrs.frozen(kw_only=True)
class Parts:
    """What a trainer is made of.

    Attributes:
        spec: The document's ``spec``, validated.
        arguments: TRL's configuration.
        model: To be trained; a ``PeftModel`` when an adapter is continued.
        weights: What it was loaded from.
        loading: How.
        dataset: In the columns that the trainer takes.
        peft_config: For a new adapter.
        callbacks: Listen to the training.
    """

    spec: Any
    arguments: Any
    tokenizer: Any
    model: Any
    weights: Weights
    loading: Loading
    dataset: Any
    eval_dataset: Any
    peft_config: LoraConfig | None
    callbacks: Sequence[Any]

    def common(self) -> dict[str, Any]:
        """Return what all trainers take under the same names."""
        return {
            "args": self.arguments,
            "processing_class": self.tokenizer,
            "train_dataset": self.dataset,
            "eval_dataset": self.eval_dataset,
            "callbacks": list(self.callbacks),
        }

    @property
    def trains_adapter(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return self.peft_config is not None or hasattr(self.model, "peft_config")

    def load_reference(self) -> Any:
        """Load the model as it was before its training; None where it is the adapter's base.

        The trainers would load it by the name in the model's configuration, which says nothing of
        a checkpoint, a merged adapter, a GGUF file or a revision.
        """
        return None if self.trains_adapter else self.load_again()

    def load_again(self) -> Any:
        """Load another copy of the language model as it was before its training."""
        return load_model(self.weights, self.loading, train_adapter=False)


def gather_parts(
    job: TrainingJob, spec: Any, arguments: Any, callbacks: Sequence[Any], link: Link
) -> Parts:
    """Load data, tokenizer and model of a job.

    Raises:
        InputError: One of them cannot be used.
        ExecutorUnavailableError: A package is missing.
    """
    weights = find_weights(job.inputs)
    tokenizer = load_tokenizer(weights)
    dataset, eval_dataset = _read_data(job, spec, arguments, tokenizer)
    set_seed(arguments.seed)  # before new weights are drawn
    wants_adapter = spec.lora is not None
    loading = Loading(
        dtype=_dtype(arguments, wants_adapter=wants_adapter),
        attention=spec.training.attn_implementation,
    )
    if job.task_type == "reward":
        model = load_scorer(weights, loading, train_adapter=wants_adapter)
    else:
        model = load_model(weights, loading, train_adapter=wants_adapter)
    prepare_configs(model, tokenizer)
    peft_config = _lora(spec.lora, job.task_type) if wants_adapter else None
    if peft_config is not None and hasattr(model, "peft_config"):
        check_adapter(model, peft_config, set(spec.lora.model_fields_set))
        link.log(f"continues the adapter {weights.adapter}")
        peft_config = None
    return Parts(
        spec=spec,
        arguments=arguments,
        tokenizer=tokenizer,
        model=model,
        weights=weights,
        loading=loading,
        dataset=dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def _read_data(job: TrainingJob, spec: Any, arguments: Any, tokenizer: Any) -> tuple[Any, Any]:
    longest = spec.training.max_seq_length if job.task_type == "ppo" else None
    return build_datasets(
        job.task_type,
        job.inputs.rows,
        job.inputs.eval_rows,
        job.spec.get("data") or {},
        folder=job.folder,
        seed=arguments.seed,
        tokenizer=tokenizer,
        completion_only=bool(getattr(arguments, "completion_only_loss", False)),
        max_query_length=longest,
    )


def _dtype(arguments: Any, *, wants_adapter: bool) -> torch.dtype:
    """Return what the weights are kept in.

    Weights that are trained stay in 32 bits, or small steps would be rounded away; those under an
    adapter do not change and may be short.
    """
    if not wants_adapter:
        return torch.float32
    if arguments.bf16:
        return torch.bfloat16
    return torch.float16 if arguments.fp16 else torch.float32


def widen_trained(model: Any, *, generates: bool) -> None:
    """Put all that is trained in 32 bits, as ``_dtype`` says; peft leaves what is not LoRA short.

    That is a new score, ``modules_to_save`` and biases.

    Args:
        model: With adapter and all, on the point of being trained.
        generates: Whether the trainer has it write outside of mixed precision, which takes one
            type throughout.
    """
    small = (torch.bfloat16, torch.float16)
    short = [item for item in model.parameters() if item.requires_grad and item.dtype in small]
    if short and generates:
        model.float()
    for weight in short:
        weight.data = weight.data.float()


def _lora(lora: Any, task_type: str) -> LoraConfig:
    kind = TaskType.SEQ_CLS if task_type == "reward" else TaskType.CAUSAL_LM
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        task_type=lora.task_type or kind,
    )
