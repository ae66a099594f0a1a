from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.config import load_settings
from flowmesh_core.errors import ExecutionError, InputError
from flowmesh_core.executor import Artifact, Executor, ExecutorInfo, Outcome, RunContext
from flowmesh_core.merge import engine_key
from flowmesh_core.places.base import Job, PlaceContext
from flowmesh_core.places.inline import InlinePlace

T = TypeVar("T")
WAIT_S = 20


class Recorded(Executor):
    """Notes what the place does with it; one list for all instances of a test."""

    events: ClassVar[list[str]] = []
    threads: ClassVar[list[threading.Thread]] = []
    key: Any = None

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.note("new")

    def note(self, what: str) -> None:
        self.events.append(what)
        self.threads.append(threading.current_thread())

    def load(self, ctx: RunContext) -> None:
        self.key = ctx.raw_spec.get("model")
        self.note(f"load {self.key}")

    def unload(self) -> None:
        self.note(f"unload {self.key}")

    def run(self, ctx: RunContext) -> Any:
        self.note(f"run {self.key}")
        return {"key": self.key, "wanted": ctx.raw_spec.get("model"), "engine": id(self)}


class RecordedCoroutine(Recorded):
    async def run(self, ctx: RunContext) -> Any:
        await asyncio.sleep(0)
        return super().run(ctx)


@pytest.fixture(autouse=True)
def fresh_lists() -> Iterator[None]:
    for noted in (Recorded.events, Recorded.threads):
        noted.clear()
    yield
    for noted in (Recorded.events, Recorded.threads):
        noted.clear()


def info(name: str = "x", *, concurrent: bool = False) -> ExecutorInfo:
    return ExecutorInfo(
        name=name,
        task_types={"x"},
        target="m:C",
        engine_key=["model"],
        capabilities=["cpu", "concurrent"] if concurrent else ["cpu"],
    )


def task(model: Any = "a", *, settings: Any = None, **spec: Any) -> RunContext:
    return RunContext(
        task_id="t1",
        task_type="x",
        spec={},
        raw_spec={"model": model, **spec},
        folder=Path("unused"),
        settings=settings,
        clock=time.monotonic,
    )


def context(cls: type[Executor]) -> PlaceContext:
    return PlaceContext(
        settings=load_settings({}), load_class=lambda _info: cls, folder=Path("unused")
    )


async def serve(place: InlinePlace, described: ExecutorInfo, ctx: RunContext) -> Outcome:
    log: Any = None  # what an inline executor prints goes where the worker's output goes
    return await place.run(Job(info=described, spec=ctx.raw_spec, ctx=ctx, log=log))


def drive(
    work: Callable[[InlinePlace], Coroutine[Any, Any, T]], cls: type[Executor] = Recorded
) -> T:
    """Run with a place that is closed afterwards."""

    async def main() -> T:
        place = InlinePlace(context(cls))
        try:
            return await asyncio.wait_for(work(place), WAIT_S)
        finally:
            await place.close()
            await place.close()

    return asyncio.run(main())


def run_one(cls: type[Executor], ctx: RunContext | None = None) -> Outcome:
    return drive(lambda place: serve(place, info(), ctx or task()), cls)


def made(body: Callable[[RunContext], Any], *, coroutine: bool) -> type[Executor]:
    """Build an executor class around a plain function, as a plain method or as a coroutine."""

    class Plain(Recorded):
        def run(self, ctx: RunContext) -> Any:
            return body(ctx)

    class Coroutine_(Recorded):  # noqa: N801 - the other name is taken
        async def run(self, ctx: RunContext) -> Any:
            return body(ctx)

    return Coroutine_ if coroutine else Plain


# Answers.


@pytest.mark.parametrize("coroutine", [False, True])
def test_a_mapping_or_an_outcome_is_an_answer(coroutine: bool) -> None:
    given_outcome = Outcome(result={"a": 1}, artifacts=[Artifact("f")])
    assert run_one(made(lambda _: {"a": 1}, coroutine=coroutine)) == Outcome(result={"a": 1})
    assert run_one(made(lambda _: given_outcome, coroutine=coroutine)) is given_outcome


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("answer", [None, "text", [1], 5])
def test_any_other_answer_is_an_error_that_names_class_and_type(
    answer: Any, coroutine: bool
) -> None:
    cls = made(lambda _: answer, coroutine=coroutine)
    with pytest.raises(
        ExecutionError, match=f"{cls.__name__} must return .*Outcome, got {type(answer).__name__}"
    ):
        run_one(cls)


