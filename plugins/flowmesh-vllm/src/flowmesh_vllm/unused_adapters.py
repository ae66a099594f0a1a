"""Keeps vLLM on the CPU from computing adapters that no request brought.

vLLM calls ``register`` in each of its processes, by the entry point ``vllm.general_plugins``. Its
layers leave adapters out of a batch without any, all but the last one, whose adapter has a row for
each word of the vocabulary: that alone halved the speed.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Let the last layer leave them out as well; may come twice."""
    from vllm.platforms import current_platform  # noqa: PLC0415 - vLLM itself is calling

    if not current_platform.is_cpu():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: PLC0415 - as above

    add_lora_logits = PunicaWrapperCPU.add_lora_logits
    if hasattr(add_lora_logits, "__wrapped__"):
        return

    @functools.wraps(add_lora_logits)
    def add_if_any(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.no_lora:
            add_lora_logits(self, *args, **kwargs)

    PunicaWrapperCPU.add_lora_logits = add_if_any
