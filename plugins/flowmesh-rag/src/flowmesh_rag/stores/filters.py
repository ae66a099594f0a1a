"""Filters in Qdrant's JSON, for the stores that have no Qdrant server behind them.

They are read once; ``matches`` says what they mean, ``edge_filter`` hands them to the embedded
engine. Places on the globe, indices such as ``a[0]`` and quoted keys are left to servers.

Source: https://qdrant.tech/documentation/concepts/filtering/
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    model_validator,
)

from flowmesh_core import InputError, StrictBlock

__all__ = ["Filter", "edge_filter", "matches", "parse_filter", "refuse_filter"]

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_WORDS = re.compile(r"[^\W_]+")
_KEY = re.compile(r"([\w-]+(\[\])?\.)*[\w-]+", re.ASCII)
_COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_EDGE_MATCHES = {
    "value": "MatchValue",
    "any": "MatchAny",
    "excluded": "MatchExcept",
    "text": "MatchText",
}
_KINDS = ("key", "is_empty", "is_null", "has_id")


def _read_date(text: str) -> dt.datetime | None:
    """Read a date, in UTC when it names no zone. Source: RFC 3339."""
    if not _DATE.match(text):
        return None
    try:
        found = dt.datetime.fromisoformat(text.upper().replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=dt.timezone.utc)


def _check_bound(value: Any) -> float | str:
    if isinstance(value, str) and _read_date(value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    raise ValueError(f"must be a number or a date such as 2026-01-31T12:00:00Z, got {value!r:.60}")


def _check_value(value: Any) -> str | int | bool:
    if isinstance(value, str | int):
        return value
    raise ValueError(f"must be a text, a whole number, true or false, got {value!r:.60}")


def _check_values(value: Any) -> list[str] | list[int]:
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds <= {str} or kinds <= {int}:
            return value
    raise ValueError("must be a list of texts or of whole numbers")


def _check_id(value: Any) -> str | int:
    if isinstance(value, str):
        return str(uuid.UUID(value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"must be a point's id, a whole number or a UUID, got {value!r:.60}")


def _check_key(value: Any) -> str:
    if isinstance(value, str) and _KEY.fullmatch(value):
        return value
    raise ValueError(
        f"must be a field such as author, author.name or parts[].page, got {value!r:.60}"
    )


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, Mapping) else value


def _kind(value: Any) -> str:
    """Tell a condition by the key that only its kind has; a group has none of them."""
    if not isinstance(value, Mapping):
        return "filter"
    return next((kind for kind in _KINDS if kind in value), "filter")


Key = Annotated[str, PlainValidator(_check_key)]
Value = Annotated[Any, PlainValidator(_check_value)]
Values = Annotated[Any, PlainValidator(_check_values)]
Bound = Annotated[Any, PlainValidator(_check_bound)]
PointId = Annotated[Any, PlainValidator(_check_id)]


class _OneOf(StrictBlock):
    """A block of which exactly one key is given, beside ``key``."""

    @model_validator(mode="after")
    def _only_one(self) -> _OneOf:
        if len(self.model_fields_set - {"key"}) != 1:
            fields = type(self).model_fields.items()
            names = ", ".join(field.alias or name for name, field in fields if name != "key")
            raise ValueError(f"must have exactly one of {names}")
        return self

    def chosen(self) -> tuple[str, Any]:
        """Return the one key that is given, and what it holds."""
        (name,) = self.model_fields_set - {"key"}
        return name, getattr(self, name)


class Match(_OneOf):
    """What one value of a field must be; ``text``: all these words are in it, in any order."""

    value: Value = None
    any: Values = None
    excluded: Values = Field(default=None, alias="except")
    text: str = ""


class Range(StrictBlock):
    """Limits of a number or of a date; all of one kind."""

    gt: Bound = None
    gte: Bound = None
    lt: Bound = None
    lte: Bound = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        kinds = {isinstance(value, str) for value in self.bounds().values()}
        if len(kinds) != 1:
            raise ValueError("must have gt, gte, lt or lte, all of them numbers or all dates")
        return self

    def bounds(self) -> dict[str, float | str]:
        """Return the limits that are given."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class FieldCondition(_OneOf):
    """Asks something of the values of one field; ``a.b`` and ``list[].b`` look inside."""

    key: Key
    match: Match | None = None
    range: Range | None = None
    is_empty: bool | None = None
    is_null: bool | None = None


