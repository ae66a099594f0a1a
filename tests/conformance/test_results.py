"""A result that does not fit its declared model: an error in tests, a warning on a worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import attrs
import pytest

from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.checking import check_result
from flowmesh_core.config import load_settings
from flowmesh_core.contract import parse_task
from flowmesh_core.executor import Executor, ExecutorInfo, RunContext
from flowmesh_core.plugins import load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.testing import run_task
from flowmesh_core.testing.harness import build_runner

FITTING = {"ok": True, "model": "m", "items": [], "usage": {}}
INFO = ExecutorInfo(
    name="acme.tells",
    task_types="acme.tells",
    target="acme:Tells",
    places="inline",
    result="flowmesh_core:InferenceResult",
)


class Tells(Executor):
    def run(self, ctx: RunContext) -> Any:
        return ctx.raw_spec["told"]


def test_a_result_that_fits_is_left_alone() -> None:
    problems = check_result(INFO, FITTING)
    assert problems == []
    run = run_task(Tells, {"told": FITTING}, info=INFO)
    assert run.ok, run.error
    assert run.result == FITTING


def test_a_test_fails_at_the_field_that_does_not_fit() -> None:
    run = run_task(Tells, {"told": {**FITTING, "items": 3}}, info=INFO)
    assert run.error is not None
    assert run.error.code == "executor.failed"
    assert str(run.error) == (
        "not the result that acme.tells declares: result.items must be a list, got 3"
    )
    assert run.result["items"] == 3


@pytest.mark.parametrize("change", [{"result": ""}, {"environment": "gpu"}])
def test_what_cannot_be_checked_here_passes(change: dict[str, str]) -> None:
    assert check_result(attrs.evolve(INFO, **change), {"items": 3}) == []


def test_a_model_that_is_not_there_is_a_problem_of_its_own() -> None:
    (problem,) = check_result(attrs.evolve(INFO, result="acme_gone:Model"), FITTING)
    assert problem.startswith("cannot import acme_gone:Model: ModuleNotFoundError")


async def run_on_a_worker(folder: Path, told: Any) -> Any:
    settings = load_settings({}, results_dir=folder)
    registry = ExecutorRegistry()
    registry.register(INFO, Tells)
    runner = build_runner(settings, load_plugins(settings), registry, lambda *_: None)
    task = parse_task({"spec": {"taskType": "acme.tells", "told": told}}, task_id="75de")
    runner.admit(["75de"])
    try:
        async with runner.reserve(task) as reservation:
            attempt = TaskFolders(folder).begin("75de", task.destination)
            return await runner.run(task, attempt, reservation)
    finally:
        await runner.close()


@pytest.mark.parametrize(("items", "warned"), [([], False), (3, True)])
def test_a_worker_warns_and_keeps_what_was_computed(
    items: Any, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    with caplog.at_level(logging.WARNING):
        outcome = asyncio.run(run_on_a_worker(tmp_path, {**FITTING, "items": items}))
    assert outcome.ok
    assert outcome.result["items"] == items
    told = "task 75de: not the result that acme.tells declares: result.items must be a list, got 3"
    assert caplog.messages == ([told] if warned else [])
