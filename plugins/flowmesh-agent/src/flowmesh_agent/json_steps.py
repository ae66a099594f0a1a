"""A model that calls tools in plain JSON, around one that need not know what tools are.

``protocol.py`` says how a step is spelled; here the library's messages are turned into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    RetryFeedbackPart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.output import OutputObjectDefinition
from pydantic_ai.settings import ModelSettings

from flowmesh_agent.protocol import (
    Answered,
    Called,
    Offer,
    StepError,
    Turn,
    build_chat,
    explain_tools,
    read_step,
    step_schema,
    write_call,
    write_result,
)

__all__ = ["STEP_ERROR", "JsonSteps", "read_chat"]

STEP_ERROR = "flowmesh_step_error"
"""Key of ``ModelResponse.provider_details``: why the text is no step."""


class JsonSteps(WrapperModel):  # type: ignore[misc] # the engine's types are not read
    """Asks a model for calls of tools in plain JSON; without tools it is that model itself."""

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Ask for one step."""
        wanted = model_request_parameters
        answer = _answer_schema(wanted)
        offers = [
            Offer(
                name=tool.name,
                description=tool.description or "",
                parameters=tool.parameters_json_schema,
            )
            for tool in wanted.function_tools
        ]
        if not offers and wanted.output_mode != "tool":
            return await self.wrapped.request(messages, model_settings, wanted)
        instructions = [part.content for part in wanted.instruction_parts or ()]
        told = "\n\n".join(filter(None, (*instructions, explain_tools(offers, answer))))
        step = OutputObjectDefinition(name="step", json_schema=step_schema(offers, answer))
        response = await self.wrapped.request(
            _plain(read_chat(messages, told)),
            model_settings,
            ModelRequestParameters(output_mode="native", output_object=step),
        )
        return _read(response, wanted, structured=answer is not None)


def _answer_schema(wanted: ModelRequestParameters) -> dict[str, Any] | None:
    if wanted.output_mode == "text":
        return None
    tool = wanted.output_mode == "tool"
    schema: dict[str, Any] = (
        wanted.output_tools[0].parameters_json_schema if tool else wanted.output_object.json_schema
    )
    return schema


def _read(
    response: ModelResponse, wanted: ModelRequestParameters, *, structured: bool
) -> ModelResponse:
    """Return a step as the library knows it; text that is none goes on with the reason."""
    text = response.text or ""
    try:
        part = _part(read_step(text, structured=structured), wanted)
    except StepError as exc:
        details = {**(response.provider_details or {}), STEP_ERROR: str(exc)}
        return replace(response, parts=[TextPart(text)], provider_details=details)
    return replace(response, parts=[part])


def _part(step: Called | Answered, wanted: ModelRequestParameters) -> TextPart | ToolCallPart:
    if isinstance(step, Called):
        return ToolCallPart(step.tool, dict(step.arguments))
    if wanted.output_mode == "tool":
        return ToolCallPart(wanted.output_tools[0].name, step.value)
    return TextPart(
        step.value if isinstance(step.value, str) else json.dumps(step.value, ensure_ascii=False)
    )


def read_chat(messages: Sequence[ModelMessage], instructions: str | None) -> list[dict[str, str]]:
    """Return messages as a chat in which calls of tools and their results are plain text."""
    turns = [Turn("system", instructions)] if instructions else []
    for message in messages:
        for part in message.parts:
            if isinstance(message, ModelResponse):
                turns.append(Turn("assistant", _said(part)))
            elif isinstance(part, SystemPromptPart) and not turns:
                turns.append(Turn("system", part.content))  # templates take none later on
            else:
                turns.append(Turn("user", _told(part)))
    return build_chat([turn for turn in turns if turn.text])


def _said(part: Any) -> str:
    if isinstance(part, ToolCallPart):
        return write_call(part.tool_name, part.args_as_dict())
    return str(part.content)


def _told(part: Any) -> str:
    if isinstance(part, ToolReturnPart):
        return write_result(part.tool_name, part.model_response_str())
    if isinstance(part, RetryFeedbackPart):
        return str(part.model_response())
    return part.content if isinstance(getattr(part, "content", None), str) else ""


def _plain(chat: Sequence[Mapping[str, str]]) -> list[ModelMessage]:
    """Return a chat as messages of the library."""
    made = {
        "system": lambda text: ModelRequest(parts=[SystemPromptPart(text)]),
        "user": lambda text: ModelRequest(parts=[UserPromptPart(text)]),
        "assistant": lambda text: ModelResponse(parts=[TextPart(text)]),
    }
    return [made[message["role"]](message["content"]) for message in chat]
