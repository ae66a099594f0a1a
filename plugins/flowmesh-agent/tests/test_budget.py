from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flowmesh_agent.answer import AgentAnswer, TokenUsage
from flowmesh_agent.budget import Budget, BudgetError
from flowmesh_agent.spec import Limits
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core import ExecutionError, FlowmeshError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def budget(clock: Clock | None = None, **limits: Any) -> Budget:
    return Budget(Limits(**limits), clock=clock or Clock())


def usage(tokens: int = 0, cost: float | None = 0.0) -> TokenUsage:
    return TokenUsage(prompt_tokens=tokens, requests=1, cost_usd=cost)


def test_steps_are_those_that_the_limit_says() -> None:
    counted = budget(steps=2)
    counted.before_request()
    counted.before_request()
    with pytest.raises(BudgetError, match=r"^budget steps of 2 is spent$"):
        counted.before_request()
    assert counted.steps == 2


def test_a_call_that_is_not_left_is_refused_by_its_tools_name() -> None:
    counted = budget(tool_calls=1)
    counted.before_tool("shell")
    with pytest.raises(BudgetError, match="budget tool_calls of 1 is spent, asked for tool http"):
        counted.before_tool("http")
    assert counted.tool_calls == 1


def test_no_calls_at_all_may_be_allowed() -> None:
    with pytest.raises(BudgetError, match="tool_calls of 0 is spent"):
        budget(tool_calls=0).before_tool("shell")


def test_nothing_begins_once_the_tokens_are_spent() -> None:
    counted = budget(tokens=100)
    counted.after_request(usage(99))
    counted.before_request()
    counted.after_request(usage(1))
    with pytest.raises(BudgetError, match=r"budget tokens of 100 is spent$"):
        counted.before_request()
    with pytest.raises(BudgetError, match="budget tokens of 100 is spent, asked for tool x"):
        counted.before_tool("x")


def test_prompts_and_answers_count_alike() -> None:
    counted = budget(tokens=10)
    counted.after_request(TokenUsage(prompt_tokens=4, completion_tokens=6))
    with pytest.raises(BudgetError, match="tokens"):
        counted.before_request()


def test_seconds_run_from_the_start_and_never_below_nothing() -> None:
    clock = Clock()
    counted = budget(clock, seconds=5)
    assert counted.remaining_s == 5
    clock.now += 4.5
    assert counted.remaining_s == 0.5
    counted.before_request()
    clock.now += 3
    assert counted.remaining_s == 0
    with pytest.raises(BudgetError, match=r"budget seconds of 5\.0 is spent"):
        counted.before_request()


def test_time_without_a_limit_never_ends() -> None:
    clock = Clock()
    counted = budget(clock)
    clock.now += 1e9
    assert counted.remaining_s is None
    counted.before_request()


def test_cost_is_kept_where_it_is_known() -> None:
    counted = budget(cost_usd=0.5)
    counted.after_request(usage(cost=0.25))
    counted.before_request()
    counted.after_request(usage(cost=0.25))
    with pytest.raises(BudgetError, match=r"budget cost_usd of 0\.5 is spent"):
        counted.before_request()


def test_a_cost_that_cannot_be_known_ends_the_item_that_limits_it() -> None:
    with pytest.raises(BudgetError, match=r"is unknown; set FLOWMESH_AGENT_PRICES for"):
        budget(cost_usd=0.5).after_request(usage(cost=None))
    free = budget()
    free.after_request(usage(cost=None))
    free.before_request()
    assert free.usage.cost_usd is None


def test_what_a_request_took_is_counted_even_when_it_ends_the_item() -> None:
    counted = budget(cost_usd=0.5)
    with pytest.raises(BudgetError, match="cost_usd"):
        counted.after_request(usage(7, cost=None))
    assert counted.usage.tokens == 7


def test_a_spent_budget_is_a_failed_execution_that_is_not_tried_again() -> None:
    spent = budget(steps=1)
    spent.before_request()
    with pytest.raises(ExecutionError, match="steps") as caught:
        spent.before_request()
    assert caught.value.code == "executor.failed"
    assert not caught.value.retriable
    assert isinstance(FlowmeshError.from_dict(caught.value.to_dict()), ExecutionError)


@given(
    steps=st.integers(1, 40),
    tool_calls=st.integers(0, 40),
    users=st.lists(st.lists(st.sampled_from(["ask", "call"]), max_size=20), max_size=8),
)
def test_users_at_the_same_time_never_overspend(
    steps: int, tool_calls: int, users: list[list[str]]
) -> None:
    shared = budget(steps=steps, tool_calls=tool_calls)
    begun = {"ask": 0, "call": 0}

    async def user(actions: list[str]) -> None:
        for action in actions:
            try:
                shared.before_request() if action == "ask" else shared.before_tool("t")
            except BudgetError:
                continue
            begun[action] += 1
            await asyncio.sleep(0)
            if action == "ask":
                shared.after_request(usage(1))

    async def everyone() -> None:
        await asyncio.gather(*map(user, users))

    asyncio.run(everyone())
    wanted = [action for actions in users for action in actions]
    assert begun["ask"] == min(steps, wanted.count("ask"))
    assert begun["call"] == min(tool_calls, wanted.count("call"))
    assert shared.usage.requests == begun["ask"]


usages = st.builds(
    TokenUsage,
    prompt_tokens=st.integers(0, 9),
    completion_tokens=st.integers(0, 9),
    requests=st.integers(0, 9),
    unmeasured=st.integers(0, 9),
    tool_calls=st.integers(0, 9),
    cost_usd=st.none() | st.integers(0, 8).map(lambda n: n / 8),
)


@given(usages, usages, usages)
def test_usage_adds_up_in_any_order(a: TokenUsage, b: TokenUsage, c: TokenUsage) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + TokenUsage() == a
    assert (a + b).tokens == a.tokens + b.tokens
    assert ((a + b).cost_usd is None) == (a.cost_usd is None or b.cost_usd is None)
    assert (a + b).requests == a.requests + b.requests
    assert (a + b).unmeasured == a.unmeasured + b.unmeasured
    assert (a + b).tool_calls == a.tool_calls + b.tool_calls


def test_an_answer_is_good_when_nothing_went_wrong() -> None:
    assert AgentAnswer(output="x").ok
    assert not AgentAnswer(output="half", error=ExecutionError("broke")).ok