class KeyBlock(StrictBlock):
    """Names a field."""

    key: Key


class IsEmpty(StrictBlock):
    """The field is not there, null or an empty list."""

    is_empty: KeyBlock


class IsNull(StrictBlock):
    """The field is there and null."""

    is_null: KeyBlock


class HasId(StrictBlock):
    """The point is one of these."""

    has_id: list[PointId]


class MinShould(StrictBlock):
    """At least so many of the conditions hold."""

    conditions: Conditions
    min_count: int = Field(ge=1)

    @model_validator(mode="after")
    def _can_hold(self) -> MinShould:
        if self.min_count > len(self.conditions):  # which engines read in different ways
            raise ValueError(f"must have {self.min_count} conditions or more, as min_count says")
        return self


class Filter(StrictBlock):
    """All of ``must``, none of ``must_not``, and at least one of ``should`` unless it is empty."""

    must: Conditions = Field(default_factory=list)
    should: Conditions = Field(default_factory=list)
    must_not: Conditions = Field(default_factory=list)
    min_should: MinShould | None = None


Condition = Annotated[
    Annotated[FieldCondition, Tag("key")]
    | Annotated[IsEmpty, Tag("is_empty")]
    | Annotated[IsNull, Tag("is_null")]
    | Annotated[HasId, Tag("has_id")]
    | Annotated[Filter, Tag("filter")],
    Discriminator(_kind),
]
Conditions = Annotated[list[Condition], BeforeValidator(_as_list)]
MinShould.model_rebuild()
Filter.model_rebuild()


def parse_filter(raw: Mapping[str, Any] | None) -> Filter | None:
    """Read ``search.filter``.

    Raises:
        InputError: Naming every fault.
    """
    if raw is None:
        return None
    try:
        return Filter.model_validate(raw)
    except ValidationError as exc:
        raise refuse_filter(exc) from None


def refuse_filter(error: ValidationError) -> InputError:
    """Build the error that tells what is wrong with a filter."""
    problems = (
        f"search.filter{_path(found)}: {found['msg'].removeprefix('Value error, ')}"
        for found in error.errors(include_url=False)
    )
    return InputError("; ".join(problems))


