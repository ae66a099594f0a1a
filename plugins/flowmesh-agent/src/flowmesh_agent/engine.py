"""One run of one agent on pydantic-ai: the gate that everything passes, output by schema, errors.

Whatever the library raises leaves as an error of flowmesh, and secrets never reach the model.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from pydantic_ai import Agent, ModelRetry, UsageLimits
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import (
    AgentRunError,
    ModelAPIError,
    ModelConnectionError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRequestTimeout,
    OutputTokenLimitExceeded,
    RetryModelRequest,
    RunTimedOut,
    ToolFailed,
    ToolFailedError,
    ToolRetryError,
    UserError,
)
from pydantic_ai.messages import ModelRequest, ModelResponse, RetryFeedbackPart, UserPromptPart
from pydantic_core import to_jsonable_python

from flowmesh_agent.answer import AgentAnswer, TokenUsage, TraceLog
from flowmesh_agent.budget import Budget, BudgetError
from flowmesh_agent.json_steps import STEP_ERROR
from flowmesh_agent.llm import OpenedModel
from flowmesh_agent.output import build_output, build_validator
from flowmesh_agent.spec import Prices
from flowmesh_agent.tools import ToolError
from flowmesh_agent.toolset import KEPT_CHARS, keep_text
from flowmesh_core import (
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    InputError,
    SecretMask,
)

__all__ = ["Gate", "Order", "explain", "run_agent"]

OUTPUT_RETRIES = 3
PAUSE_MAX_S = 30.0
TOKEN_CHARS = 3  # few, so that an endpoint that counts nothing gets less than its budget
_PASSING = (408, 409, 425, 429)
# What the model may read of what a tool raised; the rest may say more of the worker than it should.
_TOLD = (FlowmeshError, ToolError, ModelRetry, ToolFailed, ToolFailedError, ToolRetryError)
_SHOWN = 500


@attrs.frozen(kw_only=True)
class Order:
    """What one run is to do, and within what.

    Attributes:
        name: Of the agent, as the trace shows it.
        toolsets: Of pydantic-ai, entered and left with the run.
        folder: Where results are kept that are too long for the model.
        schema: JSON schema of the answer, or None for text.
        output_mode: How the model is held to it: ``auto``, ``native``, ``tool``, ``prompted``.
        seconds: From now, or None.
    """

    name: str
    prompt: str
    instructions: str
    opened: OpenedModel
    toolsets: Sequence[Any]
    folder: Path
    schema: Mapping[str, Any] | None
    output_mode: str
    budget: Budget
    trace: TraceLog
    mask: SecretMask
    seconds: float | None


async def run_agent(order: Order) -> AgentAnswer:
    """Run an agent to its end; what goes wrong with it is the answer's ``error``."""
    gate = Gate(order)
    try:
        agent = _build(order, gate)
        result = await agent.run(
            order.prompt, timeout=order.seconds, usage_limits=UsageLimits(request_limit=None)
        )
    except (AgentRunError, UserError, FlowmeshError) as exc:
        return gate.fail(exc)
    data = None if order.schema is None else order.mask.value(dict(result.output))
    text = result.output if data is None else json.dumps(data, ensure_ascii=False)
    return AgentAnswer(
        output=order.mask.text(text), data=data, usage=gate.usage, truncated=gate.look_at_end()
    )


def _build(order: Order, gate: Gate) -> Agent[None, Any]:
    opened = order.opened
    agent: Agent[None, Any] = Agent(
        opened.model,
        instructions=order.instructions or None,
        output_type=str if order.schema is None else build_output(order.schema, order.output_mode),
        toolsets=order.toolsets,
        capabilities=[gate],
        # A model may err as often as the budget lets it; only an answer must fit at last.
        retries={"tools": order.budget.limits.steps, "output": OUTPUT_RETRIES},
        model_settings=opened.settings,
    )
    if order.schema is not None:
        agent.output_validator(build_validator(order.schema))
    return agent


