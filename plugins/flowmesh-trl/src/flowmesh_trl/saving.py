"""Writes what a training leaves: the final model or adapter, its card, and the numbers."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flowmesh_trl.callbacks import readable_number

__all__ = [
    "mean_loss",
    "prepare_configs",
    "save_final",
    "trained_model",
    "write_card",
    "write_metrics",
]

_PACKAGES = ("flowmesh-trl", "trl", "transformers", "peft", "accelerate", "datasets", "torch")
_TITLES = {
    "sft": "supervised fine-tuning",
    "lora_sft": "supervised fine-tuning of a LoRA adapter",
    "dpo": "direct preference optimization",
    "ppo": "proximal policy optimization",
    "grpo": "group relative policy optimization",
    "reward": "training of a reward model",
    "kto": "Kahneman-Tversky optimization",
}


def save_final(trainer: Any, folder: Path, *, base: str, card: str) -> Path:
    """Write the final model, or the adapter, with all that loading it takes. Every rank calls this.

    Args:
        trainer: After its training.
        folder: The attempt's folder.
        base: What the model that was trained is called; an adapter names it.
        card: Text of its README.md.

    Returns:
        ``final_model``, or ``final_lora`` for an adapter, in ``folder``.
    """
    is_adapter = hasattr(trained_model(trainer), "peft_config")
    final = folder / ("final_lora" if is_adapter else "final_model")
    trainer.save_model(str(final))
    if trainer.args.should_save:
        shutil.rmtree(final / "ref", ignore_errors=True)  # the reference of a continued adapter
        (final / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
        if is_adapter:
            _name_base(final / "adapter_config.json", base)
        (final / "README.md").write_text(card, encoding="utf-8")
    return final


def trained_model(trainer: Any) -> Any:
    """Return the model that a trainer trains, without what it is wrapped in."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return getattr(model, "policy", model)


def write_card(
    *, task_type: str, base: str, dataset_size: int, steps: int, loss: float | None, adapter: bool
) -> str:
    """Return the text of a model card."""
    front = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "tags": ["flowmesh", "trl", task_type.replace("_", "-")],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    what = "An adapter for" if adapter else "A model made from"
    told = "" if loss is None else f" Its mean loss was {readable_number(loss)}."
    return (
        "---\n" + "\n".join(lines) + "\n---\n\n"
        f"# {base}, {_TITLES[task_type]}\n\n"
        f"{what} `{base}` by {_TITLES[task_type]} with TRL, on {dataset_size} records in {steps} "
        f"steps.{told} The numbers of every step are in `training_metrics.json` beside this "
        "folder.\n"
    )


def mean_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean loss over all steps; each logged one stands for those since the last."""
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None


def write_metrics(file: Path, summary: Mapping[str, Any], history: Sequence[Any]) -> None:
    """Write the numbers of a training as JSON; those that are none become null."""
    data = {**summary, "versions": _versions(), "history": list(history)}
    file.write_text(json.dumps(_finite(data), indent=1) + "\n", encoding="utf-8")


def prepare_configs(model: Any, tokenizer: Any) -> None:
    """Bring a loaded model's settings in line with its tokenizer, and make them valid.

    A model whose settings for sampling contradict themselves cannot be saved, and that would be
    noticed only after its training.
    """
    generation = getattr(model, "generation_config", None)
    for config in filter(None, (model.config, generation)):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(tokenizer, name))
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True  # temperature, top_p and the like need it


def _name_base(file: Path, base: str) -> None:
    config = json.loads(file.read_bytes())
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
