"""Finds the GGUF files among a task's inputs, and refuses what llama.cpp could not load."""

from __future__ import annotations

from pathlib import Path

from flowmesh_core import AdapterRef, InputError, Inputs
from flowmesh_llamacpp.gguf import find_gguf, read_metadata

__all__ = ["find_adapters", "find_weights"]


def find_weights(inputs: Inputs) -> Path:
    """Return the weights to load: those of the checkpoint, or else the model's.

    Raises:
        InputError: There are none here, or they are no single GGUF file.
    """
    if inputs.checkpoint is not None:
        return find_gguf(inputs.checkpoint, "checkpoint.load")
    if inputs.model is None or inputs.model.path is None:
        raise InputError("model.source must name a GGUF file that is on this machine")
    return find_gguf(inputs.model.path, "model.source")


def find_adapters(inputs: Inputs) -> list[AdapterRef]:
    """Return the adapters with the path of each one's GGUF file.

    Raises:
        InputError: One is no GGUF LoRA, or is to be merged.
    """
    return [_check_adapter(adapter) for adapter in inputs.adapters]


def _check_adapter(adapter: AdapterRef) -> AdapterRef:
    what = f"adapter {adapter.name}"
    if adapter.apply != "runtime":
        raise InputError(f"{what}: llama.cpp cannot honour apply: {adapter.apply}; use runtime")
    path = find_gguf(adapter.path, what)
    kind = read_metadata(path, what).get("general.type")
    if kind != "adapter":
        raise InputError(
            f"{what}: {path} must be a GGUF LoRA adapter, got general.type {kind!r}; convert a "
            "LoRA with convert_lora_to_gguf.py of llama.cpp"
        )
    return AdapterRef(name=adapter.name, path=path, scale=adapter.scale)
