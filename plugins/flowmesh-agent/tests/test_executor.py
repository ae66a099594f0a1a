from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from fakes import INFO, Asked, make_executor, run_agents
from flowmesh_agent import executor
from flowmesh_agent.answer import AgentAnswer
from flowmesh_agent.executor import AgentExecutor
from flowmesh_agent.spec import AgentResult, AgentSpec

from flowmesh_core import (
    ContractError,
    DeadlineError,
    ExecutionError,
    InputError,
    Inputs,
    RowSource,
    RunContext,
)
from flowmesh_core.testing import TaskRun, run_task


async def repeat(asked: Asked) -> AgentAnswer | str:
    return f"did {asked.prompt}"


async def stumble(asked: Asked) -> AgentAnswer | str:
    if "bad" in asked.prompt:
        return AgentAnswer(output="half", error=ExecutionError("cannot", retriable=True))
    return f"did {asked.prompt}"


def rows(*items: str, **data: Any) -> dict[str, Any]:
    return {"data": {"type": "list", "items": list(items), **data}}


def trace_of(run: TaskRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "trace.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("spec", [{"task": "x"}, {"data": {"type": "static", "task": "x"}}])
def test_one_task_is_a_single_result(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = run_agents(repeat, spec, tmp_path)
    AgentResult.model_validate(run.result)
    assert run.result["metadata"]["task"] == "x"
    (item,) = run.result["items"]
    assert (item["output"], item["finish_reason"]) == ("did x", "completed")
    assert run.result["model"] == run.result["usage"]["agent_config"] == "default"
    assert run.result["llm"] == "fake-model"
    assert (run.folder / "agent_output.txt").read_text() == "did x"
    assert (run.folder / "work").is_dir()
    assert not (run.folder / "batch_summary.json").exists()


@pytest.mark.parametrize(
    "data",
    [
        {"type": "list", "items": ["x"]},
        {"type": "records", "items": [{"prompt": "x"}]},
        {"prompts": ["x"]},
    ],
)
def test_a_document_with_room_for_several_is_a_batch_even_with_one(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    run = run_agents(repeat, {"data": data}, tmp_path)
    assert run.result["metadata"]["tasks_count"] == 1
    assert "task" not in run.result["metadata"]
    assert (run.folder / "work" / "1").is_dir()


def test_items_come_in_the_order_of_the_rows_however_they_end(tmp_path: Path) -> None:
    async def later_first(asked: Asked) -> str:
        await asyncio.sleep(0.02 * (5 - int(asked.prompt)))
        return asked.prompt

    run = run_agents(later_first, rows(*"01234"), tmp_path)
    assert [item["output"] for item in run.result["items"]] == [*"01234"]
    ended = [line["item"] for line in trace_of(run) if line["kind"] == "answer"]
    assert ended != sorted(ended)
    logs = sorted(path.name for path in (run.folder / "batch_logs").iterdir())
    assert logs == [f"task_{n}_output.txt" for n in range(1, 6)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_items_run_at_once_than_the_document_says(tmp_path: Path, concurrency: int) -> None:
    running: set[str] = set()
    most = 0

    async def count(asked: Asked) -> str:
        nonlocal most
        running.add(asked.prompt)
        most = max(most, len(running))
        await asyncio.sleep(0.01)
        running.discard(asked.prompt)
        return ""

    run_agents(count, {**rows(*"abcdefgh"), "agent": {"concurrency": concurrency}}, tmp_path)
    assert most == concurrency


def test_an_item_that_fails_spoils_no_other(tmp_path: Path) -> None:
    run = run_agents(stumble, rows("a", "bad", "c"), tmp_path)
    assert run.ok
    assert run.result["metadata"]["batch_summary"] == {
        "total_tasks": 3,
        "completed": 2,
        "failed": 1,
    }
    failed = run.result["items"][1]
    assert failed["error"] == {"code": "executor.failed", "message": "cannot"}
    assert failed["output"] == "half"
    assert json.loads((run.folder / "batch_summary.json").read_text())["failed"] == 1


def test_a_bug_in_one_item_spoils_no_other(tmp_path: Path) -> None:
    async def break_down(asked: Asked) -> str:
        return ["done"][int(asked.prompt)]

    run = run_agents(break_down, rows("0", "1"), tmp_path)
    assert run.result["items"][1]["error"]["message"].startswith("the agent broke: IndexError")
    assert run.result["items"][0]["finish_reason"] == "completed"


def test_a_batch_fails_when_all_of_it_fails_and_its_files_stay(tmp_path: Path) -> None:
    run = run_agents(stumble, rows("bad", "bad too"), tmp_path)
    assert isinstance(run.error, ExecutionError)
    assert str(run.error) == "all 2 tasks of the batch failed, the first so: cannot"
    assert run.error.retriable
    assert json.loads((run.folder / "batch_summary.json").read_text())["failed"] == 2
    assert "half" in (run.folder / "batch_logs" / "task_1_output.txt").read_text()


def test_a_single_task_that_fails_says_why_and_keeps_what_there_was(tmp_path: Path) -> None:
    run = run_agents(stumble, {"task": "bad"}, tmp_path)
    assert isinstance(run.error, ExecutionError)
    assert str(run.error) == "cannot"
    assert (run.folder / "agent_output.txt").read_text() == "half"


def test_a_batch_without_rows_is_an_empty_result(tmp_path: Path) -> None:
    run = run_agents(repeat, rows("a", limit=0), tmp_path)
    assert run.result["items"] == []
    assert run.result["metadata"]["batch_summary"]["total_tasks"] == 0


def test_a_row_that_cannot_be_read_fails_the_task_before_anything_is_paid_for(
    tmp_path: Path,
) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "a"}\nno json\n')
    begun: list[str] = []

    async def note(asked: Asked) -> str:
        begun.append(asked.prompt)
        return ""

    run = run_agents(note, {"data": {"type": "jsonl", "path": str(lines)}}, tmp_path / "out")
    assert isinstance(run.error, InputError)
    assert "line 2" in str(run.error)
    assert begun == []


def test_a_blank_row_is_no_task(tmp_path: Path) -> None:
    run = run_agents(repeat, rows("a", " \n"), tmp_path)
    done, blank = run.result["items"]
    assert done["finish_reason"] == "completed"
    assert blank["error"]["message"] == "row 1 is blank, so that there is no task"
    assert blank["usage"]["llm_requests"] == 0


def test_each_item_has_a_folder_a_budget_and_a_time_of_its_own(tmp_path: Path) -> None:
    seen: list[Asked] = []

    async def note(asked: Asked) -> str:
        seen.append(asked)
        (asked.folder / "made.txt").write_text(asked.prompt)
        return ""

    run = run_agents(note, {**rows("a", "b"), "agent": {"timeout": 50}}, tmp_path)
    assert [asked.folder for asked in seen] == [run.folder / "work" / n for n in "12"]
    assert seen[0].budget is not seen[1].budget
    assert 0 < seen[0].deadline <= seen[1].deadline
    assert (run.folder / "work" / "2" / "made.txt").read_text() == "b"


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({"task": "x"}, executor.SINGLE_S),
        (rows("x"), executor.BATCH_S),
        ({"task": "x", "agent": {"timeout": 70}}, 70),
        ({"task": "x", "agent": {"timeoutSec": 70}, "timeoutSec": 20}, 20),
    ],
)
def test_the_time_of_an_item_is_the_documents_or_the_usual_never_beyond_the_tasks(
    tmp_path: Path, spec: dict[str, Any], seconds: float
) -> None:
    left: list[float] = []

    async def note(asked: Asked) -> str:
        left.append(asked.deadline - asked.budget._clock())
        return ""

    assert run_agents(note, spec, tmp_path).ok
    assert seconds - 5 < left[0] <= seconds


def test_an_agent_that_outlives_its_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "CLEANUP_S", 0.1)
    ended = asyncio.Event()

    async def hang(asked: Asked) -> str:
        if asked.prompt == "quick":
            return "done"
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.set()
            await asyncio.sleep(0.5)  # a tool that takes no cancel
        return "too late"

    run = run_agents(hang, {**rows("slow", "quick"), "agent": {"timeout": 0.1}}, tmp_path)
    slow, quick = run.result["items"]
    assert slow["error"]["code"] == DeadlineError.code
    assert quick["output"] == "done"
    assert ended.is_set()


