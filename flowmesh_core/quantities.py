"""Durations and sizes as people write them: ``7d``, ``50GiB``."""

from __future__ import annotations

import re

__all__ = ["parse_duration_s", "parse_size_bytes"]

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?:([KMGTP])i?)?B?", re.IGNORECASE)


def parse_duration_s(text: str) -> float:
    """Read a number with its unit: s, m, h, d or w.

    Raises:
        ValueError: It is none; says what was expected.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError("a number with its unit, such as 90s, 30m, 12h, 7d or 2w")
    return float(match[1]) * _SECONDS[match[2]]


def parse_size_bytes(text: str) -> int:
    """Read a size; units are powers of 1024 with or without the ``i``.

    Raises:
        ValueError: It is none; says what was expected.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("a size, such as 500MiB, 50GiB, 2T or a number of bytes")
    return int(float(match[1]) * 1024 ** " KMGTP".index((match[2] or " ").upper()))
