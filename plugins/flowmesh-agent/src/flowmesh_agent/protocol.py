"""Calls of tools in plain JSON, for models that know none.

Each answer of the model is one object, which a schema holds it to: ``{"tool": name, "arguments":
{...}}`` or ``{"answer": ...}``. Whoever asks the model turns its own messages into ``Turn``s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote

import attrs

__all__ = [
    "Answered",
    "Called",
    "Offer",
    "StepError",
    "Turn",
    "build_chat",
    "explain_tools",
    "read_step",
    "step_schema",
    "write_call",
    "write_result",
]

_DEFINITIONS = ("$defs", "definitions")
_WITHIN = re.compile(r"#(?:/|\Z)")
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)


class StepError(ValueError):
    """The model's text is no step; the message tells the model so."""


@attrs.frozen(kw_only=True)
class Offer:
    """A tool that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Turn:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    text: str


@attrs.frozen
class Called:
    """The model wants a tool."""

    tool: str
    arguments: Mapping[str, Any]


@attrs.frozen
class Answered:
    """The model has its answer: text, or an object where a schema was given."""

    value: Any


def step_schema(offers: Iterable[Offer], answer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of one step.

    Args:
        offers: The tools.
        answer: Schema of the answer, or None for text.
    """
    definitions: dict[str, Any] = {}
    steps = [
        _exactly(
            tool={"const": offer.name},
            arguments=_lift(_parameters(offer), definitions),
        )
        for offer in offers
    ]
    wanted = {"type": "string"} if answer is None else _lift(answer, definitions)
    schema: dict[str, Any] = {"anyOf": [*steps, _exactly(answer=wanted)]}
    return schema | ({"$defs": definitions} if definitions else {})


def _exactly(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _parameters(offer: Offer) -> Mapping[str, Any]:
    # Held to an open object, a small model goes on inventing members until it is cut off.
    closed = {"additionalProperties": False} if offer.parameters.get("properties") else {}
    return {"type": "object", **closed, **offer.parameters}


def _lift(schema: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return a schema to stand within another; what it refers to becomes definitions of that."""
    names: dict[str, str] = {}

    def rename(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: point(key, item) for key, item in value.items()}
        return [rename(item) for item in value] if isinstance(value, list) else value

    def point(key: str, value: Any) -> Any:
        if key != "$ref" or not isinstance(value, str) or not _WITHIN.match(value):
            return rename(value)
        if value not in names:
            names[value] = f"d{len(definitions)}"
            definitions[names[value]] = {}  # it may refer to itself
            definitions[names[value]] = rename(_follow(schema, value))
        return f"#/$defs/{names[value]}"

    lifted: dict[str, Any] = rename({k: v for k, v in schema.items() if k not in _DEFINITIONS})
    return lifted


def _follow(schema: Any, reference: str) -> Any:
    """Return what a reference leads to, or a schema of anything. Source: RFC 6901."""
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            schema = schema[int(key) if isinstance(schema, list) else key]
        except (LookupError, TypeError, ValueError):
            return {}
    return schema


def explain_tools(offers: Iterable[Offer], answer: Mapping[str, Any] | None) -> str:
    """Return what the model must be told to answer in steps."""
    wanted = "your answer as text" if answer is None else f"an object that fits {_dump(answer)}"
    tools = "\n".join(
        f"- {offer.name}: {offer.description} Arguments: {_dump(_parameters(offer))}"
        for offer in offers
    )
    return (
        "Reply with one JSON object and nothing else. To use a tool, reply"
        ' {"tool": NAME, "arguments": {...}}; you then get its result. When you need no tool, or'
        f' no more of them, reply {{"answer": ...}} with {wanted}.\nTools:\n{tools}'
    )


def write_call(tool: str, arguments: Mapping[str, Any]) -> str:
    """Return the step that calls a tool, as the model would have written it."""
    return _dump({"tool": tool, "arguments": arguments})


def write_result(tool: str, content: str) -> str:
    """Return what the model is told of a call's result."""
    return f"Result of {tool}: {content}"


def read_step(text: str, *, structured: bool) -> Called | Answered:
    """Read what a model wrote.

    Text that is no JSON at all is the answer where text is wanted: not every endpoint holds a
    model to a schema.

    Args:
        text: A step, perhaps fenced as Markdown has it.
        structured: Whether the answer must be an object.

    Raises:
        StepError: It is neither a call nor an answer.
    """
    text = text.strip()
    fenced = _FENCED.match(text)
    try:
        step = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as exc:
        if structured or fenced or text.startswith("{"):
            raise StepError(f"that is no valid JSON: {exc}; reply with one JSON object") from None
        return Answered(text)
    return _read_object(step, structured=structured)


def _read_object(step: Any, *, structured: bool) -> Called | Answered:
    if not isinstance(step, dict) or len({"tool", "answer"} & step.keys()) != 1:
        raise StepError('reply with one JSON object that has either "tool" or "answer"')
    if "tool" in step:
        arguments = step.get("arguments", {})
        if not isinstance(step["tool"], str) or not isinstance(arguments, dict):
            raise StepError('"tool" must be the name of a tool, "arguments" an object')
        return Called(step["tool"], arguments)
    answer = step["answer"]
    if isinstance(answer, dict if structured else str):
        return Answered(answer)
    if structured:
        raise StepError('"answer" must be an object')
    return Answered(_dump(answer))


def build_chat(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return messages as chat templates take them: neighbours of one role are joined."""
    chat: list[dict[str, str]] = []
    for turn in turns:
        if chat and chat[-1]["role"] == turn.role:
            chat[-1]["content"] += f"\n\n{turn.text}"
        else:
            chat.append({"role": turn.role, "content": turn.text})
    return chat


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
