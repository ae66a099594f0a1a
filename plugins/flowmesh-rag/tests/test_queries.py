from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from flowmesh_rag.queries import (
    Member,
    Query,
    do_together,
    open_members,
    open_of,
    read_queries,
    read_rows,
    stop_all,
)

from flowmesh_core import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    InputError,
    RowSource,
)

SPEC = {"taskType": "rag", "store": {"type": "sqlite", "collection": "docs"}}
ASKED = {**SPEC, "query": ["who?", "where?"]}
WITH_DATA = {**SPEC, "data": {"type": "list"}}


def test_the_query_of_the_document_is_asked_when_it_has_no_data(make_context: Any) -> None:
    assert read_queries(make_context(ASKED)) == [
        Query(index=0, text="who?"),
        Query(index=1, text="where?"),
    ]
    assert [one.text for one in read_queries(make_context({**SPEC, "query": "why?"}))] == ["why?"]


def test_data_goes_before_query_and_the_log_says_so(make_context: Any) -> None:
    lines: list[tuple[str, str]] = []
    records = RowSource.from_records([{"question": "why?", "lang": "en"}])
    ctx = make_context(
        ASKED, rows=records, context={"on_log": lambda level, text: lines.append((level, text))}
    )
    assert read_queries(ctx) == [Query(index=0, text="why?", metadata={"lang": "en"})]
    assert lines == [("warning", "spec.query is not asked: the task has data")]


def test_rows_keep_their_index_in_the_whole_source() -> None:
    rows = RowSource(kind="list", params={"items": ["a", "b", "c"]}, shard_index=1, shard_total=3)
    assert [(one.index, one.text) for one in read_rows(rows)] == [(1, "b")]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "data has no rows"),
        (["who?", " \n"], "row 1: must not be blank"),
        ([[{"role": "user", "content": "hi"}]], "row 0: must be a text, got chat messages"),
        (["a", "b\ud800"], r"row 1: must be Unicode text, got half a character, '\\ud800' at 1"),
    ],
)
def test_rows_that_are_no_texts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(RowSource.from_prompts(prompts))


def test_without_rows_there_is_nothing_to_read() -> None:
    with pytest.raises(InputError, match=r"data is required: give data\.type and the texts"):
        read_rows(None)


def test_nothing_to_ask_is_refused_where_data_turned_out_to_be_none(make_context: Any) -> None:
    with pytest.raises(InputError, match="one of data, query is required"):
        read_queries(make_context(WITH_DATA))


def test_half_a_character_in_the_query_of_the_document_is_refused(make_context: Any) -> None:
    ctx = make_context(ASKED)
    ctx.spec.query[1] = "\udfff"
    with pytest.raises(InputError, match=r"spec\.query 1: must be Unicode text"):
        read_queries(ctx)


def members_of(make_context: Any, *asked: Sequence[str], **contexts: Any) -> list[Member]:
    ctxs = [
        make_context(
            WITH_DATA,
            task_id=f"task-{number}",
            rows=RowSource.from_prompts(texts),
            context=contexts.get(f"task_{number}"),
        )
        for number, texts in enumerate(asked)
    ]
    return open_members(ctxs, read_queries)


def test_a_member_that_cannot_be_read_fails_alone(make_context: Any) -> None:
    def read(ctx: Any) -> list[Query]:
        if ctx.task_id == "task-1":
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        return read_queries(ctx)

    ctxs = [member.ctx for member in members_of(make_context, ["a"], ["b"], [])]
    good, broken, empty = open_members(ctxs, read)
    assert good.error is None
    assert "data cannot be read: 'utf-8' codec" in str(broken.error)
    assert "data has no rows" in str(empty.error)
    assert open_of([good, broken, empty]) == [good]


def test_a_file_that_cannot_be_read_now_may_be_tried_again(make_context: Any) -> None:
    def read(_ctx: Any) -> list[Query]:
        raise OSError("stale file handle")

    (member,) = open_members([make_context(ASKED)], read)
    assert isinstance(member.error, InputError)
    assert member.error.retriable


def test_a_group_stops_when_its_last_member_does(make_context: Any) -> None:
    cancelled = {"is_cancelled": lambda: True}
    late = {"clock": lambda: 10.0, "deadline": 9.0}
    first, second = members_of(make_context, ["a"], ["b"], task_1=cancelled)
    stop_all([first, second])
    assert first.error is None
    assert isinstance(second.error, CancelledError)
    (over,) = members_of(make_context, ["a"], task_0=late)
    with pytest.raises(DeadlineError, match="task-0 reached its deadline"):
        stop_all([over])


class Work:
    """Work that fails for every batch with a bad member in it; keeps who came when."""

    def __init__(self, error: FlowmeshError, *bad: str) -> None:
        self.error, self.bad = error, bad
        self.calls: list[list[str]] = []

    def __call__(self, members: Sequence[Member]) -> None:
        names = [member.ctx.task_id for member in members]
        self.calls.append(names)
        if set(names) & set(self.bad):
            raise self.error


def test_a_member_that_spoils_a_batch_fails_alone(make_context: Any) -> None:
    members = members_of(make_context, ["a"], ["b"], ["c"])
    work = Work(InputError("too long"), "task-1")
    do_together(members, work)
    assert work.calls == [["task-0", "task-1", "task-2"], ["task-0"], ["task-1"], ["task-2"]]
    assert [str(member.error) for member in members] == ["None", "too long", "None"]


def test_what_may_go_better_another_time_is_not_tried_for_each_member(make_context: Any) -> None:
    members = members_of(make_context, ["a"], ["b"])
    work = Work(ExecutionError("no connection", retriable=True), "task-1")
    do_together(members, work)
    assert len(work.calls) == 1
    assert [str(member.error) for member in members] == ["no connection"] * 2


def test_a_member_that_has_failed_takes_no_part(make_context: Any) -> None:
    members = members_of(make_context, ["a"], [], ["c"])
    work = Work(InputError("never"))
    do_together(members, work)
    assert work.calls == [["task-0", "task-2"]]
    do_together(members[1:2], work)
    assert len(work.calls) == 1


def test_a_fault_of_a_member_that_ends_meanwhile_is_not_its_neighbours(make_context: Any) -> None:
    ended: list[bool] = []
    cancelled = {"is_cancelled": lambda: bool(ended)}
    members = members_of(make_context, ["a"], ["b"], task_0=cancelled)
    work = Work(InputError("too long"), "task-0")

    def end_and_work(going: Sequence[Member]) -> None:
        ended.append(True)
        work(going)

    do_together(members, end_and_work)
    assert work.calls == [["task-0", "task-1"], ["task-1"]]
    assert isinstance(members[0].error, CancelledError)
    assert members[1].error is None
