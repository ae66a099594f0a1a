"""A result that does not fit its declared model: an error in tests, a warning on a worker."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest

from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.checking import check_result
from flowmesh_core.config import load_settings
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import PluginLoadError
from flowmesh_core.executor import Executor, ExecutorInfo, RunContext
from flowmesh_core.plugins import load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.testing import run_task
from flowmesh_core.testing.findings import find_swaps
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


def test_a_model_that_is_none_is_a_problem_and_no_crash() -> None:
    (problem,) = check_result(attrs.evolve(INFO, result="flowmesh_core:Outcome"), FITTING)
    assert problem == "flowmesh_core:Outcome must be a subclass of pydantic.BaseModel, got Outcome"


@pytest.mark.parametrize(
    ("field", "target", "got"),
    [("result", "flowmesh_core:Outcome", "Outcome"), ("spec", "string:digits", "str")],
)
def test_a_class_whose_model_is_none_is_refused_when_it_is_registered(
    field: str, target: str, got: str
) -> None:
    registry = ExecutorRegistry()
    told = (
        f"executor 'acme.tells': ExecutorInfo.{field}: {target} must be a subclass of "
        f"pydantic.BaseModel, got {got}"
    )
    with pytest.raises(PluginLoadError, match=f"^{re.escape(told)}$"):
        registry.register(attrs.evolve(INFO, **{field: target}), Tells)
    registry.register(INFO, Tells)  # the name is still free


async def run_on_a_worker(folder: Path, told: Any, registry: ExecutorRegistry) -> Any:
    settings = load_settings({}, results_dir=folder)
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
    registry = ExecutorRegistry()
    registry.register(INFO, Tells)
    with caplog.at_level(logging.WARNING):
        outcome = asyncio.run(run_on_a_worker(tmp_path, {**FITTING, "items": items}, registry))
    assert outcome.ok
    assert outcome.result["items"] == items
    told = "task 75de: not the result that acme.tells declares: result.items must be a list, got 3"
    assert caplog.messages == ([told] if warned else [])


INSTALLED = attrs.evolve(INFO, target="flowmesh_core.echo:EchoExecutor")


def test_a_worker_warns_of_an_installed_one_whose_result_model_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = ExecutorRegistry([attrs.evolve(INSTALLED, result="flowmesh_core:Outcome")])
    with caplog.at_level(logging.WARNING):
        outcome = asyncio.run(run_on_a_worker(tmp_path, "hello", registry))
    assert outcome.result["echo"]["told"] == "hello"
    assert caplog.messages == [
        "task 75de: not the result that acme.tells declares: flowmesh_core:Outcome must be a "
        "subclass of pydantic.BaseModel, got Outcome"
    ]


def test_a_task_fails_before_it_runs_when_the_spec_model_is_none(tmp_path: Path) -> None:
    registry = ExecutorRegistry([attrs.evolve(INSTALLED, spec="flowmesh_core:Outcome")])
    outcome = asyncio.run(run_on_a_worker(tmp_path, "hello", registry))
    assert outcome.error.code == "plugin.load"
    assert str(outcome.error) == (
        "flowmesh_core:Outcome must be a subclass of pydantic.BaseModel, got Outcome"
    )


@pytest.mark.parametrize(
    ("got", "faults"),
    [("b", ["second was given the answer of first"]), ("d", []), ("c", []), ("e", [])],
)
def test_a_swap_is_a_strangers_answer_and_not_another_run_of_ones_own(
    got: str, faults: list[str]
) -> None:
    def ran(answer: str) -> Any:
        return SimpleNamespace(outcome=SimpleNamespace(result={"answer": answer}))

    subject = SimpleNamespace(
        members={"first": {"text": 1}, "second": {"text": 2}, "third": {"text": 2}},
        alone={"first": ran("b"), "second": ran("c"), "third": ran("d")},
        together={"second": ran(got)},
    )
    assert find_swaps(lambda result: result["answer"], cast("Any", subject)) == faults
