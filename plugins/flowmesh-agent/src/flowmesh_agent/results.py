"""What a task gives back: items, usage and files, in the shapes that earlier readers know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from flowmesh_agent.answer import AgentAnswer, TokenUsage
from flowmesh_core import ExecutionError, FlowmeshError, InputError, Row

__all__ = ["Done", "batch_failure", "build_result", "task_text", "write_batch_item", "write_files"]

OUTPUT = "agent_output.txt"
BATCH_LOGS = "batch_logs"


@attrs.frozen(kw_only=True)
class Done:
    """One item at its end.

    Attributes:
        answer: Of its lead agent.
        usage: Of all its agents.
        seconds: It took.
    """

    row: Row
    answer: AgentAnswer
    usage: TokenUsage
    seconds: float

    @property
    def number(self) -> int:
        """As files count, from 1."""
        return self.row.index + 1

    @property
    def finish_reason(self) -> str:
        """``completed`` or ``failed``."""
        return "completed" if self.answer.ok else "failed"


def task_text(row: Row) -> str:
    """Return a row's prompt as one text; messages of a chat are told in turn."""
    if isinstance(row.prompt, str):
        return row.prompt
    if len(row.prompt) == 1:
        return _content(row.prompt[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in row.prompt)


def _content(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def build_result(
    done: Sequence[Done],
    *,
    config_name: str,
    llm: str,
    is_batch: bool,
    execution_log: Sequence[Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Return the result of a task, as ``spec.AgentResult`` has it.

    Args:
        done: All items, in order of the rows.
        config_name: Name of the agent.
        llm: Name of the lead's model.
        is_batch: Whether the document holds several tasks, however many there were.
        execution_log: As the trace has it.
        seconds: From start to end.
    """
    usage = sum((item.usage for item in done), TokenUsage())
    about: dict[str, Any] = {"execution_log": list(execution_log)}
    if is_batch:
        about |= {"tasks_count": len(done), "batch_summary": _summary(done)}
    else:
        about["task"] = task_text(done[0].row)
    return {
        "ok": True,
        "model": config_name,
        "llm": llm,
        "items": [_item(each) for each in done],
        "usage": {
            **_usage(usage),
            "latency_sec": seconds,
            "execution_time_sec": seconds,
            "num_requests": len(done),
            "agent_config": config_name,
        },
        "metadata": about,
    }


def _summary(done: Sequence[Done]) -> dict[str, int]:
    completed = sum(item.answer.ok for item in done)
    return {"total_tasks": len(done), "completed": completed, "failed": len(done) - completed}


def _item(done: Done) -> dict[str, Any]:
    answer = done.answer
    item: dict[str, Any] = {
        "index": done.row.index,
        "prompt": done.row.prompt,
        "output": answer.output,
        "finish_reason": done.finish_reason,
        "metadata": dict(done.row.metadata),
        "usage": {**_usage(done.usage), "seconds": done.seconds},
    }
    if answer.truncated:
        item["truncated"] = True
    if answer.data is not None:
        item["data"] = answer.data
    if answer.error is not None:
        item["error"] = {"code": answer.error.code, "message": str(answer.error)}
    return item


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.tokens,
        "llm_requests": usage.requests,
        "tool_calls": usage.tool_calls,
        "cost_usd": usage.cost_usd,
        "unmeasured_requests": usage.unmeasured,
    }


def write_batch_item(folder: Path, done: Done) -> None:
    """Write one item's answer, as soon as it is there."""
    logs = folder / BATCH_LOGS
    logs.mkdir(exist_ok=True)
    _write(logs / f"task_{done.number}_output.txt", _told(done))


def write_files(folder: Path, done: Sequence[Done], *, is_batch: bool) -> None:
    """Write the answer of a task, or those of a batch with their summary."""
    if not is_batch:
        _write(folder / OUTPUT, done[0].answer.output)
        return
    sections = [f"# task {item.number}\n\n{_told(item)}\n" for item in done]
    _write(folder / OUTPUT, "\n".join(sections))
    tasks = [
        {"index": item.row.index, "finish_reason": item.finish_reason, "seconds": item.seconds}
        for item in done
    ]
    summary = {**_summary(done), "tasks": tasks}
    _write(folder / "batch_summary.json", json.dumps(summary, indent=2))


def _told(done: Done) -> str:
    error = done.answer.error
    return done.answer.output + (f"\n\n[failed: {error}]" if error is not None else "")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def batch_failure(done: Sequence[Done]) -> FlowmeshError | None:
    """Return why a batch failed as a whole, which takes that every item did.

    Trying again may help only where it may help each of them.
    """
    errors = [item.answer.error for item in done if item.answer.error is not None]
    if not errors or len(errors) < len(done):
        return None
    told = f"all {len(errors)} tasks of the batch failed, the first so: {errors[0]}"
    if all(isinstance(error, InputError) for error in errors):
        return InputError(told)
    return ExecutionError(told, retriable=all(error.retriable for error in errors))
