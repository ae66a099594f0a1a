from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_agent.answer import AgentAnswer, TokenUsage
from flowmesh_agent.results import (
    Done,
    batch_failure,
    build_result,
    task_text,
    write_batch_item,
    write_files,
)
from flowmesh_agent.spec import AgentResult

from flowmesh_core import ExecutionError, InputError, Row

USAGE = TokenUsage(prompt_tokens=7, completion_tokens=3, requests=2, tool_calls=4, cost_usd=0.5)


def done(index: int = 0, **fields: Any) -> Done:
    error = fields.pop("error", None)
    data = fields.pop("data", None)
    output = fields.pop("output", f"answer {index}")
    row = Row(index=index, prompt=f"task {index}", **fields)
    answer = AgentAnswer(output=output, data=data, error=error)
    return Done(row=row, answer=answer, usage=USAGE, seconds=1.5)


def result(items: list[Done], *, is_batch: bool) -> dict[str, Any]:
    return build_result(
        items,
        config_name="search",
        llm="small",
        is_batch=is_batch,
        execution_log=[{"kind": "answer"}],
        seconds=2.0,
    )


def test_a_single_task_has_the_keys_that_earlier_readers_know() -> None:
    found = result([done()], is_batch=False)
    AgentResult.model_validate(found)
    assert {"ok", "model", "items", "usage", "metadata"} <= found.keys()
    assert found["ok"] is True
    assert found["model"] == "search"
    assert found["llm"] == "small"
    assert found["metadata"] == {"task": "task 0", "execution_log": [{"kind": "answer"}]}
    (item,) = found["items"]
    assert (item["index"], item["output"], item["finish_reason"]) == (0, "answer 0", "completed")
    assert "error" not in item
    assert "data" not in item


def test_an_item_says_that_its_answer_was_cut() -> None:
    whole, cut = done(0), done(1)
    cut = attrs.evolve(cut, answer=attrs.evolve(cut.answer, truncated=True))
    found = result([whole, cut], is_batch=True)["items"]
    assert [item.get("truncated") for item in found] == [None, True]


def test_a_batch_has_the_keys_that_earlier_readers_know() -> None:
    items = [done(0), done(1, error=ExecutionError("no", retriable=True), output="half")]
    found = result(items, is_batch=True)
    AgentResult.model_validate(found)
    assert found["ok"] is True
    assert found["metadata"] == {
        "tasks_count": 2,
        "execution_log": [{"kind": "answer"}],
        "batch_summary": {"total_tasks": 2, "completed": 1, "failed": 1},
    }
    failed = found["items"][1]
    assert failed["finish_reason"] == "failed"
    assert failed["output"] == "half"
    assert failed["error"] == {"code": "executor.failed", "message": "no"}


def test_a_batch_of_one_row_still_is_a_batch() -> None:
    found = result([done()], is_batch=True)
    assert found["metadata"]["batch_summary"] == {"total_tasks": 1, "completed": 1, "failed": 0}
    assert "task" not in found["metadata"]


def test_usage_is_the_sum_of_the_items_and_counts_tasks_as_requests() -> None:
    usage = result([done(0), done(1)], is_batch=True)["usage"]
    assert usage == {
        "prompt_tokens": 14,
        "completion_tokens": 6,
        "total_tokens": 20,
        "llm_requests": 4,
        "tool_calls": 8,
        "cost_usd": 1.0,
        "unmeasured_requests": 0,
        "latency_sec": 2.0,
        "execution_time_sec": 2.0,
        "num_requests": 2,
        "agent_config": "search",
    }


def test_an_item_tells_its_row_its_data_and_its_own_usage() -> None:
    (item,) = result([done(4, metadata={"id": "x"}, data={"n": 1})], is_batch=True)["items"]
    assert item["index"] == 4
    assert item["prompt"] == "task 4"
    assert item["metadata"] == {"id": "x"}
    assert item["data"] == {"n": 1}
    assert item["usage"]["total_tokens"] == 10
    assert item["usage"]["seconds"] == 1.5


def test_messages_of_a_chat_become_one_text() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]
    assert task_text(Row(index=0, prompt=chat)) == "system: Be brief.\n\nuser: Go."
    assert task_text(Row(index=0, prompt=chat[1:])) == "Go."
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert task_text(Row(index=0, prompt=parts)) == '[{"type": "text", "text": "Hi"}]'


def test_a_single_task_leaves_its_answer_in_a_file(tmp_path: Path) -> None:
    write_files(tmp_path, [done(output="Grüße")], is_batch=False)
    assert (tmp_path / "agent_output.txt").read_text(encoding="utf-8") == "Grüße"
    assert [path.name for path in tmp_path.iterdir()] == ["agent_output.txt"]


def test_a_batch_leaves_an_answer_a_log_for_each_task_and_a_summary(tmp_path: Path) -> None:
    items = [done(0), done(1, error=InputError("no file"), output="half")]
    for item in items:
        write_batch_item(tmp_path, item)
    write_files(tmp_path, items, is_batch=True)
    whole = (tmp_path / "agent_output.txt").read_text()
    assert whole == "# task 1\n\nanswer 0\n\n# task 2\n\nhalf\n\n[failed: no file]\n"
    assert (tmp_path / "batch_logs" / "task_1_output.txt").read_text() == "answer 0"
    assert "[failed: no file]" in (tmp_path / "batch_logs" / "task_2_output.txt").read_text()
    assert json.loads((tmp_path / "batch_summary.json").read_text()) == {
        "total_tasks": 2,
        "completed": 1,
        "failed": 1,
        "tasks": [
            {"index": 0, "finish_reason": "completed", "seconds": 1.5},
            {"index": 1, "finish_reason": "failed", "seconds": 1.5},
        ],
    }


def test_a_text_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    write_files(tmp_path, [done(output="half \ud800 pair")], is_batch=False)
    assert (tmp_path / "agent_output.txt").read_text() == "half ? pair"


PASSING = ExecutionError("busy", retriable=True)
LASTING = ExecutionError("refused")


@pytest.mark.parametrize(
    ("errors", "retriable"),
    [
        ([], None),
        ([None, LASTING], None),
        ([PASSING, PASSING], True),
        ([PASSING, LASTING], False),
    ],
)
def test_a_batch_fails_when_all_failed_and_is_tried_again_when_that_may_help_all(
    errors: list[ExecutionError | None], retriable: bool | None
) -> None:
    failure = batch_failure([done(i, error=error) for i, error in enumerate(errors)])
    assert (failure and failure.retriable) == retriable
    if failure is not None:
        assert failure.code == "executor.failed"
        assert str(failure) == "all 2 tasks of the batch failed, the first so: busy"


def test_a_batch_of_which_no_row_makes_sense_is_the_documents_fault() -> None:
    blank, other = InputError("blank"), ExecutionError("x")
    failure = batch_failure([done(0, error=blank), done(1, error=blank)])
    assert failure is not None
    assert (failure.code, failure.retriable) == ("input", False)
    failure = batch_failure([done(0, error=blank), done(1, error=other)])
    assert failure is not None
    assert failure.code == "executor.failed"
