"""How much memory a batch may take on the CPU."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["free_memory_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory that this process can still take, within its container's limit.

    Source: the Linux kernel's control group v2 documentation, memory controller.
    """
    free: int = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        fields = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(fields["inactive_file"])
    except (OSError, ValueError, KeyError):  # no limit, or none that can be read
        return free
    return max(0, min(free, limit - used + cached))
