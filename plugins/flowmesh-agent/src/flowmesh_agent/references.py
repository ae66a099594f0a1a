"""``${env.NAME}`` in the operator's own files; documents have their secrets from the core."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["resolve_references"]

_REFERENCE = re.compile(r"\$\{env\.([^{}]*)\}")


def resolve_references(text: str, environ: Mapping[str, str], *, prefix: str) -> str:
    """Return a text with variables in place of the references to them.

    Args:
        text: Of the operator, never of a document.
        environ: The variables.
        prefix: What the name of each must begin with.

    Raises:
        ValueError: A variable is not set, or has another name.
    """

    def value_of(found: re.Match[str]) -> str:
        if found[1].startswith(prefix) and found[1] in environ:
            return environ[found[1]]
        raise ValueError(f"{found[0]} must name a variable that is set and begins with {prefix}")

    return _REFERENCE.sub(value_of, text)
