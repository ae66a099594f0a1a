"""From the ``[n]`` of an answer to the sources that were shown under these numbers; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flowmesh_rag.stores.base import Hit

__all__ = ["cite"]

_MARK = re.compile(r"\[\s*([0-9]{1,4}(?:\s*[,;]\s*[0-9]{1,4})*)\s*\]")
_PLACE = ("source", "title", "page", "start", "end")


def cite(text: str, shown: Sequence[Hit]) -> tuple[list[dict[str, Any]], int]:
    """Return what an answer refers to.

    Args:
        text: The answer; ``[1]``, ``[1][2]`` and ``[1, 2]`` are marks.
        shown: The hits that the model saw, numbered from 1.

    Returns:
        One citation per number in order of its first mark, and how many numbers there were that
        nothing was shown under.
    """
    marks = [int(number) for mark in _MARK.finditer(text) for number in re.findall(r"\d+", mark[1])]
    numbers = dict.fromkeys(marks)
    known = [number for number in numbers if 1 <= number <= len(shown)]
    return [_citation(number, shown[number - 1]) for number in known], len(numbers) - len(known)


def _citation(number: int, hit: Hit) -> dict[str, Any]:
    payload = hit.payload or {}
    place = {name: payload[name] for name in _PLACE if payload.get(name) is not None}
    return {"number": number, "id": hit.id, **place}
