"""Says whether an answer fits a JSON schema; a program where the check may not come to an end."""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from flowmesh_core import ContractError

__all__ = ["CHECK_S", "SHOWN_CHARS", "find_misfit"]

CHECK_S = 10
"""Processor time of the program."""
SHOWN_CHARS = 500


def find_misfit(schema: Any, answer: Any) -> str:
    """Return what does not fit, or nothing.

    Raises:
        ContractError: The schema refers to what is not in it.
    """
    # An empty registry: a reference leads nowhere but into the schema, least of all to a URL.
    checker = jsonschema.Draft202012Validator(schema, registry=Registry())
    try:
        problem = next(checker.iter_errors(answer), None)
    except Unresolvable as exc:
        raise ContractError(f"output_schema: {exc.ref} leads nowhere") from exc
    return f"{problem.json_path}: {problem.message[:SHOWN_CHARS]}" if problem else ""


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CHECK_S, CHECK_S))
    sys.stdout.write(json.dumps(find_misfit(*json.load(sys.stdin))))