def test_a_plain_run_may_return_something_to_await() -> None:
    async def later() -> Mapping[str, Any]:
        return {"late": True}

    assert run_one(made(lambda _: later(), coroutine=False)).result == {"late": True}


@pytest.mark.parametrize("coroutine", [False, True])
def test_what_an_executor_raises_comes_out_as_it_is(coroutine: bool) -> None:
    def fail(_ctx: RunContext) -> None:
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        run_one(made(fail, coroutine=coroutine))
    assert Recorded.events == ["new", "load a", "unload a"]


def test_the_settings_reach_the_executor() -> None:
    class Keeps(Recorded):
        def run(self, ctx: RunContext) -> Any:
            return {"settings": self.settings}

    assert run_one(Keeps, task(settings="mine")).result == {"settings": "mine"}


# Nobody ends the process.


class ExitsInInit(Recorded):
    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        sys.exit(3)


class ExitsInLoad(Recorded):
    def load(self, ctx: RunContext) -> None:
        sys.exit(3)


@pytest.mark.parametrize(
    "cls",
    [
        made(lambda _: sys.exit(3), coroutine=False),
        made(lambda _: sys.exit(3), coroutine=True),
        ExitsInInit,
        ExitsInLoad,
    ],
)
def test_sys_exit_in_an_executor_is_a_failed_task_and_the_loop_goes_on(
    cls: type[Executor],
) -> None:
    async def two(place: InlinePlace) -> list[Any]:
        running = [asyncio.ensure_future(serve(place, info(), task())) for _ in range(2)]
        return await asyncio.gather(*running, return_exceptions=True)

    outcomes = drive(two, cls)
    assert [type(outcome) for outcome in outcomes] == [ExecutionError, ExecutionError]
    assert str(outcomes[0]) == "the executor tried to end the process: SystemExit(3)"


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3)])
def test_an_unload_that_raises_is_logged_and_spoils_nothing(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class BadUnload(Recorded):
        def unload(self) -> None:
            raise error

    async def switch(place: InlinePlace) -> Any:
        await serve(place, info(), task("a"))
        return (await serve(place, info(), task("b"))).result["key"]

    assert drive(switch, BadUnload) == "b"
    logged = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert logged == ["executor BadUnload: unload raised"] * 2


# Threads.


def test_a_plain_run_and_all_loading_leave_the_loops_thread() -> None:
    here = threading.current_thread()
    drive(lambda place: serve(place, info(), task()))
    assert Recorded.events == ["new", "load a", "run a", "unload a"]
    assert here not in Recorded.threads


def test_a_coroutine_runs_on_the_loop() -> None:
    drive(lambda place: serve(place, info(), task()), RecordedCoroutine)
    threads = dict(zip(Recorded.events, Recorded.threads, strict=True))
    assert threads["run a"] is threading.current_thread()
    assert threads["load a"] is not threading.current_thread()


def test_the_loop_lives_on_while_a_plain_run_blocks() -> None:
    released = threading.Event()

    async def both(place: InlinePlace) -> bool:
        running = asyncio.ensure_future(serve(place, info(), task()))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not running.done()
        released.set()
        return (await running).ok

    assert drive(both, made(lambda _: {"ok": released.wait(WAIT_S)}, coroutine=False))


# Engines.


@pytest.mark.parametrize("cls", [Recorded, RecordedCoroutine])
def test_tasks_of_one_key_share_a_warm_engine(cls: type[Executor]) -> None:
    async def work(place: InlinePlace) -> set[int]:
        one_by_one = [await serve(place, info(), task()) for _ in range(3)]
        together = await asyncio.gather(*(serve(place, info(), task(n=n)) for n in range(3)))
        return {outcome.result["engine"] for outcome in (*one_by_one, *together)}

    assert len(drive(work, cls)) == 1
    assert [event for event in Recorded.events if not event.startswith("run")] == [
        *("new", "load a", "unload a")
    ]


def test_another_key_unloads_the_engine_before_it_loads_its_own() -> None:
    async def switch(place: InlinePlace) -> None:
        for model in ("a", "b", "a"):
            await serve(place, info(), task(model))

    drive(switch)
    assert Recorded.events == [
        *("new", "load a", "run a", "unload a"),
        *("new", "load b", "run b", "unload b"),
        *("new", "load a", "run a", "unload a"),
    ]


def test_another_executor_keeps_its_engine() -> None:
    async def work(place: InlinePlace) -> None:
        await serve(place, info("x"), task("a"))
        await serve(place, info("y"), task("b"))
        await serve(place, info("x"), task("a"))

    drive(work)
    assert Recorded.events.count("load a") == 1


def test_an_engine_in_use_is_not_unloaded_for_another_key() -> None:
    started, released = threading.Event(), threading.Event()

    class Blocks(Recorded):
        def run(self, ctx: RunContext) -> Any:
            if self.key == "a":
                started.set()
                released.wait(WAIT_S)
            return super().run(ctx)

    async def work(place: InlinePlace) -> list[Outcome]:
        first = asyncio.ensure_future(serve(place, info(), task("a")))
        await asyncio.to_thread(started.wait, WAIT_S)
        other = await serve(place, info(), task("b"))
        assert "unload a" not in Recorded.events
        released.set()
        return [await first, other]

    assert [outcome.result["key"] for outcome in drive(work, Blocks)] == ["a", "b"]


@settings(max_examples=40, deadline=None)
@given(
    models=st.lists(st.sampled_from(["a", "b", {"n": 1}, None]), min_size=1, max_size=12),
    concurrent=st.booleans(),
)
def test_no_task_ever_runs_on_another_keys_engine(models: list[Any], concurrent: bool) -> None:
    Recorded.events.clear()

    async def work(place: InlinePlace) -> list[Outcome]:
        described = info(concurrent=concurrent)
        return await asyncio.gather(*(serve(place, described, task(model)) for model in models))

    outcomes = drive(work, RecordedCoroutine)
    assert [outcome.result["key"] for outcome in outcomes] == models
    loads = sum(event.startswith("load") for event in Recorded.events)
    assert loads == sum(event.startswith("unload") for event in Recorded.events)


# Loading fails.


class FailsOnce(Recorded):
    failures: ClassVar[list[bool]] = []

    def load(self, ctx: RunContext) -> None:
        super().load(ctx)
        if self.failures:
            self.failures.pop()
            raise InputError("no memory")


def test_a_failed_load_is_unloaded_and_the_next_task_starts_afresh() -> None:
    FailsOnce.failures[:] = [True]

    async def work(place: InlinePlace) -> Outcome:
        with pytest.raises(InputError, match="no memory"):
            await serve(place, info(), task())
        return await serve(place, info(), task())

    assert drive(work, FailsOnce).ok
    assert Recorded.events == [
        *("new", "load a", "unload a"),
        *("new", "load a", "run a", "unload a"),
    ]


@pytest.mark.parametrize("concurrent", [False, True])
def test_those_who_waited_for_a_failed_load_load_once_and_leave_nothing_behind(
    concurrent: bool,
) -> None:
    FailsOnce.failures[:] = [True]

    async def work(place: InlinePlace) -> list[Any]:
        described = info(concurrent=concurrent)
        running = (serve(place, described, task()) for _ in range(4))
        return await asyncio.gather(*running, return_exceptions=True)

    outcomes = drive(work, FailsOnce)
    assert isinstance(outcomes[0], InputError)
    assert len({outcome.result["engine"] for outcome in outcomes[1:]}) == 1
    assert Recorded.events.count("load a") == 2
    assert Recorded.events.count("unload a") == 2


# Turns.


class Crowd(Executor):
    """Counts how many tasks it has in hand at once."""

    now: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def enter(self) -> None:
        Crowd.now += 1
        Crowd.most = max(Crowd.most, Crowd.now)

    async def run(self, ctx: RunContext) -> Any:
        self.enter()
        await asyncio.sleep(0.01)
        Crowd.now -= 1
        return {}


class PlainCrowd(Crowd):
    def run(self, ctx: RunContext) -> Any:
        self.enter()
        time.sleep(0.01)
        Crowd.now -= 1
        return {}


@pytest.mark.parametrize(
    ("cls", "concurrent", "most"),
    [(Crowd, False, 1), (PlainCrowd, False, 1), (Crowd, True, 5)],
)
@pytest.mark.parametrize("warm", [False, True])
def test_only_concurrent_executors_get_several_tasks_at_once(
    cls: type[Executor], concurrent: bool, most: int, warm: bool
) -> None:
    Crowd.now = Crowd.most = 0

    async def work(place: InlinePlace) -> list[Outcome]:
        described = info(concurrent=concurrent)
        if warm:
            await serve(place, described, task())
        return await asyncio.gather(*(serve(place, described, task()) for _ in range(5)))

    assert len(drive(work, cls)) == 5
    assert Crowd.most == most


# Cancelling.


class Gated(Recorded):
    """Blocks where the task asks for it, deaf to cancelling, until the gate opens."""

    gate: ClassVar[threading.Event]
    inside: ClassVar[threading.Event]

    def load(self, ctx: RunContext) -> None:
        super().load(ctx)
        self.wait(ctx, "load")

    def run(self, ctx: RunContext) -> Any:
        self.wait(ctx, "run")
        return super().run(ctx)

    def wait(self, ctx: RunContext, where: str) -> None:
        if ctx.raw_spec.get("block") == where:
            self.inside.set()
            assert self.gate.wait(WAIT_S)
            self.note(f"{where} ends")


@pytest.mark.parametrize("where", ["load", "run"])
def test_a_thread_that_cannot_be_stopped_keeps_its_engine_and_the_next_task_gets_another(
    where: str,
) -> None:
    Gated.gate, Gated.inside = threading.Event(), threading.Event()

    async def work(place: InlinePlace) -> None:
        deaf = asyncio.ensure_future(serve(place, info(), task(block=where)))
        await asyncio.to_thread(Gated.inside.wait, WAIT_S)
        deaf.cancel()
        await asyncio.wait({deaf})
        assert deaf.cancelled()
        assert (await serve(place, info(), task())).ok, "the next task waits for the deaf one"
        assert "unload a" not in Recorded.events, "unloaded under a running thread"
        Gated.gate.set()
        while "unload a" not in Recorded.events:
            await asyncio.sleep(0.005)

    drive(work, Gated)
    ends = Recorded.events.index(f"{where} ends")
    assert Recorded.events.index("unload a") > ends
    assert Recorded.events.count("new") == Recorded.events.count("unload a") == 2


def test_a_cancelled_coroutine_leaves_the_engine_warm() -> None:
    class Sleeps(Recorded):
        async def run(self, ctx: RunContext) -> Any:
            try:
                await asyncio.sleep(0 if ctx.raw_spec.get("short") else WAIT_S)
            except asyncio.CancelledError:
                self.note("told")
                raise
            return {}

    async def work(place: InlinePlace) -> None:
        long = asyncio.ensure_future(serve(place, info(), task()))
        while "load a" not in Recorded.events:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        long.cancel()
        await asyncio.wait({long})
        assert long.cancelled()
        await serve(place, info(), task(short=True))

    drive(work, Sleeps)
    assert Recorded.events == ["new", "load a", "told", "unload a"]


def test_a_task_cancelled_while_it_waits_its_turn_disturbs_nobody() -> None:
    Gated.gate, Gated.inside = threading.Event(), threading.Event()

    async def work(place: InlinePlace) -> Outcome:
        first = asyncio.ensure_future(serve(place, info(), task(block="run")))
        await asyncio.to_thread(Gated.inside.wait, WAIT_S)
        second = asyncio.ensure_future(serve(place, info(), task()))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait({second})
        Gated.gate.set()
        return await first

    assert drive(work, Gated).ok
    assert Recorded.events.count("load a") == 1


# Keys.


def key(spec: Mapping[str, Any], *paths: str) -> str:
    return engine_key(
        ExecutorInfo(name="x", task_types={"x"}, target="m:C", engine_key=paths), spec
    )


def test_engine_keys_tell_values_apart_and_ignore_the_order_of_keys() -> None:
    assert key({"model": {"a": [1, {"x": 1, "y": 2}], "b": 2}}, "model") == key(
        {"model": {"b": 2, "a": [1, {"y": 2, "x": 1}]}}, "model"
    )
    different = [1, "1", None, True, [], {}, [2, 1], [1, 2]]
    assert len({key({"m": value}, "m") for value in different}) == len(different)


def test_engine_keys_read_paths_and_nothing_else() -> None:
    spec = {"model": {"source": {"identifier": "a"}}, "inference": {"seed": 1}}
    other = {**spec, "inference": {"seed": 2}}
    assert key(spec, "model.source.identifier") == key(other, "model.source.identifier")
    assert key(spec, "inference.seed") != key(other, "inference.seed")
    assert key(spec, "model.source.absent") == key({"model": "text"}, "model.source.absent")
    assert key(spec) == key({})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(left=JSON, right=JSON)
def test_equal_keys_mean_equal_values(left: Any, right: Any) -> None:
    same = key({"m": left}, "m") == key({"m": right}, "m")
    assert same == (repr_sorted(left) == repr_sorted(right))


def repr_sorted(value: Any) -> str:
    """Write a value so that 1 and true differ and the order of keys does not."""
    if isinstance(value, dict):
        return "{}" + repr(sorted((name, repr_sorted(item)) for name, item in value.items()))
    return repr([repr_sorted(item) for item in value]) if isinstance(value, list) else repr(value)
