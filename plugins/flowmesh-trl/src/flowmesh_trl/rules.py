"""The rules that can reward an answer without any model.

A rule is its options, and scores one answer; ``RULES`` has them by name. Nothing is imported that
``flowmesh check`` should not wait for.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import attrs
from pydantic import Field, field_validator, model_validator

from flowmesh_core import ExecutorUnavailableError, InputError, StrictBlock

__all__ = ["RULES", "Answer", "Rule"]

_NUMBER = re.compile(
    r"(?<!\d)-?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"  # 1,234 or 1234, or nothing before the point
    r"(?:\.\d+)?(?:[eE][+-]?\d+)?"
)


@attrs.frozen(kw_only=True)
class Answer:
    """One completion.

    Attributes:
        text: What the model wrote; of a chat, what the assistant said.
        tokens: How many tokens that were.
        columns: The further columns of the row that was asked.
    """

    text: str
    tokens: int
    columns: Mapping[str, Any]

    def column(self, name: str) -> Any:
        """Return the row's value of a column.

        Raises:
            InputError: The data has no such column.
        """
        if name not in self.columns:
            known = ", ".join(sorted(self.columns)) or "none"
            raise InputError(f"the data has no column {name!r} to compare with, known are {known}")
        return self.columns[name]


class Rule(StrictBlock):
    """The options of a rule, which scores one answer at a time."""

    def prepare(self) -> None:
        """Raise what would stop the rule here, before anything is trained."""

    def score(self, answer: Answer) -> float | None:
        """Return the reward, None where the rule has nothing to say."""
        raise NotImplementedError


class Length(Rule):
    """1 for an answer of the right length, less the further it is from it, never below 0.

    With ``target``: 1 minus the distance as a share of it. With ``min`` and ``max``: 1 between
    them, below the share of ``min`` that is reached, above the share ``max`` is of the length.
    """

    target: int | None = Field(default=None, ge=1)
    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=1)
    unit: Literal["tokens", "words", "chars"] = "tokens"

    @model_validator(mode="after")
    def _check(self) -> Length:
        bounded = self.min is not None or self.max is not None
        if bounded == (self.target is not None):
            raise ValueError("either target is required, or min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} must not be above max {self.max}")
        return self

    def score(self, answer: Answer) -> float:
        """Return 0 to 1."""
        length = self._length(answer)
        if self.target is not None:
            return max(0.0, 1 - abs(length - self.target) / self.target)
        if self.min is not None and length < self.min:
            return length / self.min
        if self.max is not None and length > self.max:
            return self.max / length
        return 1.0

    def _length(self, answer: Answer) -> int:
        if self.unit == "tokens":
            return answer.tokens
        return len(answer.text.split()) if self.unit == "words" else len(answer.text)


class Regex(Rule):
    """1 if the pattern is found, or with ``match: full`` if it is the whole answer, else 0."""

    pattern: re.Pattern[str]
    match: Literal["search", "full"] = "search"

    def score(self, answer: Answer) -> float:
        """Return 0 or 1."""
        find = self.pattern.fullmatch if self.match == "full" else self.pattern.search
        return float(find(answer.text) is not None)


class Contains(Rule):
    """The share of the ``texts`` that the answer has in it."""

    texts: list[str] = Field(min_length=1)
    ignore_case: bool = False

    @field_validator("texts", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def score(self, answer: Answer) -> float:
        """Return 0 to 1."""
        text = _folded(answer.text, self.ignore_case)
        found = sum(_folded(part, self.ignore_case) in text for part in self.texts)
        return found / len(self.texts)


class ExactMatch(Rule):
    """1 if the answer is what the row's ``column`` says, spaces around it aside, else 0."""

    column: str = "answer"
    ignore_case: bool = False

    def score(self, answer: Answer) -> float | None:
        """Return 0 or 1; None where the column is null."""
        wanted = answer.column(self.column)
        if wanted is None:
            return None
        return float(self._plain(str(wanted)) == self._plain(answer.text))

    def _plain(self, text: str) -> str:
        return _folded(text.strip(), self.ignore_case)


class NumericMatch(Rule):
    """1 if the last number of the answer is the last one of the row's ``column``, else 0.

    ``tolerance`` is how far apart they may be, absolute.
    """

    column: str = "answer"
    tolerance: float = Field(default=1e-6, ge=0)

    def score(self, answer: Answer) -> float | None:
        """Return 0 or 1; None where the column is null."""
        value = answer.column(self.column)
        if value is None:
            return None
        wanted = _last_number(str(value))
        if wanted is None:
            raise InputError(f"the column {self.column!r} must hold a number, got {value!r:.60}")
        got = _last_number(answer.text)
        return float(got is not None and abs(got - wanted) <= self.tolerance)


class JsonValid(Rule):
    """1 if the whole answer is JSON, and fits ``schema`` if one is given, else 0."""

    schema_: dict[str, Any] | None = Field(default=None, validation_alias="schema")

    @cached_property
    def validator(self) -> Any:
        """What checks against the schema; None without one."""
        return None if self.schema_ is None else _schema_validator(self.schema_)

    def prepare(self) -> None:
        """Refuse a schema that is none, or that nothing here can check."""
        _ = self.validator

    def score(self, answer: Answer) -> float:
        """Return 0 or 1."""
        try:
            value = json.loads(answer.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(self.validator is None or self.validator.is_valid(value))


class Repetition(Rule):
    """0 for an answer that repeats no run of ``words`` words, down to -1 the more it does."""

    words: int = Field(default=3, ge=1)

    def score(self, answer: Answer) -> float:
        """Return -1 to 0."""
        said = answer.text.lower().split()
        runs = [tuple(said[i : i + self.words]) for i in range(len(said) - self.words + 1)]
        return len(set(runs)) / len(runs) - 1 if runs else 0.0


RULES: Mapping[str, type[Rule]] = {
    "contains": Contains,
    "exact_match": ExactMatch,
    "json_valid": JsonValid,
    "length": Length,
    "numeric_match": NumericMatch,
    "regex": Regex,
    "repetition": Repetition,
}


def _folded(text: str, ignore_case: bool) -> str:
    return text.casefold() if ignore_case else text


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _schema_validator(schema: Mapping[str, Any]) -> Any:
    try:
        library: Any = importlib.import_module("jsonschema")
    except ImportError as exc:
        raise ExecutorUnavailableError(
            "a schema of the reward 'json_valid' needs the package jsonschema, not installed here;"
            " run: pip install jsonschema",
            needs=["jsonschema"],
            install="pip install jsonschema",
        ) from exc
    kind = library.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except library.SchemaError as exc:
        raise InputError(f"the schema of 'json_valid' is no JSON schema: {exc.message}") from exc
    return kind(schema)
