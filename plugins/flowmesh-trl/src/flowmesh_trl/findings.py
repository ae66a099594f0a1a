"""Problems that pydantic does not look for, reported together with those that it finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import (
    AliasChoices,
    BaseModel,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from flowmesh_core import StrictBlock

__all__ = ["Finding", "OnceBlock", "field_names", "named_once", "repeated", "validate_beside"]


Finding = dict[str, Any]
"""What ``ValidationError.from_exception_data`` takes: ``type``, ``loc``, ``input``, ``ctx``."""


def validate_beside(
    model: type[BaseModel],
    value: Any,
    validate: ModelWrapValidatorHandler[Any],
    problems: Iterable[str | Finding],
) -> Any:
    """Validate what can be, and raise what is found in one with ``problems``.

    Raises:
        ValidationError: With both.
    """
    found: list[Any] = [_as_finding(item) if isinstance(item, str) else item for item in problems]
    try:
        block = validate(value)
    except ValidationError as exc:
        found += [repeated(item) for item in exc.errors(include_url=False)]
    if found:
        raise ValidationError.from_exception_data(model.__name__, found)
    return block


def repeated(item: Mapping[str, Any], *, loc: tuple[str | int, ...] = ()) -> Finding:
    """Return one of pydantic's findings in the form in which it is raised, perhaps elsewhere."""
    return {
        **{key: item.get(key, {}) for key in ("type", "input", "ctx")},
        "loc": loc or item["loc"],
    }


def field_names(model: type[BaseModel], field: str) -> list[str]:
    """Return the names under which a document may give a field, the preferred one first."""
    alias = model.model_fields[field].validation_alias
    others = alias.choices if isinstance(alias, AliasChoices) else [alias or field]
    return list(dict.fromkeys([*map(str, others), field]))


def named_once(
    model: type[BaseModel], value: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return a block with one name for each field, and which fields contradict themselves."""
    kept = dict(value)
    problems: list[str] = []
    for field in model.model_fields:
        first, *others = [name for name in field_names(model, field) if name in kept] or [field]
        again = {name: kept.pop(name) for name in others}
        problems += [
            f"{first} and {name} are one field and contradict"
            for name, item in again.items()
            if item != kept[first]
        ]
    return kept, problems


class OnceBlock(StrictBlock):
    """A block in which two names of one field must not contradict."""

    @model_validator(mode="wrap")
    @classmethod
    def _given_once(cls, value: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(value, Mapping):
            return validate(value)
        kept, problems = named_once(cls, value)
        return validate_beside(cls, kept, validate, problems)


def _as_finding(text: str) -> Finding:
    # Without the block as its input, since its placeholders (${...}) excuse nothing here.
    return {"type": "value_error", "input": None, "ctx": {"error": ValueError(text)}}
