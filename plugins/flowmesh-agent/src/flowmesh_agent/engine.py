"""One run of one agent on pydantic-ai: the gate that everything passes, output by schema, errors.

Whatever the library raises leaves as an error of flowmesh, and secrets never reach the model.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
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
        schema: JSON schema of the answer, or None for text.
        output_mode: How the model is held to it: ``auto``, ``native``, ``tool``, ``prompted``.
        seconds: From now, or None.
    """

    name: str
    prompt: str
    instructions: str
    opened: OpenedModel
    toolsets: Sequence[Any]
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
    return AgentAnswer(output=order.mask.text(text), data=data, usage=gate.usage)


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
    passing, and gives the model results without secrets, cut, and errors as results.

    Attributes:
        usage: What this run has taken.
        text: What the model said last.
    """

    def __init__(self, order: Order) -> None:
        self.usage = TokenUsage()
        self.text = ""
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
        spent = _usage(response, self._order.opened.prices)
        self.usage += spent
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
        """Send a request again that failed in passing, after a pause; else say why it failed."""
        problem = explain(error)
        attempt = request_context.attempt
        again = problem.retriable and attempt <= self._order.opened.retries
        pause = _pause(error, attempt) if again else None
        self._write("error", message=str(problem), retry_in_s=pause)
        if pause is None:
            raise problem from error
        await asyncio.sleep(pause)
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
            mask, taken = self._order.mask, _since(started)
            shown = str(exc) if isinstance(exc, _TOLD) else f"{name} failed: {type(exc).__name__}"
            shown = self._cut(mask.text(shown))
            cause = self._cut(mask.text(repr(exc)))
            self._write("tool_result", **place, error=shown, cause=cause, seconds=taken)
            raise ToolFailed(shown) from exc
        self._write("tool_result", **place, result=result, seconds=_since(started))
        return {"tool": name, "result": result}

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
        """Return a result as JSON data without secrets; text in its place when it is too long."""
        plain = self._order.mask.value(to_jsonable_python(result, fallback=_name_of))
        text = plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
        return plain if len(text) <= self._limit else self._cut(text)

    @property
    def _limit(self) -> int:
        return self._budget.limits.result_chars

    def _cut(self, text: str) -> str:
        if len(text) <= self._limit:
            return text
        return f"{text[: self._limit]}\n[cut here, {len(text)} characters in all]"


def _name_of(value: Any) -> str:
    return f"[{type(value).__name__} left out]"


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


def _usage(response: ModelResponse, prices: Prices | None) -> TokenUsage:
    usage = response.usage
    measured = bool(usage.input_tokens or usage.output_tokens)
    cost = None if usage.cost is None else float(usage.cost)
    if prices is not None and measured:
        cost = (
            usage.input_tokens * prices.input_per_million
            + usage.output_tokens * prices.output_per_million
        ) / 1e6
    return TokenUsage(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens,
        requests=1,
        unmeasured=0 if measured else 1,
        cost_usd=cost,
    )


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
