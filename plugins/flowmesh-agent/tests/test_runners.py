"""What is opened before an agent runs, and how long that may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="needs the engine")

from flowmesh_agent import runners
from flowmesh_agent.spec import AgentBlock, AgentSpec

from flowmesh_core import DeadlineError, ExecutionError, Outcome, RunContext, SecretMask


def context(folder: Path, spec: Mapping[str, Any], start: Any) -> RunContext:
    return RunContext(
        task_id="t",
        task_type="agent",
        spec=AgentSpec.model_validate(spec) if spec else None,
        raw_spec=spec,
        folder=folder,
        clock=time.monotonic,
        start_child=start,
    )


def test_a_model_that_never_gets_ready_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "BUILD_S", 0.2)
    started: list[Future[Outcome]] = []

    def start(spec: Mapping[str, Any]) -> Future[Outcome]:
        started.append(Future())
        return started[-1]

    agent = {"model": {"serve": {"model": {"source": {"identifier": "large"}}}}}
    spec = {"task": "x", "agent": agent}
    ctx = context(tmp_path, spec, start)

    async def main() -> None:
        async with runners.open_runners(ctx, AgentBlock.model_validate(agent), SecretMask({})):
            raise AssertionError("nothing was opened")

    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"models of agents were not ready within 0\.2 s"):
        asyncio.run(main())
    assert time.monotonic() - began < 2
    assert [child.cancelled() for child in started] == [True]


@pytest.mark.parametrize(
    ("task_type", "error", "kept"),
    [
        ("inference", None, False),
        ("inference", ExecutionError("no"), True),
        ("serve", None, True),  # it still runs
    ],
)
def test_what_a_task_of_an_agent_leaves_goes_when_it_ended_well(
    tmp_path: Path, task_type: str, error: ExecutionError | None, kept: bool
) -> None:
    children = [tmp_path / "children" / str(number) for number in (1, 2)]
    outcomes = [Outcome(error=error, folder=child) for child in children]
    futures: list[Future[Outcome]] = []

    def start(spec: Mapping[str, Any]) -> Future[Outcome]:
        futures.append(Future())
        return futures[-1]

    async def main() -> None:
        ctx = context(tmp_path, {}, start)
        running = [
            asyncio.ensure_future(runners._run_task(ctx, {"taskType": task_type})) for _ in children
        ]
        await asyncio.sleep(0)
        for number in (1, 0):  # the core tells whose is whose, whatever comes first
            children[number].mkdir(parents=True)
            futures[number].set_result(outcomes[number])
            assert await running[number] is outcomes[number]
            assert children[number].exists() is kept

    asyncio.run(main())
