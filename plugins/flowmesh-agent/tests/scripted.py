"""A model that answers as a script says, in this process; imports the engine."""

from __future__ import annotations

import asyncio
from typing import Any

from endpoint import Hang, Slow, Step, as_reply
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage

__all__ = ["ScriptedModel", "scripted"]


class ScriptedModel(FunctionModel):  # type: ignore[misc] # the engine's types are not read
    """Answers the n-th request by the n-th step.

    Attributes:
        requests: Messages and what else the model was told, of each request.
    """

    def __init__(self, *steps: Step | BaseException) -> None:
        super().__init__(self._answer, model_name="scripted")
        self.requests: list[tuple[list[ModelMessage], AgentInfo]] = []
        self._steps = list(steps)

    async def _answer(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        self.requests.append((list(messages), info))
        assert self._steps, "the script has ended"
        step: Any = self._steps.pop(0)
        if callable(step):
            step = step(messages, info)
        if isinstance(step, Slow):
            await asyncio.sleep(step.seconds)
            step = step.step
        if isinstance(step, Hang):
            await asyncio.sleep(3600)
        if isinstance(step, BaseException):
            raise step
        return _response(step, len(self.requests))


def scripted(*steps: Step | BaseException) -> ScriptedModel:
    """Return a model for ``Agent``; steps as in ``ScriptedEndpoint``.

    A function among them gets the messages and ``AgentInfo``; an exception is raised.
    """
    return ScriptedModel(*steps)


def _response(step: Any, number: int) -> ModelResponse:
    reply = as_reply(step)
    parts: list[Any] = [TextPart(reply.text)] if reply.text else []
    for index, each in enumerate(reply.calls):
        arguments = each.arguments if isinstance(each.arguments, str) else dict(each.arguments)
        parts.append(ToolCallPart(each.tool, arguments, tool_call_id=f"call-{number}-{index}"))
    if reply.tokens is None:
        return ModelResponse(parts=parts)
    prompt, answer = reply.tokens
    return ModelResponse(parts=parts, usage=RequestUsage(input_tokens=prompt, output_tokens=answer))
