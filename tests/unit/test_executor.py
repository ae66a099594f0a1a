"""Declarations, outcomes and the context that an executor gets."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import pytest

from flowmesh_core.errors import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    InputError,
    PluginError,
    PluginLoadError,
)
from flowmesh_core.executor import (
    API_VERSION,
    Artifact,
    Capability,
    ChildTask,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    RunResult,
    as_executor_class,
)

FULL = ExecutorInfo(
    name="acme.tts",
    task_types={"tts", "speech"},
    target="acme_tts.executor:TTS",
    needs=["torch", "acme"],
    install="pip install 'acme-tts[engine]'",
    capabilities=[Capability.GPU, "concurrent"],
    places=["process"],
    api_version="1.0",
    spec="acme_tts.spec:Spec",
    settings="acme_tts.spec:Settings",
    inputs={"rows", "model"},
    engine_key=["model.source", "acme"],
    group_key=["model.source"],
    model_formats={"hf"},
    default_model="ACME_MODEL",
    variables=["ACME_HOME"],
    priority=5,
)


def declare(**fields: Any) -> ExecutorInfo:
    return ExecutorInfo(**{"name": "x", "task_types": ["x"], "target": "a.b:C", **fields})


# Declarations.


def test_declaration_survives_the_way_through_json() -> None:
    assert ExecutorInfo.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
    assert ExecutorInfo.from_dict(json.loads(json.dumps(declare().to_dict()))) == declare()


def test_declaration_as_data_has_every_field_with_sets_sorted() -> None:
    data = FULL.to_dict()
    assert set(data) == {field.name for field in attrs.fields(ExecutorInfo)}
    assert data["task_types"] == ["speech", "tts"]
    assert data["capabilities"] == ["concurrent", "gpu"]
    assert data["inputs"] == ["model", "rows"]
    assert data["needs"] == ["torch", "acme"], "an order that means something stays"
    assert data["engine_key"] == ["model.source", "acme"]
    assert data["priority"] == 5


def test_fields_of_a_later_version_are_ignored() -> None:
    assert ExecutorInfo.from_dict({**FULL.to_dict(), "colour": "red"}) == FULL


def test_defaults_are_those_of_a_light_executor() -> None:
    info = declare()
    assert info.capabilities == {Capability.CPU}
    assert info.places == ("process", "inline")
    assert info.api_version == API_VERSION
    assert (info.needs, info.engine_key, info.group_key, info.variables) == ((), (), (), ())
    assert (info.inputs, info.model_formats, info.priority) == (frozenset(), frozenset(), 0)


def test_one_name_without_brackets_is_not_taken_apart() -> None:
    info = declare(task_types="echo", needs="vllm", capabilities="gpu", inputs="rows")
    assert info.task_types == {"echo"}
    assert info.needs == ("vllm",)
    assert info.capabilities == {Capability.GPU}
    assert info.inputs == {"rows"}


@pytest.mark.parametrize(
    ("capabilities", "needs_gpu"),
    [(["cpu"], False), (["gpu"], True), (["cpu", "gpu"], False), ([], False)],
)
def test_gpu_without_cpu_needs_a_gpu(capabilities: list[str], needs_gpu: bool) -> None:
    assert declare(capabilities=capabilities).needs_gpu is needs_gpu


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": ""}, "executor '': name and task_types must not be empty"),
        ({"task_types": []}, "executor 'x': name and task_types must not be empty"),
        ({"target": ""}, "target must be 'package.module:Name', got ''"),
        ({"target": "a.b.C"}, r"target must be 'package.module:Name', got 'a\.b\.C'"),
        ({"target": "a:b:C"}, "target must be 'package.module:Name', got 'a:b:C'"),
        ({"target": "a.b:"}, r"target must be 'package.module:Name', got 'a\.b:'"),
        ({"target": ":C"}, "target must be 'package.module:Name', got ':C'"),
        ({"target": "a:b c"}, "target must be 'package.module:Name', got 'a:b c'"),
        ({"spec": "a.b", "settings": "c", "name": ""},
         "executor '': name .*; spec must be .* got 'a.b'; settings must be .* got 'c'$"),
        ({"capabilities": ["fast"]},
         "'fast' is not a valid Capability; known are batch_invariant, concurrent, cpu, gpu"),
    ],
)  # fmt: skip
def test_declaration_that_cannot_work_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        declare(**fields)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target": None}, "executor 'acme.tts' cannot be read: expected string"),
        ({"needs": 3}, "executor 'acme.tts' cannot be read: 'int' object is not iterable"),
        ({"capabilities": ["fast"]}, "'fast' is not a valid Capability"),
    ],
)
def test_data_that_is_no_declaration_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PluginError, match=problem):
        ExecutorInfo.from_dict({**FULL.to_dict(), **change})


def test_missing_field_of_a_declaration_is_named() -> None:
    with pytest.raises(PluginError, match=r"executor 'x' cannot be read: .*'target'"):
        ExecutorInfo.from_dict({"name": "x", "task_types": ["x"]})


# Outcomes and artifacts.


def test_outcome_with_an_error_is_not_ok() -> None:
    assert Outcome().ok
    assert Outcome(result={"ok": False}).ok, "the result's own fields are the executor's affair"
    assert not Outcome(error=ExecutionError("no")).ok
    assert Outcome(artifacts=[Artifact("a")]).artifacts == (Artifact("a"),)


@pytest.mark.parametrize("path", ["a", "a/b.txt", "./a", "..a/b"])
def test_artifact_lies_in_the_tasks_folder(path: str) -> None:
    assert Artifact(path, result_key="k").path == path


@pytest.mark.parametrize("path", ["", ".", "/etc/passwd", "../a", "a/../../b"])
def test_artifact_outside_the_tasks_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="artifact path must lie in the task's folder, got "):
        Artifact(path)


# The context.


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def context(clock: Callable[[], float] | None = None, **fields: Any) -> RunContext:
    base = {"task_id": "a", "task_type": "x", "spec": {}, "raw_spec": {}, "folder": Path("out")}
    return RunContext(**{**base, "clock": clock or Clock(), **fields})


def test_context_without_deadline_has_no_end() -> None:
    ctx = context()
    assert ctx.remaining_s is None
    assert ctx.cancelled is False
    ctx.check()
    assert (ctx.attempt, ctx.previous, ctx.devices, ctx.settings) == (1, None, (), None)


def test_remaining_time_falls_with_the_clock_and_stops_at_zero() -> None:
    clock = Clock(100.0)
    ctx = context(clock, deadline=103.0)
    assert ctx.remaining_s == 3.0
    ctx.check()
    clock.now = 102.5
    assert ctx.remaining_s == 0.5
    clock.now = 200.0
    assert ctx.remaining_s == 0.0


@pytest.mark.parametrize("now", [103.0, 103.1, 1e9])
def test_check_raises_once_the_deadline_is_reached(now: float) -> None:
    with pytest.raises(DeadlineError, match=r"^task a reached its deadline$"):
        context(Clock(now), deadline=103.0).check()


def test_check_raises_when_cancelled_even_past_the_deadline() -> None:
    stopped = threading.Event()
    ctx = context(is_cancelled=stopped.is_set, deadline=0.0)
    stopped.set()
    assert ctx.cancelled is True
    with pytest.raises(CancelledError, match=r"^task a was cancelled$"):
        ctx.check()


def test_progress_log_and_ready_reach_the_core_as_given() -> None:
    seen: list[Any] = []
    ctx = context(
        on_progress=seen.append,
        on_log=lambda level, text: seen.append((level, text)),
        on_ready=lambda result, ttl_s: seen.append((result, ttl_s)),
    )
    ctx.progress(0.5, "half", loss=1.5, step=3)
    ctx.progress(message="no idea")
    ctx.log("hello")
    ctx.log("careful", level="warning")
    ctx.ready({"url": "http://x"})
    ctx.ready({"url": "http://x"}, ttl_s=60)
    assert seen == [
        {"fraction": 0.5, "message": "half", "loss": 1.5, "step": 3},
        {"fraction": None, "message": "no idea"},
        ("info", "hello"),
        ("warning", "careful"),
        ({"url": "http://x"}, None),
        ({"url": "http://x"}, 60),
    ]


@pytest.mark.parametrize(
    ("fields", "fraction"),
    [
        ({"step": 1, "total": 4}, 0.25),
        ({"step": 5, "total": 4}, 1.0),
        ({"step": 1, "total": 0}, None),
        ({"step": 1}, None),
        ({"fraction": 0.9, "step": 1, "total": 4}, 0.9),
    ],
)
def test_step_and_total_give_the_fraction(fields: dict[str, Any], fraction: float | None) -> None:
    seen: list[Mapping[str, Any]] = []
    context(on_progress=seen.append).progress(**fields)
    assert seen == [{"message": "", **fields, "fraction": fraction}]


def test_context_that_nobody_listens_to_is_silent() -> None:
    ctx = context()
    ctx.progress(1.0)
    ctx.log("x")
    ctx.ready({})
    with pytest.raises(PluginError, match="this place cannot run child tasks"):
        ctx.run_task({"taskType": "echo"})


# Child tasks.


def answer_later(
    delay_s: float, outcome: Outcome
) -> Callable[[Mapping[str, Any]], Future[Outcome]]:
    """Return a starter whose tasks end on a thread of their own."""

    def start(spec: Mapping[str, Any]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        done = attrs.evolve(outcome, result={**outcome.result, "spec": dict(spec)})
        timer = threading.Timer(delay_s, future.set_result, [done])
        timer.daemon = True
        timer.start()
        return future

    return start


def test_coroutine_awaits_a_child_while_the_loop_goes_on() -> None:
    ctx = context(start_child=answer_later(0.05, Outcome(result={"ok": True})))

    async def parent() -> tuple[Outcome, int]:
        child = ctx.run_task({"taskType": "echo"})
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        beside = asyncio.create_task(tick())
        outcome = await child
        beside.cancel()
        return outcome, ticks

    outcome, ticks = asyncio.run(parent())
    assert outcome == Outcome(result={"ok": True, "spec": {"taskType": "echo"}})
    assert ticks >= 3


def test_several_children_are_awaited_together() -> None:
    ctx = context(start_child=answer_later(0.02, Outcome()))

    async def parent() -> list[Outcome]:
        return list(await asyncio.gather(*(ctx.run_task({"n": n}) for n in range(3))))

    assert [outcome.result for outcome in asyncio.run(parent())] == [
        {"spec": {"n": n}} for n in range(3)
    ]


def test_child_of_a_plain_run_is_waited_for_on_its_thread() -> None:
    failed = Outcome(error=ExecutionError("no"))
    child = context(start_child=answer_later(0.02, failed)).run_task({})
    outcome = child.result(timeout_s=5)
    assert (outcome.ok, str(outcome.error)) == (False, "no")
    assert child.result() is outcome, "asking again costs nothing"


def test_child_that_takes_too_long_raises_and_can_be_asked_again() -> None:
    future: Future[Outcome] = Future()
    child = ChildTask(future)
    with pytest.raises(TimeoutError, match=r"child task has not ended within 0\.01 s"):
        child.result(0.01)
    future.set_result(Outcome(result={"late": True}))
    assert child.result(0).result == {"late": True}


def test_error_of_a_child_that_could_not_start_reaches_the_parent() -> None:
    future: Future[Outcome] = Future()
    future.set_exception(ExecutionError("no slot"))
    with pytest.raises(ExecutionError, match="no slot"):
        ChildTask(future).result()

    async def parent() -> Outcome:
        return await ChildTask(future)

    with pytest.raises(ExecutionError, match="no slot"):
        asyncio.run(parent())


# The base class.


class Upper(Executor):
    def run(self, ctx: RunContext) -> RunResult:
        return {"text": str(ctx.spec["text"]).upper(), "by": self.settings}


def test_executor_needs_run_and_nothing_else() -> None:
    executor = Upper(settings="s")
    ctx = context(spec={"text": "a"})
    executor.load(ctx)
    assert executor.run(ctx) == {"text": "A", "by": "s"}
    executor.unload()
    executor.unload()
    assert Upper().settings is None


class Choir(Executor):
    """Answers with what the spec of a task lists, under ``task_id`` when that is set."""

    task_id = ""
    ended = False

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, RunResult]]:
        for ctx in ctxs:
            for answer in ctx.spec:
                yield self.task_id or ctx.task_id, answer
        self.ended = True


def test_executor_that_only_groups_runs_one_task_as_a_group_of_one() -> None:
    choir = Choir()
    assert choir.run(context(spec=[{"sung": "la"}])) == {"sung": "la"}
    assert choir.ended, "what it does after its answer is done too"
    outcome = Outcome(result={"sung": "lo"}, artifacts=[Artifact("lo.wav")])
    assert choir.run(context(spec=[outcome])) is outcome


def test_what_a_group_of_one_answers_as_its_failure_is_raised() -> None:
    error = InputError("nothing to sing")
    with pytest.raises(InputError, match="nothing to sing") as caught:
        Choir().run(context(spec=[Outcome(error=error)]))
    assert caught.value is error


@pytest.mark.parametrize(
    ("task_id", "times", "got"), [("", 0, r"\[\]"), ("", 2, r"\['a', 'a'\]"), ("b", 1, r"\['b'\]")]
)
def test_a_group_of_one_has_one_answer(task_id: str, times: int, got: str) -> None:
    choir = Choir()
    choir.task_id = task_id
    with pytest.raises(ExecutionError, match=rf"must answer 'a' once, got answers {got}$"):
        choir.run(context(spec=[{}] * times))


def test_a_group_of_one_that_was_left_out_was_stopped() -> None:
    with pytest.raises(CancelledError, match="task a was cancelled"):
        Choir().run(context(spec=[], is_cancelled=lambda: True))
    with pytest.raises(DeadlineError, match="task a reached its deadline"):
        Choir().run(context(Clock(9.0), spec=[], deadline=8.0))


def test_executor_with_nothing_to_run_tasks_is_refused_by_name() -> None:
    class Idle(Executor):
        def load(self, ctx: RunContext) -> None:
            """Load nothing."""

    class Sings(Idle, Choir):
        pass

    with pytest.raises(PluginLoadError, match=r"^acme\.tts:Idle must define run, or run_group for"):
        as_executor_class(Idle, "acme.tts:Idle")
    for cls in (Upper, Choir, Sings):
        assert as_executor_class(cls, "acme.tts:X") is cls
    with pytest.raises(NotImplementedError, match="Upper defines no run_group"):
        Upper().run_group([context()])


# Across processes.


def test_an_outcome_is_the_same_on_the_other_side() -> None:
    outcome = Outcome(
        result={"a": [1, {"b": None}]},
        artifacts=[Artifact("x.bin"), Artifact("y", "exported")],
        folder=Path("/out/children/1"),
    )
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    failed = Outcome.from_dict(json.loads(json.dumps(Outcome(error=PluginError("no")).to_dict())))
    assert isinstance(failed.error, PluginError)
    assert str(failed.error) == "no"
