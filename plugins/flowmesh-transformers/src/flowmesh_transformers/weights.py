"""Finds what is to be loaded among a task's inputs, and refuses what could not be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import AdapterRef, InputError, Inputs

__all__ = ["Origin", "Weights", "find_weights", "read_json"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt")


@attrs.frozen(kw_only=True)
class Origin:
    """Where the library reads a model or a tokenizer from.

    Attributes:
        name: A local folder, or an id on the model hub.
        revision: Branch, tag or commit on the hub.
        gguf_file: Name of the GGUF file in the folder, for weights in that format.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` takes beside the name."""
        found = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {key: value for key, value in found.items() if value is not None}


@attrs.frozen(kw_only=True)
class Weights:
    """All that one engine is loaded from."""

    model: Origin
    tokenizer: Origin
    adapters: tuple[AdapterRef, ...] = ()


def find_weights(inputs: Inputs) -> Weights:
    """Return what to load: the checkpoint in place of the model, or on top of it as an adapter.

    Raises:
        InputError: Something is missing or of a kind that cannot be loaded.
    """
    adapters = [_check_adapter(adapter) for adapter in inputs.adapters]
    checkpoint = inputs.checkpoint
    if checkpoint is None or (checkpoint / "adapter_config.json").is_file():
        base = _find_base(inputs)
        if checkpoint is not None:
            tuned = AdapterRef(name="checkpoint.load", path=checkpoint)
            adapters.insert(0, _check_adapter(tuned))
        return Weights(model=base, tokenizer=base, adapters=tuple(adapters))
    model = _local_origin(checkpoint, "checkpoint.load")
    own = model.gguf_file or _has_any(checkpoint, _TOKENIZER_FILES)
    return Weights(
        model=model, tokenizer=model if own else _find_base(inputs), adapters=tuple(adapters)
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        InputError: It is none.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise InputError(f"{path} must be a JSON file: {exc}") from exc
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _find_base(inputs: Inputs) -> Origin:
    model = inputs.model
    if model is None:
        raise InputError("model.source must name a model")
    if model.path is not None:
        return _local_origin(model.path, "model.source")
    if model.hub_id is None:
        raise InputError(f"model.source: {model.identifier} is not on this machine")
    return Origin(name=model.hub_id, revision=model.revision)


def _local_origin(path: Path, what: str) -> Origin:
    if path.suffix == ".gguf":
        return Origin(name=str(path.parent), gguf_file=path.name)
    if (path / "config.json").is_file():
        return Origin(name=str(path))
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return Origin(name=str(path), gguf_file=files[0].name)
    raise InputError(
        f"{what}: {path} must be a folder with config.json and weights as save_pretrained writes "
        "them, a folder with adapter_config.json, or a .gguf file"
    )


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _check_adapter(adapter: AdapterRef) -> AdapterRef:
    what = f"adapter {adapter.name}"
    if not (adapter.path / "adapter_config.json").is_file():
        raise InputError(
            f"{what}: {adapter.path} must be a folder with adapter_config.json; a GGUF adapter is "
            "for llama.cpp"
        )
    kind = read_json(adapter.path / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise InputError(f"{what}: peft_type must be LORA, got {kind!r}")
    return adapter
