"""Finds what is to be loaded among a task's inputs, and refuses what could not be; pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import AdapterRef, InputError, Inputs, ModelRef

__all__ = [
    "Weights",
    "find_config",
    "find_runtime_adapter",
    "find_weights",
    "read_adapter",
    "weight_file",
]

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt"),
    *("vocab.json", "tekken.json"),
)
# In the order in which vLLM and peft look for them.
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@attrs.frozen(kw_only=True)
class Weights:
    """All that one engine is loaded from.

    Attributes:
        model: A local folder, or an id on the model hub.
        revision: Branch, tag or commit of whichever of model and tokenizer is an id.
        tokenizer: Another folder or id, for a model that has no tokenizer of its own.
        merged: Adapters that become part of the weights, in the order in which they are applied.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    merged: tuple[AdapterRef, ...] = ()


def find_weights(inputs: Inputs) -> Weights:
    """Return what to load: the checkpoint in place of the model, or merged into it as an adapter.

    Raises:
        InputError: Naming all that is missing or of a kind that cannot be loaded.
    """
    checkpoint, adapters = inputs.checkpoint, inputs.adapters
    if checkpoint is not None and (checkpoint / "adapter_config.json").is_file():
        tuned = AdapterRef(name="checkpoint.load", path=checkpoint, apply="merge")
        checkpoint, adapters = None, (tuned, *adapters)
    bare = checkpoint is not None and not _has_tokenizer(checkpoint)
    merged = tuple(adapter for adapter in adapters if adapter.apply == "merge")
    problems = list(_adapter_problems(merged))
    if checkpoint is not None:
        problems += _folder_problems(checkpoint, "checkpoint.load")
    if checkpoint is None or bare:
        problems += _model_problems(inputs.model)
    if problems:
        raise InputError("; ".join(problems))
    base, revision = _name(inputs.model) if checkpoint is None or bare else (None, None)
    return Weights(
        model=str(checkpoint or base),
        revision=revision,
        tokenizer=base if bare else None,
        merged=merged,
    )


def find_runtime_adapter(inputs: Inputs) -> AdapterRef | None:
    """Return the adapter that is applied to each of a task's requests, if there is one.

    Raises:
        InputError: Naming what cannot be used, or all when there are several.
    """
    adapters = [adapter for adapter in inputs.adapters if adapter.apply != "merge"]
    problems = list(_adapter_problems(adapters))
    if len(adapters) > 1:
        problems.append(
            f"adapters {', '.join(adapter.name for adapter in adapters)}: vLLM applies one adapter "
            "to a request; give apply: merge to all but one"
        )
    if problems:
        raise InputError("; ".join(problems))
    return adapters[0] if adapters else None


def find_config(weights: Weights) -> dict[str, Any]:
    """Return the model's ``config.json``, from the hub if need be; empty when it cannot be had."""
    path = Path(weights.model) / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import hf_hub_download  # noqa: PLC0415 - rare

            path = Path(hf_hub_download(weights.model, "config.json", revision=weights.revision))
        config = json.loads(path.read_bytes())
    except (ImportError, OSError, ValueError):  # vLLM will say what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}


def read_adapter(adapter: AdapterRef) -> dict[str, Any]:
    """Read an adapter's ``adapter_config.json``.

    Raises:
        InputError: It is no JSON object, or not of a LoRA adapter.
    """
    path = adapter.path / "adapter_config.json"
    what = f"adapter {adapter.name}"
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise InputError(f"{what}: {path} must be a JSON file: {exc}") from exc
    if not isinstance(data, dict):
        raise InputError(f"{what}: {path} must hold a JSON object, got {type(data).__name__}")
    if data.get("peft_type") != "LORA":
        raise InputError(f"{what}: peft_type must be LORA, got {data.get('peft_type')!r}")
    return data


def weight_file(adapter: AdapterRef) -> Path:
    """Return the file of an adapter's folder that engines read.

    Raises:
        InputError: There is none.
    """
    for name in _ADAPTER_FILES:
        if (adapter.path / name).is_file():
            return adapter.path / name
    raise InputError(
        f"adapter {adapter.name}: {adapter.path} must hold {' or '.join(_ADAPTER_FILES)}"
    )


def _adapter_problems(adapters: Sequence[AdapterRef]) -> Iterator[str]:
    for adapter in adapters:
        if adapter.path.suffix == ".gguf" or not (adapter.path / "adapter_config.json").is_file():
            yield (
                f"adapter {adapter.name}: {adapter.path} must be a folder with "
                "adapter_config.json, as peft writes it; a GGUF adapter is for llama.cpp"
            )
            continue
        try:
            read_adapter(adapter)
            weight_file(adapter)
        except InputError as exc:
            yield str(exc)


def _model_problems(model: ModelRef | None) -> Iterator[str]:
    if model is None:
        yield "model.source must name a model"
    elif model.path is not None:
        yield from _folder_problems(model.path, "model.source")
    elif model.hub_id is None:
        yield f"model.source: {model.identifier} is not on this machine"


def _folder_problems(path: Path, what: str) -> Iterator[str]:
    if path.suffix == ".gguf" or (path.is_dir() and _is_gguf(path)):
        yield (
            f"{what}: {path} is in the GGUF format, which is not loaded here; name a folder with "
            "config.json and safetensors, or have flowmesh-llamacpp on the worker"
        )
    elif not (path / "config.json").is_file():
        yield (
            f"{what}: {path} must be a folder with config.json and weights as save_pretrained "
            "writes them, or a folder with adapter_config.json"
        )


def _is_gguf(folder: Path) -> bool:
    return not (folder / "config.json").is_file() and any(folder.glob("*.gguf"))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _name(model: ModelRef | None) -> tuple[str | None, str | None]:
    """Return a model's folder or id, and the revision of an id."""
    if model is None:
        return None, None
    if model.path is not None:
        return str(model.path), None
    return model.hub_id, model.revision
