"""Validation at the edges: pydantic's findings in the project's own words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)

from flowmesh_core.errors import ContractError, PluginLoadError
from flowmesh_core.wire import MAX_DEPTH

__all__ = [
    "CommaSeparated",
    "OpenBlock",
    "StrictBlock",
    "as_model",
    "describe_problems",
    "show_value",
    "validate_model",
]

ModelT = TypeVar("ModelT", bound=BaseModel)


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


CommaSeparated = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Texts that a variable holds separated by commas."""


def show_value(value: object) -> str:
    """Return a value as a message shows it: short, and never a whole document."""
    if isinstance(value, int) and value.bit_length() > 600:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write long ones out
    if isinstance(value, (str, int, float, bool, type(None))):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__name__


def as_model(found: object, target: str) -> type[BaseModel]:
    """Return the model that a declaration's ``target`` names.

    Raises:
        PluginLoadError: It is none.
    """
    if isinstance(found, type) and issubclass(found, BaseModel):
        return found
    told = found.__name__ if isinstance(found, type) else type(found).__name__
    raise PluginLoadError(f"{target} must be a subclass of pydantic.BaseModel, got {told}")


class OpenBlock(BaseModel):
    """A block that other readers share: unknown keys pass, and null is what is not there."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None}


class StrictBlock(BaseModel):
    """A block in which an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = set(_accepted_names(cls))
        problems = [_unknown_key(str(key), known) for key in value if key not in known]
        if not problems:
            return value
        try:  # the known keys may be wrong too
            cls.model_validate({key: item for key, item in value.items() if key in known})
        except ValidationError as exc:
            problems += describe_problems(exc, skip_placeholders=True)
        raise _UnknownKeyError("; ".join(problems))


class _UnknownKeyError(ValueError):
    """Certain, whatever the placeholders beside it turn out to be."""


def _accepted_names(model: type[BaseModel]) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield name
        alias = field.validation_alias
        if isinstance(alias, AliasChoices):
            yield from (choice for choice in alias.choices if isinstance(choice, str))
        elif isinstance(alias, str):
            yield alias


def _unknown_key(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
    return f"unknown key {key!r}, {hint}"


def validate_model(model: type[ModelT], value: Any, *, where: str, prefix: str = "") -> ModelT:
    """Validate with pydantic, speaking the project's language about what is wrong.

    Raises:
        ContractError: One problem per fault, fields named from ``prefix`` on.
    """
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise ContractError(describe_problems(exc, prefix=prefix), where=where) from None
    except RecursionError:
        raise ContractError(f"nests deeper than {MAX_DEPTH} levels", where=where) from None


_EXPECTATIONS: Mapping[str, str] = {
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "mapping_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "invalid_key": "named by a string",
    "string_unicode": "an object whose keys are valid text",
}


def describe_problems(
    error: ValidationError, *, prefix: str = "", skip_placeholders: bool = False
) -> list[str]:
    """Turn pydantic's findings into sentences of the form *field must be X, got Y*.

    Args:
        error: What pydantic found.
        prefix: Path of the validated value, such as ``spec``.
        skip_placeholders: Leave out fields whose value is still to be filled in (``${...}``).
    """
    return [
        _describe(dict(item), prefix)
        for item in error.errors(include_url=False)
        if not (skip_placeholders and _waits_for_placeholder(item))
    ]


def _waits_for_placeholder(item: Mapping[str, Any]) -> bool:
    certain = item["type"] == "missing" or isinstance(
        item.get("ctx", {}).get("error"), _UnknownKeyError
    )
    return not certain and _has_placeholder(item["input"])


def _has_placeholder(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_placeholder, value.values()))
    if isinstance(value, list):
        return any(map(_has_placeholder, value))
    return isinstance(value, str) and "${" in value


def _describe(item: Mapping[str, Any], prefix: str) -> str:
    path = prefix
    for part in item["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("function-", "constrained-")):
            path += f".{part}" if path else part
    field = path or "document"
    kind = item["type"]
    if kind == "missing":
        return f"{field} is required"
    if kind == "value_error":
        text = str(item["ctx"]["error"])
        if not path:
            return text
        return f"{path} {text}" if text.startswith("must ") else f"{path}: {text}"
    if kind in _EXPECTATIONS:
        return f"{field} must be {_EXPECTATIONS[kind]}, got {show_value(item['input'])}"
    message = item["msg"].replace("Input should be", "must be", 1)
    return f"{field} {message}, got {show_value(item['input'])}"
