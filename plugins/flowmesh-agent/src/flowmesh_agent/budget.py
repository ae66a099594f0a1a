"""The budget of one item: what all of its agents together may still spend.

Steps and tool calls are counted before they begin, so that no number of agents at once goes over
them. Tokens and cost are known afterwards only: once they are spent nothing more begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flowmesh_agent.answer import TokenUsage
from flowmesh_agent.spec import Limits
from flowmesh_core import ExecutionError

__all__ = ["Budget", "BudgetError"]


class BudgetError(ExecutionError):
    """An item has spent one of its limits."""


class Budget:
    """Counts what an item takes; used on one event loop, from any number of its coroutines.

    Args:
        limits: As the operator's ceilings leave them; ``seconds`` run from now.
        clock: Monotonic, in seconds.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.usage = TokenUsage()
        self.steps = 0
        self.tool_calls = 0
        self._clock = clock
        self._started = clock()

    @property
    def remaining_s(self) -> float | None:
        """Seconds left, not below 0; None without a limit."""
        if self.limits.seconds is None:
            return None
        return max(0.0, self._started + self.limits.seconds - self._clock())

    def before_request(self) -> None:
        """Count a request to the model that is about to be sent, for the first time or again.

        Raises:
            BudgetError: Nothing is left for it.
        """
        self._check()
        if self.steps >= self.limits.steps:
            raise _spent("steps", self.limits.steps)
        self.steps += 1

    def after_request(self, usage: TokenUsage) -> None:
        """Add what a request took, also of one that failed.

        Raises:
            BudgetError: Its cost is unknown where ``cost_usd`` is limited.
        """
        self.usage += usage
        if self.limits.cost_usd is not None and usage.cost_usd is None:
            raise BudgetError(
                "budget cost_usd cannot be kept: the price of a request is unknown; set"
                " FLOWMESH_AGENT_PRICES for the worker's endpoint, agent.model.prices for another"
            )

    def before_tool(self, name: str) -> None:
        """Count a call of a tool that is about to begin.

        Raises:
            BudgetError: Nothing is left for it.
        """
        self._check(f", asked for tool {name}")
        if self.tool_calls >= self.limits.tool_calls:
            raise _spent("tool_calls", self.limits.tool_calls, f", asked for tool {name}")
        self.tool_calls += 1

    def _check(self, where: str = "") -> None:
        limits, usage = self.limits, self.usage
        if self.remaining_s == 0.0:
            raise _spent("seconds", limits.seconds, where)
        if usage.tokens >= limits.tokens:
            raise _spent("tokens", limits.tokens, where)
        if limits.cost_usd is not None and (usage.cost_usd or 0.0) >= limits.cost_usd:
            raise _spent("cost_usd", limits.cost_usd, where)


def _spent(name: str, limit: float | None, where: str = "") -> BudgetError:
    return BudgetError(f"budget {name} of {limit} is spent{where}")
