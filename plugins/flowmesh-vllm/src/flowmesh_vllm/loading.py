"""What is settled before vLLM loads a model: its configuration, and what the platform can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models.interfaces import supports_lora
from vllm.platforms import current_platform

__all__ = ["build_config", "can_sleep", "known_arguments", "size_of_weights"]


def known_arguments() -> set[str]:
    """Return the names of all engine arguments of this vLLM."""
    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def build_config(given: Mapping[str, Any]) -> Any:
    """Return vLLM's configuration, with adapters where the model's architecture takes them."""
    arguments = AsyncEngineArgs(**given)
    config = arguments.create_engine_config()
    if given.get("enable_lora") is not None:
        return config
    model = config.model_config
    kind, _ = model.registry.resolve_model_cls(model.architectures, model)
    if not supports_lora(kind):
        return config
    arguments.enable_lora = True
    return arguments.create_engine_config()


def can_sleep() -> bool:
    """Tell whether the GPU's memory can be given back; elsewhere vLLM refuses to start so."""
    if not current_platform.is_sleep_mode_available():
        return False
    if not (current_platform.is_cuda() or current_platform.is_rocm()):
        return True
    from vllm.device_allocator.cumem import cumem_available  # noqa: PLC0415 - loads the driver

    return bool(cumem_available)


def size_of_weights(model: str) -> int:
    """Return the bytes of a model's files; 0 for one that is on the hub."""
    files = (file for kind in ("safetensors", "bin") for file in Path(model).glob(f"*.{kind}"))
    return sum(file.stat().st_size for file in files)
