"""What tests of jailed programs share: whether there can be a jail, and who is still alive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from flowmesh_agent.sandbox import probe

# Where every plugin must be whole, tests without a jail are to fail.
needs_jail = pytest.mark.skipif(
    probe().level != "strong" and os.environ.get("FLOWMESH_STRICT_PLUGINS") != "1",
    reason=f"programs cannot be jailed here: {probe().problem}",
)
HOLDS = ("namespaces", "landlock") if probe().namespaces else ("landlock",)


def alive(marker: str) -> list[int]:
    """Return the processes, zombies left out, that have a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
