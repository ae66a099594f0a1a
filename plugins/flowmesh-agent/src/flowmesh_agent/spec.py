"""``spec.agent``: what one agent is, how several work together, and what they may spend.

The same keys stand in the file of a named agent. A document only narrows what the operator's
settings allow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flowmesh_agent.references import resolve_references
from flowmesh_core import ContractError, StrictBlock, TaskSpec, Usage

__all__ = [
    "AgentBlock",
    "AgentItem",
    "AgentModel",
    "AgentResult",
    "AgentSpec",
    "AgentUsage",
    "Limits",
    "McpUse",
    "Prices",
    "Role",
    "ToolUse",
    "WorkerBlock",
]

_PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")


def _look_up(value: object, info: ValidationInfo) -> object:
    """Resolve references where the operator's own file is read, and nowhere else."""
    environ: Mapping[str, str] | None = (info.context or {}).get("environ")
    if environ is None or not isinstance(value, str):
        return value
    return resolve_references(value, environ, prefix="FLOWMESH_AGENT_")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
ShortName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$")]
Secret = Annotated[SecretStr, BeforeValidator(_look_up)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class Prices(StrictBlock):
    """``agent.model.prices``: US dollars for a million tokens."""

    input_per_million: float = Field(ge=0, le=1e6)
    output_per_million: float = Field(ge=0, le=1e6)


class AgentModel(StrictBlock):
    """``agent.model``: which model thinks, and how it writes.

    Without ``base_url``, ``inference`` and ``serve`` it is the operator's endpoint.

    Attributes:
        name: What to ask the endpoint for; without it the operator's, or that of ``serve``.
        base_url: An OpenAI-compatible endpoint, which ends in ``/v1`` as a rule.
        api_key: Its key; the operator's own is never sent to it.
        headers: Sent to ``base_url`` with each request.
        inference: Fields of an ``inference`` task for each step: ``model``, ``inference``,
            ``executor``.
        serve: Fields of a ``serve`` task, which lives as long as this one.
        max_tokens: Tokens of one answer of the model.
        retries: How often a request that failed in passing is sent again.
        tool_calls: ``native`` calls of the endpoint, or ``json``: a schema for each step, for
            models that know no tools; ``auto`` is ``native`` for endpoints, else ``json``.
        prices: What ``limits.cost_usd`` reckons with.
    """

    name: str | None = Field(default=None, min_length=1)
    base_url: str | None = None
    api_key: Secret | None = None
    headers: dict[str, Secret] = Field(default_factory=dict)
    inference: dict[str, Any] | None = None
    serve: dict[str, Any] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=2048, ge=1)
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    request_timeout_s: Seconds = 120
    retries: int = Field(default=2, ge=0, le=10)
    tool_calls: Literal["auto", "native", "json"] = "auto"
    prices: Prices | None = None

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        return None if value is None else _http_url(value)

    @field_validator("api_key")
    @classmethod
    def _is_no_placeholder(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and _PLACEHOLDER.fullmatch(value.get_secret_value()):
            raise ValueError("must be the key itself, or ${env.NAME} for a variable of the worker")
        return value

    @model_validator(mode="after")
    def _has_one_origin(self) -> AgentModel:
        origins = [
            name for name in ("base_url", "inference", "serve") if getattr(self, name) is not None
        ]
        if len(origins) > 1:
            raise ValueError(f"takes one of base_url, inference and serve, got {origins}")
        if self.base_url is None and (self.api_key is not None or self.headers):
            raise ValueError("api_key and headers need base_url: they are for that endpoint alone")
        return self


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError("must be an http:// or https:// URL without a login")
    return value


class ToolUse(BaseModel):
    """One entry of ``agent.tools``: the name of an entry point, and options of its own.

    Attributes:
        name: Entry point of ``flowmesh.agent.tools``; it may stand for several tools.
        required: Whether a worker that does not allow it refuses the task, or leaves it out.
    """

    model_config = ConfigDict(extra="allow")

    name: Name
    required: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What is said beside, for the tool itself to read."""
        return dict(self.model_extra or {})


def _by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


NamedTool = Annotated[ToolUse, BeforeValidator(_by_name, json_schema_input_type=str | ToolUse)]


class McpUse(StrictBlock):
    """``agent.mcp.<name>``: an MCP server, whose tools the model sees as ``<name>_<tool>``.

    Attributes:
        server: Name in the operator's file; without it and ``url``, the name of the block.
        url: A server of the document's own over HTTP, on a host that the operator allows agents.
        headers: Sent to ``url``.
        tools: The only tools of it that the model sees.
    """

    server: Name | None = None
    url: str | None = None
    headers: dict[str, Secret] = Field(default_factory=dict)
    tools: list[str] | None = None

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        return None if value is None else _http_url(value)

    @model_validator(mode="after")
    def _has_one_origin(self) -> McpUse:
        if self.server is not None and self.url is not None:
            raise ValueError("takes one of server and url, got both")
        if self.headers and self.url is None:
            raise ValueError("headers need url: a named server has those of the operator")
        return self


class Limits(StrictBlock):
    """``agent.limits``: what one item may spend, all of its agents together.

    Attributes:
        steps: Requests to the model.
        tool_calls: Calls of tools, failed ones too.
        tokens: Of prompts and answers.
        seconds: From the start of the item.
        cost_usd: Needs ``agent.model.prices``, or an endpoint that tells its price.
        tool_seconds: For one call of a tool.
        result_chars: Of one tool's result, that the model sees.
    """

    steps: int = Field(default=30, ge=1, le=1000)
    tool_calls: int = Field(default=100, ge=0, le=10_000)
    tokens: int = Field(default=200_000, ge=1, le=1_000_000_000)
    seconds: Seconds | None = None
    cost_usd: float | None = Field(default=None, gt=0, le=1e6)
    tool_seconds: float = Field(default=60, gt=0, le=3600)
    result_chars: int = Field(default=16_000, ge=200, le=1_000_000)


class Role(StrictBlock):
    """What one agent is: told what, thinking with which model, holding which tools.

    ``model`` is None where nothing is said: a worker then has its lead's, a lead the operator's.
    """

    description: str = ""
    instructions: str = ""
    model: AgentModel | None = None
    tools: list[NamedTool] = Field(default_factory=list)
    mcp: dict[ShortName, McpUse] = Field(default_factory=dict)

    @field_validator("tools", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("mcp", mode="before")
    @classmethod
    def _null_is_named(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {} if value is None else value
        return {name: {} if use is None else use for name, use in value.items()}


class WorkerBlock(Role):
    """``agent.workers.<name>``; ``description`` tells the lead what to give it."""

    description: str = Field(min_length=1)


class AgentBlock(Role):
    """``agent``: the lead agent, its workers and the frame in which they run.

    Attributes:
        form: ``single``; ``plan_execute``, where workers follow the lead's plan; ``workforce``,
            where the lead hands out tasks as it goes.
        workers: By name.
        timeout: Seconds for one item, with all its tools; without it, 600 for a single task and
            300 for each item of a batch.
        concurrency: Items of a batch, and tasks of a workforce, at once.
        output_schema: JSON schema that the answer must fit, an object at the root.
        output_mode: How the model is held to it.
    """

    form: Literal["single", "plan_execute", "workforce"] = "single"
    workers: dict[ShortName, WorkerBlock] = Field(default_factory=dict)
    limits: Limits = Field(default_factory=Limits)
    timeout: Seconds | None = Field(
        default=None, validation_alias=AliasChoices("timeout", "timeoutSec", "timeout_s")
    )
    concurrency: int = Field(default=4, ge=1, le=64)
    output_schema: dict[str, Any] | None = None
    output_mode: Literal["auto", "native", "tool", "prompted"] = "auto"

    @field_validator("limits", "workers", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("output_schema")
    @classmethod
    def _is_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "object":
            raise ValueError('must have type "object" at its root')
        return value

    def over(self, named: AgentBlock) -> AgentBlock:
        """Return what both say together: what is set here takes the place of ``named``'s.

        Key by key and never within one, so that no key of one ``model`` goes to the ``base_url``
        of another.

        Raises:
            ContractError: The form and the workers do not go together.
        """
        whole = named.model_copy(
            update={name: getattr(self, name) for name in self.model_fields_set}
        )
        if whole.form == "single" and whole.workers:
            raise ContractError(
                "spec.agent.workers need spec.agent.form plan_execute or workforce, got single"
            )
        if whole.form != "single" and not whole.workers:
            raise ContractError(f"spec.agent.workers is required when form is {whole.form!r}")
        return whole


class AgentSpec(TaskSpec):
    """Spec of ``agent``: one task from ``task``, or what ``data`` holds, which the core reads.

    Attributes:
        config_name: Agent that ``agent`` is laid over; of the operator's folders, or ours.
        task: What is to be done.
        agent: What differs from that agent.
    """

    config_name: Name = Field(
        default="default", validation_alias=AliasChoices("configName", "config_name")
    )
    task: Annotated[str, Field(pattern=r"\S")] | None = None
    agent: AgentBlock = Field(default_factory=AgentBlock)

    @model_validator(mode="after")
    def _has_one_source(self) -> AgentSpec:
        data = (self.model_extra or {}).get("data")
        has_data = bool(data) and not (isinstance(data, dict) and data.get("type") == "none")
        if has_data and self.task is not None:
            raise ValueError("must have either task or data, got both")
        if not has_data and self.task is None:
            raise ValueError("must have either task or data, got neither")
        return self


class AgentUsage(Usage):
    """``usage`` of a result: what all items took together; ``num_requests`` counts items."""

    agent_config: str
    execution_time_sec: float = 0.0
    llm_requests: int = 0
    tool_calls: int = 0
    cost_usd: float | None = None
    unmeasured_requests: int = 0


class AgentItem(BaseModel):
    """One task's answer.

    Attributes:
        data: The object behind the output, where a schema was given.
        truncated: Present and true where ``max_tokens`` cut the answer.
    """

    model_config = ConfigDict(extra="allow")

    index: int
    prompt: Any = None
    output: str
    finish_reason: Literal["completed", "failed"]
    metadata: dict[str, Any] = Field(default_factory=dict)
    data: Any = None
    error: dict[str, str] | None = None
    truncated: bool = False
    usage: dict[str, Any] = Field(default_factory=dict)


class AgentResult(BaseModel):
    """Result of ``agent``: one item per task, in order of the rows.

    ``model`` is the agent's name, as earlier readers expect; ``llm`` is the model's. ``metadata``
    holds ``execution_log`` and ``task``, or for a batch ``tasks_count`` and ``batch_summary``.
    """

    model_config = ConfigDict(extra="allow")

    ok: Literal[True] = True
    model: str
    llm: str = ""
    items: list[AgentItem]
    usage: AgentUsage
    metadata: dict[str, Any]
