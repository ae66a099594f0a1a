"""What listens to a training: it reports each step, and stops it in time, with a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from flowmesh_core import CancelledError
from flowmesh_trl.job import Link

__all__ = ["AlreadyDone", "Reporter", "StopAtStepEnd", "readable_number"]

_IN_THE_LOG = ("loss", "eval_loss", "learning_rate", "grad_norm", "reward", "kl", "tokens_per_s")


class AlreadyDone(Exception):  # noqa: N818 - no error
    """The checkpoint that a training goes on from is that of its last step."""


class Reporter(TrainerCallback):  # type: ignore[misc] # the library has no types
    """Reports every step, with all numbers where the trainer logs some.

    Args:
        link: Gets the reports; only the first rank's are sent.
        clock: Monotonic, in seconds.
    """

    def __init__(self, link: Link, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._begun = (0, 0.0)
        self._reported = -1
        self._tokens = (0.0, 0.0)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """Remember where the training begins."""
        self._begun = (state.global_step, self._clock())
        self._tokens = (0.0, self._clock())

    def on_step_end(self, _args: Any, state: Any, control: Any, **_more: Any) -> None:
        """Report a step; one whose numbers are about to be logged is reported with them."""
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last loss is wanted, whatever the interval
        if not control.should_log and self._reported != state.global_step:
            self._report(state, {})

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: Mapping[str, Any], **_more: Any
    ) -> None:
        """Report what the trainer logged."""
        if "train_runtime" in logs:  # a summary, not a step
            return
        values = {**logs, **self._speed(logs.get("num_tokens"))}
        self._report(state, values)
        if not state.is_world_process_zero:
            return
        shown = [f"{key} {readable_number(values[key])}" for key in _IN_THE_LOG if key in values]
        self._link.log(f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}")
        wrong = [key for key in ("loss", "eval_loss") if not math.isfinite(values.get(key, 0.0))]
        if wrong:
            self._link.log(
                f"warning: step {state.global_step}: {wrong[0]} is {values[wrong[0]]}; "
                "a lower learning_rate or max_grad_norm may help"
            )

    def _report(self, state: Any, values: Mapping[str, Any]) -> None:
        self._reported = state.global_step
        if not state.is_world_process_zero:
            return
        first, begun = self._begun
        done = state.global_step - first
        left = state.max_steps - state.global_step
        eta = {"eta_s": round((self._clock() - begun) / done * left, 1)} if done else {}
        self._link.progress(
            step=state.global_step,
            total=state.max_steps,
            **{"epoch": state.epoch, **eta, **_numbers(values)},
        )

    def _speed(self, tokens: float | None) -> dict[str, float]:
        if tokens is None:
            return {}
        before, since = self._tokens
        self._tokens = (tokens, self._clock())
        elapsed = self._tokens[1] - since
        return {"tokens_per_s": round((tokens - before) / elapsed, 1)} if elapsed > 0 else {}


class StopAtStepEnd(TrainerCallback):  # type: ignore[misc] # as above
    """Ends a training that is cancelled: after its step, with a checkpoint, in all ranks at once.

    Args:
        link: Is asked at the end of each step.
        task_id: For the message.
    """

    def __init__(self, link: Link, *, task_id: str) -> None:
        self._link = link
        self._task_id = task_id
        self._stopped = False

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """Make no step beyond the last one, which the trainer would within an epoch.

        Raises:
            AlreadyDone: The weights are loaded, and there is nothing left to do.
        """
        if 0 < state.max_steps <= state.global_step:
            raise AlreadyDone

    def on_step_end(self, args: Any, _state: Any, control: Any, **_more: Any) -> None:
        """Ask, agree, and have the checkpoint written."""
        if _agree(self._link.stopping, args.device):
            self._stopped = True
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, _control: Any, **_more: Any) -> None:
        """End the training once the checkpoint is there.

        Raises:
            CancelledError: The training was to stop.
        """
        if not self._stopped:
            return
        _agree(asked=True, device=args.device)  # who leaves first would end those still writing
        raise CancelledError(
            f"task {self._task_id}: cancelled at step {state.global_step} of {state.max_steps}; "
            f"its state is in checkpoints/checkpoint-{state.global_step}"
        )


def readable_number(value: Any) -> str:
    """Return a number as people read it: four digits that count."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _agree(asked: bool, device: Any) -> bool:
    """Return whether any rank was asked; every rank must call this."""
    if not distributed.is_available() or not distributed.is_initialized():
        return asked
    vote = torch.tensor(int(asked), device=device)
    distributed.all_reduce(vote, op=distributed.ReduceOp.MAX)
    return bool(vote.item())


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be reported: finite numbers under names that reports do not use."""
    taken = {"step", "total", "fraction", "message", "epoch"}
    return {
        key: value
        for key, value in values.items()
        if key not in taken and isinstance(value, (int, float)) and math.isfinite(value)
    }
