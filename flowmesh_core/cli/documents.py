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


def read_document(path: Path, assignments: Iterable[str] = ()) -> Any:
    """Return the YAML or JSON document of a file.

    Args:
        path: One document; JSON is YAML.
        assignments: ``spec.inference.max_tokens=64``; the value is YAML, missing keys are made.

    Raises:
        ContractError: The file is no YAML, holds several documents, or an assignment does not fit.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
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
    steps = [name or int(index) for name, index in _STEP.findall(path)]
    if not equals or not steps:
        raise ContractError(f"--set must be PATH=VALUE, got {assignment!r}")
    try:
        holder = document
        for step, following in pairwise(steps):
            if isinstance(holder, dict) and step not in holder:
                holder[step] = [] if isinstance(following, int) else {}
            holder = holder[step]
        holder[steps[-1]] = yaml.safe_load(text)
    except (TypeError, IndexError, KeyError, yaml.YAMLError) as exc:
        raise ContractError(f"--set {assignment!r} does not fit the document: {exc}") from exc
