"""Answers by JSON schema: how a model is held to one, and whether its answer fits."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from subprocess import PIPE, Popen
from typing import Any

import jsonschema
from pydantic_ai import ModelRetry, NativeOutput, PromptedOutput, StructuredDict, ToolOutput
from pydantic_ai.exceptions import UserError

from flowmesh_agent.schema_check import SHOWN_CHARS, find_misfit
from flowmesh_core import ContractError

__all__ = ["build_output", "build_validator"]

_PATTERNS = {"pattern", "patternProperties"}  # of which one may take longer than the world is old
_MODES = {
    "auto": NativeOutput,
    "native": NativeOutput,
    "tool": ToolOutput,
    "prompted": PromptedOutput,
}


def build_output(schema: Mapping[str, Any], mode: str) -> Any:
    """Return the type of output that the library asks a model for.

    Args:
        schema: JSON schema, an object at the root.
        mode: ``auto``, ``native``, ``tool`` or ``prompted``.

    Raises:
        ContractError: It is no JSON schema, or refers to what is not in it or to itself.
    """
    _check(schema)
    try:
        return _MODES[mode](StructuredDict(dict(schema), name="answer"))
    except UserError as exc:
        raise ContractError(f"output_schema: {exc}") from exc


def build_validator(schema: Mapping[str, Any]) -> Callable[[Any], Awaitable[Any]]:
    """Return a check of answers, which asks the model again; the library takes any object."""
    slow = any(key in _PATTERNS for key, _ in _pairs(schema))

    async def check(answer: Any) -> Any:
        given = (dict(schema), dict(answer))
        problem = await _find_apart(*given) if slow else find_misfit(*given)
        if problem:
            raise ModelRetry(problem)
        return answer

    return check


async def _find_apart(*given: Any) -> str:
    """Return what ``find_misfit`` finds, in a process that a cancel can end."""
    argv = [sys.executable, "-P", "-m", find_misfit.__module__]
    process = Popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE)  # noqa: S603 - our own program
    try:
        found, said = await asyncio.to_thread(process.communicate, json.dumps(given).encode())
    finally:
        process.kill()  # and the thread, which waits for it, ends too
    if process.returncode:
        why = said.decode(errors="replace").strip().rpartition("\n")[2]
        why = why or "a pattern takes too long"
        raise ContractError(f"output_schema cannot be checked: {why[:SHOWN_CHARS]}")
    return str(json.loads(found))


def _check(schema: Mapping[str, Any]) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as exc:
        raise ContractError(f"output_schema: {exc.json_path}: {exc.message[:SHOWN_CHARS]}") from exc
    known = {f"#/$defs/{name}" for name in schema.get("$defs", {})}
    found = {str(value) for key, value in _pairs(schema) if key in ("$ref", "$dynamicRef")}
    if strange := sorted(found - known):
        raise ContractError(f"output_schema refers to {', '.join(strange)}, not among its $defs")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key with its value, wherever in the schema they stand."""
    if isinstance(value, Mapping):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _pairs(item)
