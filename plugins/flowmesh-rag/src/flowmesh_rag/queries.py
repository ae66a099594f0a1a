"""The texts of a task, and a task among others that share a batch; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core import FlowmeshError, InputError, Row, RunContext

__all__ = [
    "Member",
    "Query",
    "do_together",
    "open_members",
    "open_of",
    "read_queries",
    "read_rows",
    "stop_all",
]


@attrs.frozen(kw_only=True)
class Query:
    """One text.

    Attributes:
        index: Position in the whole source.
        metadata: The row's own fields, for the result.
    """

    index: int
    text: str
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Member:
    """One task of a group, with what it asks or why it failed."""

    ctx: RunContext
    queries: Sequence[Query] = ()
    error: FlowmeshError | None = None

    def is_stopped(self) -> bool:
        """Look for a cancel and the deadline; either becomes the member's error."""
        if self.error is None:
            try:
                self.ctx.check()
            except FlowmeshError as exc:
                self.error = exc
        return self.error is not None


def read_queries(ctx: RunContext) -> list[Query]:
    """Return what a task of type ``rag`` asks: the rows of ``data``, or else ``query``.

    Raises:
        InputError: There is nothing, or something that is no text.
    """
    rows, asked = ctx.inputs.rows, ctx.spec.query
    if rows is None:
        if not asked:
            raise InputError("one of data, query is required")
        return [
            Query(index=index, text=_checked(text, f"spec.query {index}"))
            for index, text in enumerate(asked)
        ]
    if asked:
        ctx.log("spec.query is not asked: the task has data", level="warning")
    return read_rows(rows)


def read_rows(rows: Iterable[Row] | None) -> list[Query]:
    """Return the rows of ``data`` as texts.

    Raises:
        InputError: There are none, or one of them is no text.
    """
    if rows is None:
        raise InputError("data is required: give data.type and the texts")
    found = [_read_row(row) for row in rows]
    if not found:
        raise InputError("data has no rows: there is nothing to embed or to search for")
    return found


def _read_row(row: Row) -> Query:
    if not isinstance(row.prompt, str):
        raise InputError(f"row {row.index}: must be a text, got chat messages")
    text = _checked(row.prompt, f"row {row.index}")
    return Query(index=row.index, text=text, metadata=row.metadata)


def _checked(text: str, name: str) -> str:
    """Refuse what a tokenizer or a server would refuse for all the texts of a batch."""
    if not text.strip():
        raise InputError(f"{name}: must not be blank")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        found = f"{text[exc.start]!a} at {exc.start}"
        raise InputError(f"{name}: must be Unicode text, got half a character, {found}") from None
    return text


def open_members(
    ctxs: Iterable[RunContext], read: Callable[[RunContext], Sequence[Query]]
) -> list[Member]:
    """Read each task's texts; what is wrong with them becomes that member's error alone."""
    return [_open_member(ctx, read) for ctx in ctxs]


def _open_member(ctx: RunContext, read: Callable[[RunContext], Sequence[Query]]) -> Member:
    try:
        ctx.check()
        return Member(ctx, read(ctx))
    except FlowmeshError as exc:
        return Member(ctx, error=exc)
    except (OSError, ValueError) as exc:
        retriable = isinstance(exc, OSError)
        return Member(ctx, error=InputError(f"data cannot be read: {exc}", retriable=retriable))


def open_of(members: Iterable[Member]) -> list[Member]:
    """Return those that go on; a cancel or the deadline becomes a member's error."""
    return [member for member in members if not member.is_stopped()]


def stop_all(members: Sequence[Member]) -> None:
    """Raise when no member goes on; one that stops leaves the others to go on."""
    if not open_of(members) and members and members[0].error is not None:
        raise members[0].error


def do_together(members: Iterable[Member], work: Callable[[Sequence[Member]], None]) -> None:
    """Do work for all members at once, and for each alone if that fails for good.

    So a member that spoils a batch fails alone. What fails becomes the error of its members.

    Args:
        members: Those that have failed are left out.
        work: May be done again.
    """
    going = open_of(members)
    if not going:
        return
    try:
        work(going)
    except FlowmeshError as exc:
        for member in open_of(going):
            if exc.retriable or len(going) < 2:
                member.error = exc
            else:  # also for one that is left alone: the fault may be of one that has ended
                do_together([member], work)
