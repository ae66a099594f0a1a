"""What a run of one agent gives back, and who runs it: the seam between forms and engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from flowmesh_agent.spec import Role
from flowmesh_agent.tools import Tool
from flowmesh_core import FlowmeshError

__all__ = ["AgentAnswer", "Runner", "TokenUsage", "TraceLog"]


@attrs.frozen(kw_only=True)
class TokenUsage:
    """What one request, or a sum of requests, took.

    Attributes:
        prompt_tokens: As the endpoint counts them; of unmeasured requests, as estimated.
        completion_tokens: Likewise.
        requests: To models.
        unmeasured: Requests of them whose tokens nobody told; a failed one counts as none.
        tool_calls: Failed ones too.
        cost_usd: None as soon as the price of one request is unknown.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    unmeasured: int = 0
    tool_calls: int = 0
    cost_usd: float | None = 0.0

    @property
    def tokens(self) -> int:
        """Of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: TokenUsage) -> TokenUsage:
        costs = (self.cost_usd, other.cost_usd)
        return TokenUsage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            requests=self.requests + other.requests,
            unmeasured=self.unmeasured + other.unmeasured,
            tool_calls=self.tool_calls + other.tool_calls,
            cost_usd=None if costs[0] is None or costs[1] is None else costs[0] + costs[1],
        )


@attrs.frozen(kw_only=True)
class AgentAnswer:
    """What an agent said in the end, or how far it came.

    Attributes:
        output: Its text; of a failed run what there was of it.
        data: The object behind ``output`` where a schema was given.
        usage: What this run took, those that it started included.
        error: Why it failed, or None.
        truncated: Whether the model had no tokens left for more of it.
    """

    output: str = ""
    data: Any = None
    usage: TokenUsage = attrs.field(factory=TokenUsage)
    error: FlowmeshError | None = None
    truncated: bool = False

    @property
    def ok(self) -> bool:
        """Whether it came to its end."""
        return self.error is None


class Runner(Protocol):
    """Runs one agent on one prompt; safe to be used by several coroutines at once."""

    async def run(
        self,
        agent: Role,
        prompt: str,
        *,
        name: str = "",
        schema: Mapping[str, Any] | None = None,
        tools: Sequence[Tool[Any]] = (),
    ) -> AgentAnswer:
        """Run an agent to its end; what goes wrong with it is the answer's ``error``.

        Args:
            agent: Whose instructions, model and tools; a worker without a model has its lead's.
            prompt: What it is to do.
            name: Of the worker, as the trace shows it; empty for the lead.
            schema: JSON schema that ``data`` of the answer must fit.
            tools: Beside its own: what a form gives it, such as ``delegate``.
        """
        ...


class TraceLog(Protocol):
    """Where a run writes what happens, as it happens."""

    def write(self, kind: str, agent: str, **fields: Any) -> None:
        """Add one line.

        Args:
            kind: ``request``, ``response``, ``tool_call``, ``tool_result``, ``error``, or what a
                form adds.
            agent: Name of the worker; empty for the lead.
            fields: JSON data, secrets not yet masked.
        """
        ...