class Gate(AbstractCapability[None]):  # type: ignore[misc] # the engine's types are not read
    """Stands before every request to the model and every call of a tool in one run.

    Counts both against the budget and writes them to the trace, sends again what failed in
    passing, and gives the model results without secrets, cut, and errors as results. Secrets are
    masked before anything is cut, since half a secret is not found any more.

    Attributes:
        usage: What this run has taken.
        text: What the model said last.
    """

    def __init__(self, order: Order) -> None:
        self.usage = TokenUsage()
        self.text = ""
        self._truncated = False
        self._order = order
        self._budget = order.budget
        self._step = 0

    async def wrap_model_request(
        self, ctx: Any, *, request_context: Any, handler: Any
    ) -> ModelResponse:
        """Let one step pass."""
        self._budget.before_request()
        self._step += 1
        self._write("request", messages=_shown(request_context.messages))
        started = time.monotonic()
        response: ModelResponse = await handler(request_context)
        spent = _usage(response, request_context.messages, self._order.opened.prices)
        self.usage += spent
        self._truncated = response.finish_reason == "length"
        self.text = _text(response) or self.text
        self._write(
            "response",
            text=_text(response),
            calls=[
                {"tool": call.tool_name, "arguments": to_jsonable_python(call.args)}
                for call in response.tool_calls
            ],
            seconds=round(time.monotonic() - started, 3),
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
        )
        self._budget.after_request(spent)
        problem = (response.provider_details or {}).get(STEP_ERROR)
        if problem:
            raise ModelRetry(problem)
        return response

    async def on_model_request_error(
        self, ctx: Any, *, request_context: Any, error: Exception
    ) -> ModelResponse:
        """Send a request again that failed in passing, after a pause; else say why it failed.

        Raises:
            BudgetError: Nothing is left to send it again.
        """
        failed = TokenUsage(requests=1, unmeasured=1)
        self.usage += failed
        self._budget.after_request(failed)
        problem = explain(error)
        attempt = request_context.attempt
        if not problem.retriable or attempt > self._order.opened.retries:
            raise problem from error
        pause = _pause(error, attempt)
        self._write("error", message=str(problem), retry_in_s=pause)
        await asyncio.sleep(pause)
        self._budget.before_request()
        raise RetryModelRequest

    async def wrap_tool_execute(
        self, ctx: Any, *, call: Any, tool_def: Any, args: Any, handler: Any
    ) -> Any:
        """Let one call pass."""
        name = call.tool_name
        self._budget.before_tool(name)
        self.usage += TokenUsage(tool_calls=1)
        place = {"tool": name, "call_id": call.tool_call_id}
        self._write("tool_call", **place, arguments=to_jsonable_python(call.args))
        started = time.monotonic()
        try:
            result = self._clean(await handler(args))
        except BudgetError:
            raise
        except Exception as exc:  # a tool is other people's code; the model goes on without it
            mask, taken, limit = self._order.mask, _since(started), self._budget.limits.result_chars
            shown = str(exc) if isinstance(exc, _TOLD) else f"{name} failed: {type(exc).__name__}"
            shown, cause = mask.text(shown)[:limit], mask.text(repr(exc))[:limit]
            self._write("tool_result", **place, error=shown, cause=cause, seconds=taken)
            raise ToolFailed(shown) from exc
        self._write("tool_result", **place, result=result, seconds=_since(started))
        return {"tool": name, "result": result}

    def look_at_end(self) -> bool:
        """Return whether the answer has been cut, and say so in the trace."""
        if self._truncated:
            self._write("warning", message="the answer was cut: agent.model.max_tokens are spent")
        return self._truncated

    def fail(self, error: Exception) -> AgentAnswer:
        """Return the answer of a run that an error ended."""
        order, budget = self._order, self._budget
        problem: FlowmeshError
        if isinstance(error, RunTimedOut):
            if budget.remaining_s == 0.0:
                problem = BudgetError(f"budget seconds of {budget.limits.seconds} is spent")
            else:
                problem = DeadlineError(f"agent {order.name or 'lead'} did not end in time")
        else:
            problem = explain(error)
        problem.args = (order.mask.text(str(problem)),)
        self._write("error", message=str(problem))
        return AgentAnswer(output=order.mask.text(self.text), usage=self.usage, error=problem)

    def _write(self, kind: str, **fields: Any) -> None:
        self._order.trace.write(kind, self._order.name, step=self._step, **fields)

    def _clean(self, result: Any) -> Any:
        """Return a result as JSON data without secrets; text in its place when it is too long.

        The whole of that is kept in a file.
        """
        plain = self._order.mask.value(to_jsonable_python(result, fallback=_describe))
        text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
        limit = self._budget.limits.result_chars
        if len(text) <= limit:
            return plain
        kept = keep_text(self._order.folder, text[:KEPT_CHARS])
        note = f"\n[cut: {len(text)} characters in all, kept in the file {kept}]"
        return text[: max(0, limit - len(note))] + note


