"""Read a workflow file and apply ``--set`` to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from flowmesh_core.errors import ContractError

__all__ = ["read_document"]

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*\Z")


def read_document(path: Path, assignments: Iterable[str] = ()) -> Any:
    """Return the YAML or JSON document of a file.

    Args:
        path: One document; JSON is YAML.
        assignments: ``spec.inference.max_tokens=64``; the value is YAML, missing keys are made.

    Raises:
        ContractError: The file cannot be read, is no YAML, holds several documents, or an
            assignment does not fit.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as exc:
        raise ContractError(f"cannot be read: {exc.strerror}", where=str(path)) from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        text = " ".join(str(exc).split())
        raise ContractError(f"must be a YAML document: {text}", where=str(path)) from exc
    if len(documents) != 1:
        raise ContractError(
            f"must hold one YAML document, got {len(documents)}; send them one by one",
            where=str(path),
        )
    document = documents[0]
    for assignment in assignments:
        _assign(document, assignment)
    return document


def _assign(document: Any, assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not _PATH.match(path):
        raise ContractError(f"--set must be PATH=VALUE, such as a.b[0]=1, got {assignment!r}")
    steps = [name or int(index) for name, index in _STEP.findall(path)]
    try:
        value = yaml.safe_load(text)
        holder = document
        for step, following in pairwise(steps):
            holder = _enter(holder, step, [] if isinstance(following, int) else {})
        _put(holder, steps[-1], value)
    except (IndexError, TypeError, ValueError, yaml.YAMLError) as exc:
        raise ContractError(f"--set {assignment!r} does not fit the document: {exc}") from exc


def _enter(holder: Any, step: str | int, default: Any) -> Any:
    """Return what stands at a step; what is missing or null there is made."""
    there = holder.get(step) if isinstance(holder, dict) else None
    if isinstance(holder, list) and isinstance(step, int) and step < len(holder):
        there = holder[step]
    if there is None:
        _put(holder, step, default)
        return default
    return there


def _put(holder: Any, step: str | int, value: Any) -> None:
    """Set one entry; an index may also be the first one after the end."""
    if isinstance(step, str) and isinstance(holder, dict):
        holder[step] = value
    elif isinstance(step, int) and isinstance(holder, list):
        if step > len(holder):
            raise IndexError(f"index {step} is beyond the end, which is {len(holder)}")
        holder[step : step + 1] = [value]
    else:
        wanted = "an object" if isinstance(step, str) else "a list"
        raise TypeError(f"{step!r} needs {wanted}, got {type(holder).__name__}")
