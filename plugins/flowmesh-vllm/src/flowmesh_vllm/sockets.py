"""Where vLLM's processes meet: it leaves its sockets behind, so they get a folder that goes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

__all__ = ["SOCKETS", "own_sockets", "use_sockets"]

# vLLM's name of the folder; below it there is room for some 70 characters.
SOCKETS = "VLLM_RPC_BASE_PATH"


def own_sockets() -> tempfile.TemporaryDirectory[str]:
    """Return an empty folder, below the operator's if there is one; whoever asks removes it."""
    parent = os.environ.get(SOCKETS)  # noqa: TID251 - vLLM's own variable, only read
    return tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True)


@contextlib.contextmanager
def use_sockets(folder: str) -> Iterator[None]:
    """Let what vLLM starts meanwhile meet in a folder."""
    environ = os.environ  # noqa: TID251 - vLLM takes it from nowhere else
    before = environ.get(SOCKETS)
    environ[SOCKETS] = folder
    try:
        yield
    finally:
        environ.pop(SOCKETS) if before is None else environ.update({SOCKETS: before})
