"""How much memory an engine may take, on the task's GPUs or on the machine."""

from __future__ import annotations

from collections.abc import Sequence

from flowmesh_core import GpuReader, available_memory_bytes
from flowmesh_vllm.arguments import Room

__all__ = ["find_room"]


def find_room(devices: Sequence[str], reader: GpuReader | None = None) -> Room:
    """Measure what is free now.

    Args:
        devices: The task's GPUs, as ``ctx.devices`` has them; empty on the CPU.
        reader: Asks the driver; made when it is not given.
    """
    if not devices:
        return Room(free_bytes=available_memory_bytes())
    gpus = reader or GpuReader()
    found = [memory for device in devices if (memory := gpus.memory_bytes(device))]
    free = min((memory.free / memory.total for memory in found), default=None)
    return Room(gpus=len(devices), gpu_free=free, free_bytes=available_memory_bytes())
