"""Answers by JSON schema: how a model is held to one, and whether its answer fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jsonschema
from pydantic_ai import ModelRetry, NativeOutput, PromptedOutput, StructuredDict, ToolOutput
from referencing import Registry
from referencing.exceptions import Unresolvable

from flowmesh_core import ContractError

__all__ = ["build_output", "build_validator"]

SHOWN_CHARS = 500
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
        ContractError: It is no JSON schema, or refers to what is not in it.
    """
    _check(schema)
    return _MODES[mode](StructuredDict(dict(schema), name="answer"))


def build_validator(schema: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a check of answers, which asks the model again; the library takes any object."""
    # An empty registry: a reference leads nowhere but into the schema, least of all to a URL.
    checker = jsonschema.Draft202012Validator(schema, registry=Registry())

    def check(answer: Any) -> Any:
        try:
            problem = next(checker.iter_errors(dict(answer)), None)
        except Unresolvable as exc:
            raise ContractError(f"output_schema: {exc.ref} leads nowhere") from exc
        if problem is not None:
            raise ModelRetry(f"{problem.json_path}: {problem.message[:SHOWN_CHARS]}")
        return answer

    return check


def _check(schema: Mapping[str, Any]) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as exc:
        raise ContractError(f"output_schema: {exc.json_path}: {exc.message[:SHOWN_CHARS]}") from exc
    known = {f"#/$defs/{name}" for name in schema.get("$defs", {})}
    strange = sorted({*map(str, _references(schema))} - known)
    if strange:
        raise ContractError(f"output_schema refers to {', '.join(strange)}, not among its $defs")


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (value[key] for key in ("$ref", "$dynamicRef") if key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
