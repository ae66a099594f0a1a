"""Proximal policy optimization: answers are tried, and what made the better ones is reinforced."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers import TrainerCallback
from trl.experimental.ppo import PPOTrainer

from flowmesh_core import ContractError, InputError
from flowmesh_trl.grpo import gather_rewards
from flowmesh_trl.job import TrainingJob
from flowmesh_trl.models import put_score_on
from flowmesh_trl.parts import Parts
from flowmesh_trl.queries import QueryCollator, QueryRewards, query_width

__all__ = ["build_trainer"]

_CRITIC = "value_model.safetensors"
# What all other trainers call otherwise.
_USUAL = {"lr": "learning_rate", "objective/scores": "reward", "objective/kl": "kl"}


def build_trainer(job: TrainingJob, parts: Parts) -> Any:
    """Put a ``PPOTrainer`` together.

    The critic is the starting model with a fresh head, trained beside the policy; what is rewarded
    comes from the document alone.

    Raises:
        ContractError: ``generation.stop`` is several tokens.
        InputError: There are too few rows.
    """
    _check_rows(parts)
    ends = parts.model.generation_config.eos_token_id
    tokenizer = _with_own_padding(parts.tokenizer)
    _set_stop(parts, tokenizer)
    width = query_width(parts.dataset)
    reward = QueryRewards(
        gather_rewards(job, parts), tokenizer=tokenizer, queries=[parts.dataset], width=width
    )
    common = {**parts.common(), "processing_class": tokenizer}
    common["eval_dataset"] = parts.dataset  # it wants one, and never reads it
    trainer = _Trainer(
        model=parts.model,
        ref_model=_load_reference(parts),
        reward_model=reward,
        value_model=put_score_on(parts.load_again()),
        data_collator=QueryCollator(width=width, pad_token_id=tokenizer.pad_token_id),
        peft_config=parts.peft_config,
        **common,
    )
    trainer.plain_tokenizer, trainer.plain_ends = parts.tokenizer, ends
    return trainer


def _check_rows(parts: Parts) -> None:
    """Refuse rows that fill no batch: the trainer would wait for one for ever."""
    arguments, rows = parts.arguments, len(parts.dataset)
    processes = arguments.distributed_state.num_processes
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    if rows < per_process * processes:
        raise InputError(
            f"spec.data has {rows} rows to train on, and one batch takes {per_process * processes} "
            "(batch_size * gradient_accumulation_steps * processes); give more rows, or a smaller "
            "training.batch_size"
        )


def _load_reference(parts: Parts) -> Any:
    """Load what the policy is held to; None where it is the policy without its adapter.

    TRL cannot take the adapter off in one of several processes.
    """
    alone = parts.arguments.distributed_state.num_processes == 1
    if parts.trains_adapter and parts.weights.adapter is None and alone:
        return None
    return parts.load_again()


class _Trainer(PPOTrainer):  # type: ignore[misc] # the library has no types
    """TRL's trainer, which can go on from a checkpoint.

    Attributes:
        plain_tokenizer: What is saved: the tokenizer as it came.
        plain_ends: What is saved: the end tokens of the model as it came, in place of the one at
            which its answers are cut here.
    """

    model: Any
    processing_class: Any
    plain_tokenizer: Any
    plain_ends: Any
    is_distributed_loading_by_transformers = False  # TRL's forgets to say

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """Train; after a checkpoint, only the updates that are left."""
        if resume_from_checkpoint is not None:
            self._go_on(Path(resume_from_checkpoint))
        return super().train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under the usual names, with the loss that is minimized."""
        named = {_USUAL.get(key, key): value for key, value in logs.items()}
        if "loss/policy_avg" in logs:
            named["loss"] = logs["loss/policy_avg"] + self.args.vf_coef * logs["loss/value_avg"]
        super().log(named, start_time)

    def _go_on(self, checkpoint: Path) -> None:
        wrapped = self.accelerator.unwrap_model(self.model)
        self._load_from_checkpoint(str(checkpoint), wrapped.policy)
        load_weights(wrapped.value_model, checkpoint / _CRITIC)
        for part, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            if (checkpoint / name).is_file():  # DeepSpeed keeps its own
                part.load_state_dict(
                    torch.load(checkpoint / name, map_location="cpu", weights_only=True)
                )
        self._load_rng_state(str(checkpoint))
        state = type(self.state).load_from_json(str(checkpoint / "trainer_state.json"))
        self.args.num_total_batches -= state.global_step
        self.add_callback(_Before(state))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone; TRL's own way does not find it in one of several processes."""
        wrapped, padding = self.model, self.processing_class
        settings = self.accelerator.unwrap_model(wrapped).policy.generation_config
        stop, settings.eos_token_id = settings.eos_token_id, self.plain_ends
        if not self.is_deepspeed_enabled:
            self.model = self.accelerator.unwrap_model(wrapped)
        self.processing_class = self.plain_tokenizer
        super().save_model(output_dir, _internal_call)
        self.model, self.processing_class = wrapped, padding
        settings.eos_token_id = stop

    def create_model_card(self, *_args: Any, **_more: Any) -> None:
        """Write none into checkpoints; TRL's own stumbles over several processes."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # first, as trainer_state.json says that all is there
            critic = self.accelerator.unwrap_model(model).value_model
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(critic, folder / _CRITIC)
        super()._save_checkpoint(model, trial)


class _Before(TrainerCallback):  # type: ignore[misc] # as above
    """Lets a training count on from where an earlier one stopped; TRL's begins at 0."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """Count on, and keep what was logged."""
        state.global_step = self._state.global_step
        state.episode = self._state.episode
        state.max_steps += self._state.global_step
        state.log_history = list(self._state.log_history)


def _with_own_padding(tokenizer: Any) -> Any:
    """Return a tokenizer whose padding is no token of any text.

    The trainer takes whatever is padding out of queries, which would be the end of every message
    where the two are one. It never shows padding to a model, so its number may be a new one.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "<|flowmesh_padding|>"})
    return own


def _set_stop(parts: Parts, tokenizer: Any) -> None:
    """Set the token that ends an answer: the model's own end token unless the document says one.

    Raises:
        ContractError: What it says is several tokens.
    """
    stop = parts.spec.generation.stop
    arguments = parts.arguments
    if stop in (None, "eos", tokenizer.eos_token):
        arguments.stop_token = None if arguments.stop_token_id else "eos"
        return
    tokens = tokenizer.encode(stop, add_special_tokens=False)
    if len(tokens) != 1:
        raise ContractError(
            f"generation.stop must be one token of the model, and {stop!r} is {len(tokens)}; "
            "leave it out for its own end token"
        )
    arguments.stop_token, arguments.stop_token_id = None, tokens[0]