def _path(problem: Mapping[str, Any]) -> str:
    """Write where a fault is; pydantic names the kind of a condition after its number."""
    loc = problem["loc"]
    parts = [part for at, part in enumerate(loc) if not (at and isinstance(loc[at - 1], int))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def matches(rule: Filter, payload: Mapping[str, Any], point_id: str) -> bool:
    """Tell whether a filter lets a point through."""

    def holds(condition: Any) -> bool:
        return _holds(condition, payload, point_id)

    enough = rule.min_should
    return (
        all(map(holds, rule.must))
        and not any(map(holds, rule.must_not))
        and (not rule.should or any(map(holds, rule.should)))
        and (not enough or sum(map(holds, enough.conditions)) >= enough.min_count)
    )


def _holds(condition: Any, payload: Mapping[str, Any], point_id: str) -> bool:
    if isinstance(condition, Filter):
        return matches(condition, payload, point_id)
    if isinstance(condition, HasId):
        return point_id in map(str, condition.has_id)
    if isinstance(condition, IsEmpty):
        return _is_empty(_values(payload, condition.is_empty.key))
    if isinstance(condition, IsNull):
        return _is_null(_values(payload, condition.is_null.key))
    values = _values(payload, condition.key)
    kind, wanted = condition.chosen()
    if kind == "is_empty":
        return _is_empty(values) is wanted
    if kind == "is_null":
        return _is_null(values) is wanted
    test = _in_match if kind == "match" else _in_range
    return any(test(wanted, value) for value in _flat(values))


def _values(payload: Mapping[str, Any], key: str) -> list[Any]:
    """Return what stands at a key; several values where it goes through lists."""
    found: list[Any] = [payload]
    for step in key.split("."):
        name = step.removesuffix("[]")
        found = [one[name] for one in found if isinstance(one, Mapping) and name in one]
        if name != step:
            found = [item for one in found if isinstance(one, list) for item in one]
    return found


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _is_empty(values: list[Any]) -> bool:
    return all(value is None or value == [] for value in values)


def _is_null(values: list[Any]) -> bool:
    return any(value is None or (isinstance(value, list) and None in value) for value in values)


def _in_match(match: Match, value: Any) -> bool:
    kind, wanted = match.chosen()
    if kind == "text":
        words = _WORDS.findall(wanted.lower())
        present = set(_WORDS.findall(value.lower())) if isinstance(value, str) else ()
        return bool(words) and all(word in present for word in words)
    if kind == "excluded":
        return value is not None and not any(_same(value, one) for one in wanted)
    return any(_same(value, one) for one in (wanted if kind == "any" else [wanted]))


def _same(value: Any, wanted: Any) -> bool:
    """Compare as Qdrant does, for which ``true``, ``1`` and ``1.0`` are three things."""
    return type(value) is type(wanted) and bool(value == wanted)


def _in_range(limits: Range, value: Any) -> bool:
    found = _read_date(value) if isinstance(value, str) else value
    if found is None or isinstance(found, bool) or not isinstance(found, int | float | dt.datetime):
        return False
    for name, bound in limits.bounds().items():
        limit: Any = _read_date(bound) if isinstance(bound, str) else bound
        if isinstance(limit, dt.datetime) is not isinstance(found, dt.datetime):
            return False
        if not _COMPARE[name](found, limit):
            return False
    return True


def edge_filter(rule: Filter) -> Any:
    """Return the filter as an object of ``qdrant_edge``."""
    import qdrant_edge as edge  # noqa: PLC0415 - the engine is loaded by the store that has it

    enough = rule.min_should
    return edge.Filter(
        must=_edge_conditions(edge, rule.must),
        should=_edge_conditions(edge, rule.should),
        must_not=_edge_conditions(edge, rule.must_not),
        min_should=enough
        and edge.MinShould(_edge_conditions(edge, enough.conditions) or [], enough.min_count),
    )


def _edge_conditions(edge: Any, conditions: Sequence[Any]) -> list[Any] | None:
    return [_edge_condition(edge, condition) for condition in conditions] or None


def _edge_condition(edge: Any, condition: Any) -> Any:
    if isinstance(condition, Filter):
        return edge_filter(condition)
    if isinstance(condition, HasId):
        return edge.HasIdCondition(set(condition.has_id))
    if isinstance(condition, IsEmpty):
        return edge.IsEmptyCondition(condition.is_empty.key)
    if isinstance(condition, IsNull):
        return edge.IsNullCondition(condition.is_null.key)
    kind, wanted = condition.chosen()
    if kind == "match":
        wanted = _edge_match(edge, wanted)
    elif kind == "range":
        dates = any(isinstance(bound, str) for bound in wanted.bounds().values())
        wanted = (edge.RangeDateTime if dates else edge.RangeFloat)(**wanted.bounds())
    return edge.FieldCondition(condition.key, **{kind: wanted})


def _edge_match(edge: Any, match: Match) -> Any:
    kind, wanted = match.chosen()
    if isinstance(wanted, bool):
        import numpy as np  # noqa: PLC0415 - as above

        wanted = np.bool_(wanted)  # the engine takes Python's own for a number
    return getattr(edge, _EDGE_MATCHES[kind])(wanted)
