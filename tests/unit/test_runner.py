"""One task in the runner: failures become outcomes, limits hold, secrets stay secret."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from flowmesh_core import (
    Capability,
    ExecutionError,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    load_settings,
)
from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.artifacts.layout import TaskFolders
from flowmesh_core.artifacts.network import NetworkPolicy
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import CancelledError, DeadlineError
from flowmesh_core.members import run_members
from flowmesh_core.places.base import PlaceContext
from flowmesh_core.plugins import load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.resources import ResourceLedger
from flowmesh_core.runner import Runner
from flowmesh_core.testing import run_task


class Raises(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        error: BaseException = {
            "value": ValueError("no"),
            "os": ConnectionResetError("gone"),
            "memory": MemoryError("full"),
            "ours": ExecutionError("mine", retriable=True),
            "exit": SystemExit(3),
            "cancelled": asyncio.CancelledError(),
        }[ctx.raw_spec["kind"]]
        raise error


class Sleeps(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        if ctx.raw_spec.get("stubborn"):
            await asyncio.sleep(60)
        for _ in range(600):
            ctx.check()
            await asyncio.sleep(0.02)
        return {}


class PlainSleeps(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        while not ctx.cancelled:
            time.sleep(0.01)
        ctx.check()
        return {}


@pytest.mark.parametrize(
    ("kind", "says", "retriable"),
    [
        ("value", "ValueError: no", False),
        ("os", "ConnectionResetError: gone", True),
        ("memory", "MemoryError: full", True),
        ("ours", "mine", True),
        ("cancelled", "cancelled itself", False),
        ("exit", "tried to end the process", False),
    ],
)
def test_whatever_an_executor_raises_is_an_outcome(
    kind: str, says: str, retriable: bool, tmp_path: Path
) -> None:
    error = run_task(Raises, {"kind": kind}, folder=tmp_path).error
    assert error is not None
    assert says in str(error)
    assert error.retriable is retriable
    assert error.code == "executor.failed"


def test_the_traceback_of_an_unexpected_error_is_in_the_tasks_log(tmp_path: Path) -> None:
    run = run_task(Raises, {"kind": "value"}, folder=tmp_path)
    assert "in run" in (run.folder / "logs" / "task.log").read_text()


@pytest.mark.parametrize("executor", [Sleeps, PlainSleeps])
def test_a_deadline_ends_a_task(executor: type[Executor], tmp_path: Path) -> None:
    started = time.monotonic()
    run = run_task(executor, {"timeoutSec": 0.2}, folder=tmp_path)
    assert isinstance(run.error, DeadlineError)
    assert time.monotonic() - started < 8


def test_a_coroutine_that_ignores_its_deadline_is_cancelled(tmp_path: Path) -> None:
    settings = load_settings({}, results_dir=tmp_path, cancel_grace_s=0.2)
    spec = {"timeoutSec": 0.1, "stubborn": True}
    run = run_task(Sleeps, spec, folder=tmp_path, settings=settings)
    assert isinstance(run.error, DeadlineError)


def test_the_operators_limit_holds_when_it_is_the_shorter(tmp_path: Path) -> None:
    settings = load_settings({"TASK_TIMEOUT": "0.2"}, results_dir=tmp_path)
    run = run_task(Sleeps, {"timeoutSec": 600}, folder=tmp_path, settings=settings)
    assert isinstance(run.error, DeadlineError)


class Leaks(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        secret = ctx.spec["password"]
        ctx.progress(0.5, f"using {secret}")
        ctx.log(f"using {secret}")
        if ctx.raw_spec.get("fail"):
            raise ExecutionError(f"cannot use {secret}")
        return {"ok": True, "used": [secret, {secret: f"<{secret}>"}]}


@pytest.mark.parametrize("fail", [False, True])
def test_a_secret_is_masked_wherever_it_comes_out(
    fail: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "s3cr3t-value")
    settings = load_settings({}, results_dir=tmp_path, env_allow=("SERVICE_PASSWORD",))
    spec = {"password": "${env.SERVICE_PASSWORD}", "fail": fail}
    run = run_task(Leaks, spec, folder=tmp_path, settings=settings)
    log = (run.folder / "logs" / "task.log").read_text()
    seen = f"{run.result} {run.error} {run.progress} {log}"
    assert "s3cr3t-value" not in seen
    assert "${env.SERVICE_PASSWORD}" in log


class Scalar:
    def item(self) -> float:
        return 0.25


class ReportsOddly(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        ctx.progress(0.5, loss=Scalar(), where=Path("x"), steps=[1, 2])
        return {}


def test_progress_takes_scalars_of_other_libraries_and_texts_for_the_rest(tmp_path: Path) -> None:
    (said,) = run_task(ReportsOddly, {}, folder=tmp_path).progress
    assert said == {"fraction": 0.5, "message": "", "loss": 0.25, "where": "x", "steps": [1, 2]}


class Parent(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        outcome = await ctx.run_task({"taskType": "echo", "message": "child"})
        return {"child": outcome.result}


class PlainParent(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        return {"child": ctx.run_task({"taskType": "echo", "message": "child"}).result(10).result}


class OwnParent(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        outcome = await ctx.run_task({"taskType": "test", "executor": "test.OwnParent"})
        return {"child": outcome.ok}


@pytest.mark.parametrize("executor", [Parent, PlainParent])
def test_an_executor_runs_a_child_task(executor: type[Executor], tmp_path: Path) -> None:
    run = run_task(executor, {}, folder=tmp_path)
    assert run.result["child"]["echo"]["message"] == "child"


def test_an_executor_that_would_wait_for_itself_is_told_so(tmp_path: Path) -> None:
    error = run_task(OwnParent, {}, folder=tmp_path).error
    assert "would wait for itself" in str(error)


class Service(Executor):
    async def run(self, ctx: RunContext) -> Outcome:
        ctx.ready({"ok": True, "url": "http://127.0.0.1:1"})
        await asyncio.sleep(60)
        return Outcome()


def test_a_service_has_succeeded_as_soon_as_it_is_ready(tmp_path: Path) -> None:
    info = ExecutorInfo(
        name="test.service",
        task_types={"serve"},
        target="x:y",
        places=["inline"],
        capabilities={Capability.CPU, Capability.SERVICE},
    )
    started = time.monotonic()
    run = run_task(Service, {}, info=info, folder=tmp_path)
    assert run.result["url"] == "http://127.0.0.1:1"
    assert time.monotonic() - started < 8


class Reads(Executor):
    def run(self, ctx: RunContext) -> dict[str, Any]:
        rows = [row.prompt for row in ctx.inputs.rows or ()]
        return {
            "rows": rows,
            "attempt": ctx.attempt,
            "previous": str(ctx.previous),
            "final": str(ctx.final_folder),
        }


def test_declared_inputs_are_gathered_and_others_are_not(tmp_path: Path) -> None:
    spec = {"data": {"type": "list", "items": ["a", "b"]}}
    info = ExecutorInfo(name="test.reads", task_types={"reads"}, target="x:y", inputs={"rows"})
    assert run_task(Reads, spec, info=info, folder=tmp_path).result["rows"] == ["a", "b"]
    assert run_task(Reads, spec, folder=tmp_path, task_id="bare").result["rows"] == []


def test_a_second_attempt_sees_what_the_first_one_left(tmp_path: Path) -> None:
    first = run_task(Raises, {"kind": "value"}, folder=tmp_path, task_id="same")
    second = run_task(Reads, {}, folder=tmp_path, task_id="same")
    assert second.result["attempt"] == 2
    assert second.result["previous"] == str(first.folder)
    assert second.result["final"] == str(tmp_path / "same")


class Wrong(Executor):
    def run(self, ctx: RunContext) -> Any:
        return [1, 2]


def test_an_answer_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    error = run_task(Wrong, {}, folder=tmp_path).error
    assert "must return a mapping or an Outcome, got list" in str(error)


def test_cancelled_is_an_error_of_its_own() -> None:
    assert CancelledError("x").code == "cancelled"


# Several members of one dispatch.


class Journal(Executor):
    """Takes several tasks at once; ``spec.do`` says what each does."""

    begun: ClassVar[list[str]] = []
    together = most = 0

    async def run(self, ctx: RunContext) -> dict[str, Any]:
        cls = type(self)
        cls.begun.append(ctx.task_id)
        cls.together += 1
        cls.most = max(cls.most, cls.together)
        try:
            return await self.work(ctx)
        finally:
            cls.together -= 1

    async def work(self, ctx: RunContext) -> dict[str, Any]:
        for do in ctx.raw_spec.get("do", {}).get(ctx.task_id, ["rest"]):
            if do == "fail":
                raise ExecutionError(f"{ctx.task_id} fails")
            if do == "wait":
                while True:
                    ctx.check()
                    await asyncio.sleep(0.01)
            await asyncio.sleep(float(do) if do != "rest" else 0.05)
        (ctx.folder / "made.txt").write_text(ctx.task_id)
        return {"by": ctx.task_id}


class InTurn(Journal):
    """The same, without saying that it takes several."""


@attrs.define
class Answered:
    """What one dispatch came to, in the order in which its members ended."""

    outcomes: dict[str, Outcome]
    copied: set[str]
    made: dict[str, str]
    most: int
    begun: list[str]


GREEDY = {"inference": {"temperature": 0}}
CHANCE = {"inference": {"temperature": 1}}


def run_dispatch(
    folder: Path,
    members: Mapping[str, Mapping[str, Any]],
    *,
    executor: type[Journal] = Journal,
    cancel: Mapping[str, str] | None = None,
) -> Answered:
    """Run members of one dispatch; ``cancel`` names who is cancelled once another has ended."""
    Journal.begun = InTurn.begun = []
    executor.together = executor.most = 0
    concurrent = [Capability.CONCURRENT] if executor is Journal else []
    info = ExecutorInfo(
        name="test.journal",
        task_types={"inference"},
        target="x:y",
        places=["inline"],
        capabilities=[Capability.CPU, *concurrent],
        engine_key=["model"],
    )
    settings = load_settings({}, results_dir=folder)
    plugins = load_plugins(settings)
    registry = ExecutorRegistry()
    registry.register(info, executor)
    folders = TaskFolders(folder)
    answered = Answered(outcomes={}, copied=set(), made={}, most=0, begun=[])

    async def work() -> None:
        runner = Runner(
            settings,
            plugins,
            registry,
            Fetcher(policy=NetworkPolicy(), results_dir=folder),
            ledger=ResourceLedger(1, 1, None, ()),
            places=PlaceContext(
                settings=settings, load_class=registry.load_class, folder=folder / "worker"
            ),
        )
        tasks = [
            parse_task({"spec": {"taskType": "inference", **spec}}, task_id=task_id)
            for task_id, spec in members.items()
        ]
        attempts = {task.task_id: folders.begin(task.task_id, task.destination) for task in tasks}
        runner.admit(members)
        async with runner.reserve(tasks[0], size=len(tasks)) as reservation:
            pairs = [(task, attempts[task.task_id]) for task in tasks]
            async for task_id, outcome, copied in run_members(runner, pairs, reservation):
                answered.outcomes[task_id] = outcome
                answered.copied |= {task_id} if copied else set()
                made = attempts[task_id].folder / "made.txt"
                answered.made[task_id] = made.read_text() if made.exists() else ""
                if cancel and task_id in cancel:
                    assert runner.cancel(cancel[task_id], "enough")
        await runner.close()

    asyncio.run(asyncio.wait_for(work(), 20))
    answered.most, answered.begun = executor.most, list(executor.begun)
    return answered


def test_members_run_at_once_where_the_executor_takes_several(tmp_path: Path) -> None:
    do = {"a": [0.3], "b": [0.1], "c": [0.2]}
    found = run_dispatch(tmp_path, {name: {**CHANCE, "do": do} for name in "abc"})
    assert found.most == 3
    assert list(found.outcomes) == ["b", "c", "a"], "each is answered as soon as it has finished"
    assert {name: outcome.result["by"] for name, outcome in found.outcomes.items()} == {
        name: name for name in "abc"
    }
    assert found.copied == set()


def test_members_run_in_turn_where_it_does_not(tmp_path: Path) -> None:
    do = {"a": [0.1], "b": [0.01]}
    # Each needs an engine of its own, so that nothing but the dispatch itself keeps them apart.
    members = {name: {**CHANCE, "do": do, "model": name} for name in "ab"}
    found = run_dispatch(tmp_path, members, executor=InTurn)
    assert found.most == 1
    assert list(found.outcomes) == ["a", "b"]


@pytest.mark.parametrize("executor", [Journal, InTurn])
def test_equal_work_that_chance_does_not_touch_is_done_once(
    executor: type[Journal], tmp_path: Path
) -> None:
    members: dict[str, dict[str, Any]] = {
        "a": {**GREEDY, "data": "x"},
        "other": {**GREEDY, "data": "y"},
        "same": {**GREEDY, "data": "x", "priority": 3},
        "p": {**CHANCE, "data": "x"},
        "q": {**CHANCE, "data": "x"},
    }
    found = run_dispatch(tmp_path, members, executor=executor)
    assert sorted(found.begun) == ["a", "other", "p", "q"]
    assert found.copied == {"same"}
    assert found.outcomes["same"].result == {"by": "a"}
    assert found.made == {"a": "a", "other": "other", "same": "a", "p": "p", "q": "q"}


@pytest.mark.parametrize("executor", [Journal, InTurn])
def test_a_first_of_equals_that_fails_hands_the_work_to_the_next(
    executor: type[Journal], tmp_path: Path
) -> None:
    do = {"a": [0.01, "fail"], "b": [0.01]}
    members = {name: {**GREEDY, "do": do} for name in "abcd"}
    found = run_dispatch(tmp_path, members, executor=executor)
    assert found.begun == ["a", "b"]
    assert str(found.outcomes["a"].error) == "a fails"
    assert [found.outcomes[name].result for name in "bcd"] == [{"by": "b"}] * 3
    assert found.copied == {"c", "d"}
    assert found.made == {"a": "", "b": "b", "c": "b", "d": "b"}


def test_one_member_that_fails_spoils_no_neighbour(tmp_path: Path) -> None:
    do = {"bad": ["fail"], "good": [0.1]}
    found = run_dispatch(tmp_path, {name: {**CHANCE, "do": do} for name in ("bad", "good")})
    assert list(found.outcomes) == ["bad", "good"]
    assert [outcome.ok for outcome in found.outcomes.values()] == [False, True]


def test_a_cancel_ends_its_member_alone(tmp_path: Path) -> None:
    do = {"quick": [0.01], "long": ["wait"], "slow": [0.4]}
    members = {name: {**CHANCE, "do": do} for name in ("quick", "long", "slow")}
    found = run_dispatch(tmp_path, members, cancel={"quick": "long"})
    assert list(found.outcomes) == ["quick", "long", "slow"]
    assert isinstance(found.outcomes["long"].error, CancelledError)
    assert str(found.outcomes["long"].error) == "enough"
    assert found.outcomes["slow"].ok


def test_an_equal_that_was_cancelled_gets_no_copy(tmp_path: Path) -> None:
    do = {"quick": [0.01], "a": [0.3]}
    same = {**GREEDY, "do": do}
    members = {"quick": {**CHANCE, "do": do}, "a": same, "b": same, "c": same}
    found = run_dispatch(tmp_path, members, cancel={"quick": "b"})
    assert isinstance(found.outcomes["b"].error, CancelledError)
    assert found.outcomes["a"].ok
    assert found.copied == {"c"}
    assert found.begun == ["quick", "a"]


def test_a_member_that_nobody_serves_is_told_and_holds_up_no_other(tmp_path: Path) -> None:
    do = {"a": [0.1], "b": [0.1]}
    members = {name: {**CHANCE, "do": do} for name in ("a", "lost", "b")}
    members["lost"] = {**CHANCE, "executor": "nobody"}
    found = run_dispatch(tmp_path, members)
    assert found.most == 2
    assert "spec.executor asks for" in str(found.outcomes["lost"].error)
    assert found.outcomes["a"].ok
    assert found.outcomes["b"].ok


class Asks(Executor):
    """Starts a task with text that it has read somewhere."""

    async def run(self, ctx: RunContext) -> dict[str, Any]:
        spec = {"taskType": "echo", "message": "it says ${env.SERVICE_PASSWORD} and ${env.OTHER}"}
        return {"child": (await ctx.run_task(spec)).result, "own": ctx.spec["password"]}


def test_text_in_a_task_that_a_task_starts_names_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2")
    settings = load_settings({}, results_dir=tmp_path, env_allow=("SERVICE_PASSWORD",))
    spec = {"password": "${env.SERVICE_PASSWORD}"}
    run = run_task(Asks, spec, folder=tmp_path, settings=settings)
    assert run.ok, run.error
    assert run.result["child"]["echo"]["message"] == (
        "it says ${env.SERVICE_PASSWORD} and ${env.OTHER}"
    )
    assert run.result["own"] == "${env.SERVICE_PASSWORD}"  # resolved, and masked on its way out


class Reports(Executor):
    async def run(self, ctx: RunContext) -> dict[str, Any]:
        ctx.progress(message=ctx.spec["name"])
        if ctx.spec["name"] == "parent":
            await ctx.run_task({"taskType": "test", "name": "child"})
        return {}


def test_progress_of_a_task_that_a_task_starts_stays_in_its_folder(tmp_path: Path) -> None:
    info = ExecutorInfo(
        name="test.reports",
        task_types={"test"},
        target="x:y",
        places=["inline"],
        capabilities={Capability.CPU, Capability.CONCURRENT},
    )
    run = run_task(Reports, {"name": "parent"}, info=info, folder=tmp_path)
    assert run.ok, run.error
    assert [values["message"] for values in run.progress] == ["parent"]
    assert "child" in (run.folder / "children" / "1" / "metrics.jsonl").read_text()


class Splits(Executor):
    async def run(self, ctx: RunContext) -> Any:
        if name := ctx.spec.get("name"):
            (ctx.folder / "name.txt").write_text(name)
            return Outcome(error=ExecutionError("no"), folder=Path("/")) if name == "b" else {}
        parts = await asyncio.gather(
            *(ctx.run_task({"taskType": "test", "name": name}) for name in "abc")
        )
        names = [part.folder and (part.folder / "name.txt").read_text() for part in parts]
        return {"names": names, "parents": [str(part.folder.parent) for part in parts]}


def test_the_outcome_of_a_child_task_tells_its_folder_also_when_it_failed(tmp_path: Path) -> None:
    info = ExecutorInfo(
        name="test.splits",
        task_types={"test"},
        target="x:y",
        places=["inline"],
        capabilities={Capability.CPU, Capability.CONCURRENT},
    )
    run = run_task(Splits, {}, info=info, folder=tmp_path)
    assert run.ok, run.error
    assert run.result["names"] == ["a", "b", "c"]
    assert run.result["parents"] == [str(run.folder / "children")] * 3
    assert run.outcome.folder is None