def test_the_operators_ceilings_hold_over_the_documents_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWMESH_TEST_AGENT_STEPS_MAX", "3")

    async def look(asked: Asked) -> str:
        return str(asked.budget.limits.steps)

    run = run_agents(look, {"task": "x", "agent": {"limits": {"steps": 50}}}, tmp_path)
    assert run.result["items"][0]["output"] == "3"


def test_usage_holds_what_all_agents_of_an_item_took(tmp_path: Path) -> None:
    async def work(asked: Asked) -> str:
        asked.budget.before_tool("files")
        if asked.schema is not None:
            return '{"steps": [{"worker": "w", "task": "t"}]}'
        return "end"

    agent = {"form": "plan_execute", "workers": {"w": {"description": "works"}}}
    run = run_agents(work, {"task": "x", "agent": agent}, tmp_path)
    usage = run.result["usage"]
    assert (usage["llm_requests"], usage["tool_calls"], usage["total_tokens"]) == (3, 3, 45)
    assert usage["cost_usd"] == 0.75
    assert run.result["items"][0]["usage"]["llm_requests"] == 3
    assert [line["requests"] for line in trace_of(run) if line["kind"] == "usage"] == [3]


def test_a_named_agent_is_laid_under_the_inline_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("instructions: Be kind.\ntools: [files]\ntimeout: 9\n")
    monkeypatch.setenv("FLOWMESH_TEST_AGENT_CONFIGS", str(tmp_path))

    async def look(asked: Asked) -> str:
        tools = [use.name for use in asked.agent.tools]
        return json.dumps([asked.agent.instructions, tools])

    spec = {"task": "x", "configName": "mine", "agent": {"tools": []}}
    run = run_agents(look, spec, tmp_path / "out")
    assert json.loads(run.result["items"][0]["output"]) == ["Be kind.", []]
    assert run.result["model"] == "mine"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"task": "x", "configName": "none"}, InputError, "no agent 'none'"),
        ({"task": "x", "agent": {"form": "workforce"}}, ContractError, "workers is required"),
        ({"task": "x", "configName": "../up"}, ContractError, "configName"),
        ({"task": "x", **rows("y")}, ContractError, "either task or data, got both"),
        ({}, ContractError, "either task or data, got neither"),
        ({"task": "x", "agent": {"instruction": "y"}}, ContractError, "instructions"),
    ],
)
def test_what_is_wrong_with_a_document_is_told(
    tmp_path: Path, spec: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = run_agents(repeat, spec, tmp_path)
    assert isinstance(run.error, error)
    assert message in str(run.error)


def test_progress_counts_items(tmp_path: Path) -> None:
    run = run_agents(repeat, rows("a", "b"), tmp_path)
    told = [(values["fraction"], values["message"]) for values in run.progress]
    assert told == [(0.5, "1 of 2 tasks"), (1.0, "2 of 2 tasks")]


def test_a_secret_in_an_answer_or_an_error_is_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-operator-0123456789"
    monkeypatch.setenv("AGENT_LLM_API_KEY", secret)

    async def leak(asked: Asked) -> AgentAnswer | str:
        asked.trace.write("tool_call", "", tool="http", arguments={"q": secret})
        if asked.prompt == "raise":
            raise ValueError(secret)
        error = ExecutionError(f"{secret} is wrong") if asked.prompt == "fail" else None
        return AgentAnswer(output=f"it is {secret}", data={secret: [secret]}, error=error)

    run = run_agents(leak, rows("say", "fail", "raise"), tmp_path)
    assert run.ok
    written = [path.read_text() for path in run.folder.rglob("*") if path.is_file()]
    assert secret[:10] not in "".join([*written, json.dumps(run.result)])
    assert "${env.AGENT_LLM_API_KEY}" in run.result["items"][0]["output"]
    alone = run_agents(leak, {"task": "fail"}, tmp_path / "alone")
    assert str(alone.error) == "${env.AGENT_LLM_API_KEY} is wrong"


def test_the_items_can_be_exported_as_lines_for_a_later_stage(tmp_path: Path) -> None:
    run = run_agents(repeat, rows("a", metadata=[{"id": 7}]), tmp_path)
    (item,) = run.result["items"]
    assert (item["prompt"], item["output"], item["metadata"]) == ("a", "did a", {"id": 7})


def test_what_runs_agents_is_closed_when_the_task_fails(tmp_path: Path) -> None:
    closed: list[bool] = []
    failing = make_executor(stumble, on_close=lambda: closed.append(True))
    info = attrs.evolve(INFO)
    assert not run_task(failing, {"task": "bad"}, info=info, folder=tmp_path).ok
    assert closed == [True]


def make_context(folder: Path, now: list[float], **spec: Any) -> RunContext:
    """Return the context of a task that must have ended at 10 on a clock that ``now`` holds."""
    rows = RowSource.from_prompts(spec["data"]["items"])
    return RunContext(
        task_id="t",
        task_type="agent",
        spec=AgentSpec.model_validate(spec),
        raw_spec=spec,
        folder=folder,
        inputs=Inputs(rows=rows),
        clock=lambda: now[0],
        deadline=10.0,
    )


def test_no_item_begins_when_the_time_of_the_task_is_over(tmp_path: Path) -> None:
    now, begun = [0.0], []

    async def dawdle(asked: Asked) -> str:
        begun.append(asked.prompt)
        now[0] = 11.0
        return ""

    spec = {**rows("a", "b"), "agent": {"concurrency": 1}}
    with pytest.raises(DeadlineError, match="task t reached its deadline"):
        asyncio.run(make_executor(dawdle)().run(make_context(tmp_path, now, **spec)))
    assert begun == ["a"]


def test_a_secret_in_what_is_refused_at_once_is_masked(tmp_path: Path) -> None:
    class Refusing(AgentExecutor):
        def open_runners(self, ctx: RunContext, block: Any, mask: Any) -> Any:
            raise InputError("endpoint refused sk-document-key")

    model = {"base_url": "http://127.0.0.1:1/v1", "name": "m", "api_key": "sk-document-key"}
    ctx = make_context(tmp_path, [0.0], **rows("a"), agent={"model": model})
    with pytest.raises(InputError, match=r"^endpoint refused \$\{env.agent.model.api_key\}$"):
        asyncio.run(Refusing().run(ctx))