def _describe(value: Any) -> str:
    return f"[{type(value).__name__}, not shown]"


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _text(response: ModelResponse) -> str:
    return response.text or ""


def _shown(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Return what is new in a request; results of tools have lines of their own."""
    last = messages[-1] if messages else None
    parts = last.parts if isinstance(last, ModelRequest) else ()
    return [
        {"kind": part.part_kind, "text": str(part.content)}
        for part in parts
        if isinstance(part, (UserPromptPart, RetryFeedbackPart))
    ]


def _usage(response: ModelResponse, messages: Sequence[Any], prices: Prices | None) -> TokenUsage:
    usage = response.usage
    asked, said = usage.input_tokens, usage.output_tokens
    measured = bool(asked or said)
    cost = None if usage.cost is None else float(usage.cost)
    if not measured:
        asked, said = _estimate(*messages), _estimate(response)
    elif prices is not None:
        cost = (asked * prices.input_per_million + said * prices.output_per_million) / 1e6
    return TokenUsage(
        prompt_tokens=asked,
        completion_tokens=said,
        requests=1,
        unmeasured=0 if measured else 1,
        cost_usd=cost,
    )


def _estimate(*messages: Any) -> int:
    """Return about how many tokens messages have, at least one."""
    parts = [part for message in messages for part in message.parts]
    texts = [getattr(part, "args", None) or getattr(part, "content", "") for part in parts]
    texts += [getattr(message, "instructions", None) or "" for message in messages[-1:]]
    return 1 + sum(len(str(text)) for text in texts) // TOKEN_CHARS


def _pause(error: Exception, attempt: int) -> float:
    """Return the seconds before a request is sent again: as the endpoint asks, else doubling."""
    asked = error.retry_after if isinstance(error, ModelAPIError) else None
    return float(min(0.5 * 2 ** (attempt - 1) if asked is None else asked, PAUSE_MAX_S))


def explain(error: BaseException) -> FlowmeshError:
    """Return what the library raised as an error of flowmesh.

    One of ours stays what it is, also where libraries have wrapped it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FlowmeshError):
            return cause
        cause = cause.__cause__
    text = str(error)[:_SHOWN]
    if isinstance(error, ModelHTTPError):
        return _refused(error)
    if isinstance(error, (ModelConnectionError, ModelRequestTimeout)):
        return ExecutionError(f"model {error.model_name} cannot be asked: {text}", retriable=True)
    if isinstance(error, UserError):
        return InputError(f"the agent cannot be run: {text}")
    if isinstance(error, OutputTokenLimitExceeded):
        return ExecutionError(f"the model's answer does not fit agent.model.max_tokens: {text}")
    return ExecutionError(f"the agent came to no answer: {text}")


def _refused(error: ModelHTTPError) -> ExecutionError:
    status = error.status_code
    passing = (status in _PASSING or status >= 500) and not isinstance(
        error, ModelQuotaExceededError
    )
    said = error.body.get("message") if isinstance(error.body, Mapping) else error.body
    return ExecutionError(
        f"model {error.model_name} refused the request with status {status}: {str(said)[:_SHOWN]}",
        retriable=passing,
    )
