"""Task messages as workers get them, in every spelling that ``parse_message`` must read.

They are addressed to worker ``w1``, and each is a file of ``messages/`` beside this module.
"""

from __future__ import annotations

from importlib import resources

__all__ = ["recorded_messages"]


def recorded_messages() -> dict[str, bytes]:
    """Return the body of each message by the name of what is special about it."""
    folder = resources.files(__package__) / "messages"
    files = [file for file in folder.iterdir() if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): file.read_bytes() for file in sorted(files, key=str)}
