from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flowmesh_agent.masks import build_mask
from flowmesh_agent.trace import LOG_LINES, Trace, TraceFile
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core import SecretMask

KEY = 'sk-0123"456789\\abcdef'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_an_event_is_one_line_that_is_on_disk_before_the_trace_ends(path: Path) -> None:
    times = iter([5.0, 6.25, 7.5])
    with TraceFile(path, SecretMask({}), clock=lambda: next(times)) as file:
        Trace(file=file, item=3).write("tool_call", "writer", tool="files", arguments={"a": 1})
        assert lines(path) == [
            {
                "at_s": 1.25,
                "item": 3,
                "agent": "writer",
                "kind": "tool_call",
                "tool": "files",
                "arguments": {"a": 1},
            }
        ]
        Trace(file=file, item=4).write("error", "", message="two\nlines")
    assert [line["item"] for line in lines(path)] == [3, 4]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("request", {"messages": []}, []),
        ("usage", {"prompt_tokens": 1}, []),
        ("response", {"text": "I look", "calls": []}, [("step", "I look")]),
        (
            "response",
            {"text": "", "calls": [{"tool": "read_file"}, {"tool": "http"}]},
            [("step", "calls read_file, http")],
        ),
        ("tool_call", {"tool": "http", "arguments": {"u": "x"}}, [("tool", 'http {"u": "x"}')]),
        ("tool_call", {"tool": "http", "arguments": '{"u": 1}'}, [("tool", 'http {"u": 1}')]),
        ("tool_result", {"tool": "http", "result": "page"}, []),
        ("tool_result", {"tool": "http", "error": "no"}, [("error", "http: no")]),
        ("error", {"message": "refused"}, [("error", "refused")]),
        ("plan", {"text": "a: b"}, [("plan", "a: b")]),
        ("answer", {"text": "42"}, [("answer", "42")]),
    ],
)
def test_the_log_tells_the_gist_of_an_event(
    path: Path, kind: str, fields: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    with TraceFile(path, SecretMask({})) as file:
        Trace(file=file, item=0).write(kind, "", **fields)
    assert [(line["kind"], line["text"]) for line in file.execution_log] == expected
    assert len(lines(path)) == 1


def test_the_log_cuts_long_texts_and_the_trace_keeps_them(path: Path) -> None:
    with TraceFile(path, SecretMask({})) as file:
        Trace(file=file, item=0).write("answer", "", text="x" * 5000)
    assert file.execution_log[0]["text"] == "x" * 300
    assert lines(path)[0]["text"] == "x" * 5000


def test_the_log_counts_what_it_has_no_room_for(path: Path) -> None:
    with TraceFile(path, SecretMask({})) as file:
        for number in range(LOG_LINES + 7):
            Trace(file=file, item=0).write("answer", "", text=str(number))
    log = file.execution_log
    assert len(log) == LOG_LINES + 1
    assert log[-2]["text"] == str(LOG_LINES - 1)
    assert log[-1] == {"kind": "dropped", "count": 7}
    assert len(lines(path)) == LOG_LINES + 7


def test_what_comes_after_the_end_is_not_written(path: Path) -> None:
    with TraceFile(path, SecretMask({})) as file:
        trace = Trace(file=file, item=0)
    trace.write("answer", "", text="late")
    assert lines(path) == file.execution_log == []


@given(before=st.text(max_size=400), after=st.text(max_size=20), nested=st.booleans())
def test_no_part_of_a_secret_is_in_log_or_trace_wherever_it_stands(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: str, nested: bool
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    mask = build_mask([("AGENT_LLM_API_KEY", KEY)])
    text = f"{before}{KEY}{after}"
    arguments: Any = {KEY: [text]} if nested else json.dumps({"a": text})
    with TraceFile(path, mask) as file:
        trace = Trace(file=file, item=0)
        trace.write("answer", "", text=text)
        trace.write("tool_call", "", tool="http", arguments=arguments)
    # Escapes left out: the same text may stand in a JSON string within a JSON string.
    written = json.dumps([lines(path), file.execution_log]).replace("\\", "")
    plain = KEY.replace("\\", "")
    for start in range(len(plain) - 9):  # ten characters of it are too many
        part = plain[start : start + 10]
        assert part in before or part not in written
