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

from flowmesh_core import DeadlineError, Outcome, RunContext, SecretMask


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
    ctx = RunContext(
        task_id="t",
        task_type="agent",
        spec=AgentSpec.model_validate(spec),
        raw_spec=spec,
        folder=tmp_path,
        clock=time.monotonic,
        start_child=start,
    )

    async def main() -> None:
        async with runners.open_runners(ctx, AgentBlock.model_validate(agent), SecretMask({})):
            raise AssertionError("nothing was opened")

    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"models of agents were not ready within 0\.2 s"):
        asyncio.run(main())
    assert time.monotonic() - began < 2
    assert [child.cancelled() for child in started] == [True]
