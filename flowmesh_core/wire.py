"""Text on the wire: JSON and time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from flowmesh_core.errors import ContractError

__all__ = ["MAX_DEPTH", "decode_json", "encode_json", "utc_now", "value_at"]

# Deeper documents are refused: walking them would end in a RecursionError somewhere.
MAX_DEPTH = 200


def utc_now() -> str:
    """Return the wall clock as the wire writes it: RFC 3339, UTC, microseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def decode_json(text: bytes | str) -> Any:
    """Parse JSON and turn every way in which that fails into one ``ContractError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ContractError(f"message nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as exc:
        raise ContractError(f"message must be JSON in UTF-8: {exc}") from exc


def value_at(document: Mapping[str, Any], path: str) -> Any:
    """Return what stands at a dotted path; None when a part of it is not there.

    ``steps[kind=test]`` stands for those entries of the list ``steps`` whose ``kind`` is ``test``;
    None when there are none.
    """
    value: Any = document
    for part in path.split("."):
        name, _, condition = part.partition("[")
        value = value.get(name) if isinstance(value, Mapping) else None
        if condition:
            value = _entries(value, *condition.rstrip("]").split("=")) or None
    return value


def _entries(values: Any, key: str, wanted: str) -> list[Any]:
    entries = values if isinstance(values, list) else []
    return [one for one in entries if isinstance(one, Mapping) and one.get(key) == wanted]


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """Write JSON as the wire has it: UTF-8, not ASCII-escaped, strictly valid.

    NaN and infinities become ``null``, which is what JSON has for them; a lone surrogate, which
    UTF-8 cannot hold, makes the whole text ASCII-escaped instead.

    Raises:
        TypeError: A value is of a type that JSON does not know; the message names where it stands.
        ValueError: An integer is too long to be written.
        RecursionError: The value nests too deeply, or holds itself.
    """
    try:
        text = _dump(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        value = _without_nan(value)
        text = _dump(value, ensure_ascii=False, indent=indent)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _dump(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, **options)
    except TypeError as exc:
        raise TypeError(f"{_first_unknown(value) or 'value'} is not JSON: {exc}") from exc


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _first_unknown(value: Any, path: str = "") -> str:
    if isinstance(value, dict):
        children: Iterable[tuple[str, Any]] = ((f"{path}.{key}", v) for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        children = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    else:
        known = isinstance(value, (str, int, float, bool, type(None)))
        return "" if known else f"{path.lstrip('.') or 'value'} of type {type(value).__name__}"
    return next((found for at, item in children if (found := _first_unknown(item, at))), "")
