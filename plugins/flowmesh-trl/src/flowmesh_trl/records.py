"""One row of training data: which of its columns mean what, and what they hold.

Every complaint says where the row stands, what was expected and what came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core import InputError, RowSource

__all__ = ["Chat", "Columns", "Record", "numbered_records"]

Chat = list[dict[str, Any]]

# The field of the `data` block that names a column by its role, and what it is usually called.
_NAMED: Mapping[str, str] = {
    "messages": "messages_field",
    "text": "text_field",
    "prompt": "prompt_field",
    "completion": "response_field",
    "chosen": "chosen_field",
    "rejected": "rejected_field",
    "label": "label_field",
}
_USUAL: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "prompt": ("prompt", "question", "query"),
    "completion": ("completion", "response", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}


@attrs.frozen(kw_only=True)
class Columns:
    """The columns that a document names, by role; the usual ones stand in for the others."""

    named: Mapping[str, str] = attrs.field(factory=dict)
    separator: str = "\n\n"

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Columns:
        """Read the names in the ``data`` block, validated: under its fields' first names."""
        named = {role: data[field] for role, field in _NAMED.items() if data.get(field)}
        separator = data.get("separator")
        return cls(named=named, separator="\n\n" if separator is None else separator)

    def usual(self, role: str, record: Record) -> str | None:
        """Return the column that is usually called by the role, if the row has one."""
        return next((name for name in _USUAL[role] if record.has(name)), None)

    def find(self, record: Record, *roles: str) -> str | None:
        """Return the first column that the document names for a role, else the first usual one."""
        named = [self.named[role] for role in roles if role in self.named]
        usual = [self.usual(role, record) for role in roles]
        return next(filter(None, (*named, *usual)), None)

    def require(self, record: Record, *roles: str) -> str:
        """Return what ``find`` does.

        Raises:
            InputError: The row has no such column.
        """
        column = self.find(record, *roles)
        if column is None:
            usual = [name for role in roles for name in _USUAL[role]]
            raise record.complaint(
                f"needs a column {' or '.join(usual)}, or the one that data.{_NAMED[roles[-1]]}"
                f" names, got {record.names}"
            )
        return column


@attrs.frozen
class Record:
    """One row and its place, such as ``pairs.jsonl, record 3``."""

    where: str
    values: Mapping[str, Any]

    @property
    def names(self) -> str:
        """The columns of the row, for messages."""
        return ", ".join(self.values) or "no columns"

    def has(self, column: str) -> bool:
        """Whether the column is there and not null."""
        return self.values.get(column) is not None

    def complaint(self, text: str) -> InputError:
        """Return an error about this row."""
        return InputError(f"{self.where}: {text}")

    def is_chat(self, column: str) -> bool:
        """Whether the column holds a list, which only a chat may be."""
        return isinstance(self.values.get(column), Sequence) and not self._is_text(column)

    def text(self, column: str) -> str:
        """Return a column of text.

        Raises:
            InputError: It is missing, empty or something else.
        """
        if not self._is_text(column) or not self.values[column]:
            raise self.complaint(
                f"{column} must be a text with something in it, got {self._got(column)}"
            )
        return str(self.values[column])

    def chat(self, column: str, *, role: str | None = None) -> Chat:
        """Return a column of chat messages; a text becomes one message of ``role``.

        Messages of ``from`` and ``value`` come back with ``role`` and ``content``.

        Raises:
            InputError: It is neither, or a message is no message.
        """
        if role is not None and self._is_text(column):
            return [{"role": role, "content": self.text(column)}]
        if not self.is_chat(column) or not self.values[column]:
            raise self.complaint(
                f"{column} must be a list of chat messages, got {self._got(column)}"
            )
        return [self._message(column, i, item) for i, item in enumerate(self.values[column])]

    def flag(self, column: str) -> bool:
        """Return a column of true and false, or of 1 and 0.

        Raises:
            InputError: It is neither.
        """
        value = self.values.get(column)
        if value not in (0, 1):
            raise self.complaint(f"{column} must be true or false, got {self._got(column)}")
        return bool(value)

    def number(self, column: str) -> float:
        """Return a column of numbers.

        Raises:
            InputError: It is none.
        """
        value = self.values.get(column)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.complaint(f"{column} must be a number, got {self._got(column)}")
        return float(value)

    def dump(self, value: Any) -> str:
        """Return a value of the row as JSON.

        Raises:
            InputError: JSON has no such value.
        """
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise self.complaint(f"holds what JSON cannot: {exc}") from exc

    def _is_text(self, column: str) -> bool:
        return isinstance(self.values.get(column), str)

    def _got(self, column: str) -> str:
        if column not in self.values:
            return f"no such column among {self.names}"
        value = self.values[column]
        if isinstance(value, (str, int, float, type(None))):
            return repr(value)[:60]
        return f"{'an empty ' if not value else ''}{type(value).__name__}"

    def _message(self, column: str, index: int, item: Any) -> dict[str, Any]:
        if isinstance(item, Mapping) and "from" in item and "value" in item:
            role = item["from"]
            item = {"role": _SHAREGPT_ROLES.get(role, role), "content": item["value"]}
        if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
            raise self.complaint(f"{column}[{index}] must be a message with role and content")
        if not isinstance(item.get("content"), (str, list)) and not item.get("tool_calls"):
            raise self.complaint(f"{column}[{index}] has neither content nor tool_calls")
        return dict(item)


def numbered_records(rows: RowSource) -> Iterator[Record]:
    """Yield the rows with their places, read anew."""
    source = str(rows.path or "spec.data")
    for number, values in enumerate(rows.records(), start=1):
        yield Record(f"{source}, record {number}", values)
