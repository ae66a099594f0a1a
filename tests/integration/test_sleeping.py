"""Warm engines that sleep: their processes hold real memory, which a double of NVML measures.

What a process holds beside that, some 50 MiB, stands for what a sleeping engine keeps on its GPU.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import psutil
import pynvml
import pytest

from flowmesh_core.config import Settings, load_settings
from flowmesh_core.errors import CancelledError, CrashError, ExecutionError
from flowmesh_core.executor import Outcome, RunContext
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Job, PlaceContext
from flowmesh_core.places.engine_process import EngineProcess
from flowmesh_core.places.process import ProcessPlace
from flowmesh_core.plugins import load_plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.task_log import TaskLog

SLEEPERS = Path(__file__).parents[1] / "executors" / "sleepers.py"
MIB = 1 << 20
TOTAL_MIB = 1000
LIMIT_S = 40
EVERY_KIND = ["sleepers", "sleepers.awaits", "sleepers.groups", "sleepers.together"]


def engines() -> list[psutil.Process]:
    """Return the processes in which executors run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("flowmesh_core.places.child" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def held_bytes(device: str) -> int:
    """Return what the executors that may use a GPU hold together."""
    held = 0
    for process in engines():
        try:
            if device in process.environ().get("CUDA_VISIBLE_DEVICES", "").split(","):
                held += process.memory_info().rss
        except psutil.Error:
            continue
    return held


class MeasuredNvml(ModuleType):
    """Two GPUs whose free memory follows the executors' processes."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetHandleByIndex = int
        self.nvmlDeviceGetName = lambda _: "Acme X100"
        self.nvmlDeviceGetUUID = "GPU-{}".format
        self.nvmlDeviceGetMemoryInfo = lambda index: SimpleNamespace(
            total=TOTAL_MIB * MIB, free=max(0, TOTAL_MIB * MIB - held_bytes(str(index)))
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def refuse(*_: object) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        return refuse


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowmesh_core.telemetry.probes._open_nvml", lambda _: MeasuredNvml())
    monkeypatch.setattr("flowmesh_core.places.process.available_memory_bytes", lambda: 1 << 50)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    assert not {p.pid for p in psutil.Process().children(recursive=True)} - before


def choose(root: Path, **settings: Any) -> Settings:
    return load_settings({}, results_dir=root, worker_id="local", **settings)


class Pool:
    """A place, and tasks for it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        chosen = choose(root, **settings)
        plugins = load_plugins(chosen, files=[SLEEPERS])
        registry = ExecutorRegistry(plugins.executors)
        self.infos = {info.name: info for info in registry.infos}
        context = PlaceContext(
            settings=chosen,
            load_class=registry.load_class,
            folder=root,
            plugin_files=plugins.files,
        )
        self.place = ProcessPlace(context)
        self.logged: list[str] = []
        self._logs: list[TaskLog] = []

    def job(
        self,
        task_id: str,
        model: str,
        *,
        executor: str = "sleepers",
        want_mib: int = 100,
        limit_mib: int | None = None,
        devices: tuple[str, ...] = ("0",),
        **spec: Any,
    ) -> Job:
        """Return a task that wants so much of each of its GPUs when its engine is loaded."""
        folder = self.root / task_id
        (folder / "logs").mkdir(parents=True)
        mask = SecretMask({})
        log = TaskLog(folder, mask=lambda: mask, publish=lambda *_: None, max_bytes=1 << 20)
        self._logs.append(log)
        whole = {"model": model, "journal": str(self.root / "journal"), **spec}
        ctx = RunContext(
            task_id=task_id,
            task_type=executor,
            spec=whole,
            raw_spec=whole,
            folder=folder,
            devices=devices,
            clock=time.monotonic,
            on_log=lambda _level, text: self.logged.append(text),
        )
        return Job(
            info=self.infos[executor],
            spec=whole,
            ctx=ctx,
            log=log,
            memory_bytes=limit_mib and limit_mib * MIB,
            gpu_memory_bytes=want_mib * MIB,
        )

    async def run(self, task_id: str, model: str, **fields: Any) -> Outcome:
        return await self.place.run(self.job(task_id, model, **fields))

    async def result(self, task_id: str, model: str, **fields: Any) -> dict[str, Any]:
        outcome = await self.run(task_id, model, **fields)
        assert outcome.ok, outcome.error
        return dict(outcome.result)

    def told(self, model: str) -> list[str]:
        """Return what the engines of a model have done, in order."""
        journal = self.root / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{model} ")]

    async def hears(self, model: str, what: str) -> None:
        while what not in self.told(model):
            await asyncio.sleep(0.01)

    def engine(self, model: str) -> EngineProcess:
        (engine,) = (
            engine
            for key, found in self.place._engines.items()
            for engine in found
            if f'"{model}"' in key.engine
        )
        return engine

    async def close(self) -> None:
        await self.place.close()
        for log in self._logs:
            log.close()


def live(root: Path, body: Callable[[Pool], Awaitable[None]], **settings: Any) -> Pool:
    """Let a place live through something, then close it."""

    async def work() -> Pool:
        pool = Pool(root, **settings)
        try:
            await asyncio.wait_for(body(pool), LIMIT_S)
        finally:
            await pool.close()
        return pool

    return asyncio.run(work())


# Falling asleep.


@pytest.mark.parametrize("executor", EVERY_KIND)
def test_an_idle_engine_sleeps_for_another_one_and_wakes_with_what_it_kept(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor)
        assert psutil.Process(first["pid"]).memory_info().rss > 300 * MIB
        await pool.result("b", "y", want_mib=800)
        assert psutil.Process(first["pid"]).memory_info().rss < 150 * MIB
        assert pool.told("x")[2:] == ["sleep", "asleep"]
        again = await pool.result("c", "x", executor=executor)
        assert again == {"pid": first["pid"], "answers": 2, "held_mib": 300}

    pool = live(tmp_path, body)
    told = ["run a", "ran a", "sleep", "asleep", "wake", "run c", "ran c", "unload"]
    assert pool.told("x") == told, "once each, in this order, all on the main thread"


def test_the_least_recently_used_sleeps_first_and_no_more_than_must(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x")
        await pool.result("b", "y")
        await pool.result("c", "x")
        await pool.result("d", "z", want_mib=500)
        assert "sleep" not in pool.told("x")
        assert "asleep" in pool.told("y")

    live(tmp_path, body)


def test_nobody_sleeps_while_there_is_room(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x")
        await pool.result("b", "y", want_mib=500)
        assert pool.told("x") == ["run a", "ran a"]

    live(tmp_path, body)


def test_those_that_free_enough_together_all_stay(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = [await pool.result(name, name) for name in "xy"]
        await pool.result("b", "z", want_mib=800)
        assert [(await pool.result(f"{n} again", n))["pid"] for n in "xy"] == [
            result["pid"] for result in first
        ]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
@pytest.mark.parametrize("how", ["refuse", "little", "lie", "raise", "exit"])
def test_one_that_makes_no_room_is_ended_and_replaced(
    how: str, executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor, sleep=how)
        other = await pool.result("b", "y", want_mib=800)
        assert [process.pid for process in engines()] == [other["pid"]]
        again = await pool.result("c", "x", executor=executor)
        assert again["pid"] != first["pid"]
        assert pool.told("x").count("sleep") == 1
        assert "wake" not in pool.told("x")

    live(tmp_path, body)


def test_one_that_does_not_sleep_goes_before_another_one_is_asked(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", sleep="raise")
        await pool.result("b", "y")
        await pool.result("c", "z", want_mib=600)
        assert not psutil.pid_exists(first["pid"])
        assert "sleep" not in pool.told("y")

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_one_that_never_answers_is_ended_in_time_and_whoever_came_meanwhile_does_not_notice(
    executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.places.engine_process._SLEEP_S", 1.0)

    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor, sleep_s=60)
        started_s = time.monotonic()
        other = asyncio.ensure_future(pool.result("b", "y", want_mib=800))
        await pool.hears("x", "sleep")
        again = await pool.result("c", "x", executor=executor)
        assert (await other)["held_mib"] == 300
        assert time.monotonic() - started_s < 8
        assert again["pid"] != first["pid"]
        assert not psutil.pid_exists(first["pid"])

    live(tmp_path, body)


def test_one_that_never_answers_is_ended_also_when_the_task_that_wanted_room_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.places.engine_process._SLEEP_S", 1.0)

    async def body(pool: Pool) -> None:
        await pool.result("a", "x", hold_mib=600)
        other = await pool.result("b", "y", hold_mib=600, want_mib=700, sleep_s=60)
        waiting = asyncio.ensure_future(pool.result("c", "x"))
        await pool.hears("y", "sleep")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        again = await asyncio.wait_for(pool.result("d", "y", hold_mib=100), 8)
        assert again["pid"] != other["pid"]

    live(tmp_path, body)


def test_one_that_knows_nothing_of_sleep_is_ended_as_ever(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor="sleepers.never")
        await pool.result("b", "y", want_mib=500)
        assert psutil.pid_exists(first["pid"])
        await pool.result("c", "z", want_mib=800)
        assert not psutil.pid_exists(first["pid"])
        assert (await pool.result("d", "x", executor="sleepers.never"))["answers"] == 1

    live(tmp_path, body)


def test_what_sleep_raises_and_prints_is_in_the_log_of_its_engine(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", sleep="raise")
        assert not await pool.engine("x").sleep()
        await asyncio.sleep(0.2)
        (folder,) = (tmp_path / "engines").iterdir()
        said = (folder / "logs" / "stderr.log").read_text()
        assert "sleep raised" in said
        assert "in sleep" in said
        assert "the driver said no" in said
        assert (folder / "logs" / "stdout.log").read_text() == "half asleep\n"

    live(tmp_path, body)


def test_a_sleeper_is_not_asked_again_and_ends_when_room_is_still_short(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", sleep="little")
        other = await pool.result("b", "y", want_mib=700)
        await pool.result("c", "z", want_mib=850)  # y sleeps too, and x keeps 200 MiB
        assert pool.told("x").count("sleep") == pool.told("y").count("sleep") == 1
        assert pool.told("x")[-1] == "unload"
        assert not psutil.pid_exists(first["pid"])
        assert psutil.pid_exists(other["pid"])

    live(tmp_path, body)


def test_a_sleeper_still_knows_what_it_gave_back_when_others_sleep_too(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x")
        await pool.result("b", "y", want_mib=800)
        await pool.result("c", "z", want_mib=800)
        assert pool.told("y")[-1] == "asleep"
        for name in "xy":
            assert 250 * MIB < pool.engine(name).gave_back["0"] < 350 * MIB

    live(tmp_path, body)


def test_an_engine_on_another_gpu_is_left_alone(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", devices=("1",))
        await pool.result("b", "y", devices=("0", "1"), hold_mib=200)
        await pool.result("c", "z", want_mib=800)
        assert pool.told("x") == ["run a", "ran a"]
        assert pool.told("y")[-1] == "asleep"

    live(tmp_path, body)


def test_for_want_of_host_memory_engines_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1 << 50
    monkeypatch.setattr("flowmesh_core.places.process.available_memory_bytes", lambda: free)

    async def body(pool: Pool) -> None:
        nonlocal free
        first = [await pool.result(name, name) for name in "xy"]
        free = MIB
        await pool.result("b", "z", want_mib=800)
        for result in first:
            assert not psutil.pid_exists(result["pid"])
        assert [pool.told(name)[-2:] for name in "xy"] == [["ran x", "unload"], ["ran y", "unload"]]

    live(tmp_path, body)


def test_after_a_task_that_ran_out_of_memory_nobody_is_asked(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x")
        await pool.result("b", "y", want_mib=800)
        with pytest.raises(CrashError, match="out of memory"):
            await pool.run("c", "z", fail="CUDA out of memory. Tried to allocate 2.00 GiB")
        assert engines() == []
        assert "sleep" not in pool.told("y")

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_nobody_is_asked_while_its_task_runs(executor: str, tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", executor=executor)
        running = asyncio.ensure_future(pool.result("b", "x", executor=executor, s=2.5))
        await pool.hears("x", "run b")
        await pool.result("c", "y", want_mib=800)
        assert not running.done()
        await running
        assert pool.told("x") == ["run a", "ran a", "run b", "ran b"]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_one_that_was_taken_while_another_one_fell_asleep_is_not_asked(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", sleep_s=0.7)
        await pool.result("b", "y", executor=executor)
        other = asyncio.ensure_future(pool.result("c", "z", want_mib=800))
        await pool.hears("x", "sleep")
        await pool.result("d", "y", executor=executor, s=2.0)
        await other
        assert pool.told("y") == ["run b", "ran b", "run d", "ran d"]

    live(tmp_path, body)


def test_one_in_which_a_task_that_was_given_up_still_runs_does_not_sleep(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        jobs = [pool.job(name, "x", executor="sleepers.together", s=s) for name, s in SPANS]
        deaf, good = pool.place.run_group(jobs)
        await pool.hears("x", "run deaf")
        deaf.cancel()
        assert (await good).ok
        await pool.result("c", "y", want_mib=800)
        assert "sleep" not in pool.told("x")

    live(tmp_path, body)


SPANS = (("deaf", 4.0), ("good", 0.5))


# Waking.


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_a_task_that_comes_while_its_engine_falls_asleep_waits_and_wakes_it(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor, sleep_s=0.5)
        other = asyncio.ensure_future(pool.result("b", "y", want_mib=800))
        await pool.hears("x", "sleep")
        again = await pool.result("c", "x", executor=executor)
        await other
        assert again == {"pid": first["pid"], "answers": 2, "held_mib": 300}
        assert pool.told("x")[2:] == ["sleep", "asleep", "wake", "run c", "ran c"]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", EVERY_KIND)
def test_a_child_that_hears_of_a_task_while_it_falls_asleep_wakes_for_it(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", executor=executor, sleep_s=0.5)
        engine = pool.engine("x")
        falling = asyncio.ensure_future(engine.sleep())
        await pool.hears("x", "sleep")
        await pool.result("c", "x", executor=executor)  # nobody makes it wait here
        assert not await falling
        assert not engine.asleep
        assert pool.told("x")[2:] == ["sleep", "asleep", "wake", "run c", "ran c"]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_a_child_does_not_wake_for_a_task_that_was_cancelled_while_it_fell_asleep(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", executor=executor, sleep_s=0.7)
        falling = asyncio.ensure_future(pool.engine("x").sleep())
        await pool.hears("x", "sleep")
        running = asyncio.ensure_future(pool.run("c", "x", executor=executor))
        await asyncio.sleep(0.1)
        pool.place.stop("c")
        assert isinstance((await asyncio.wait_for(running, 0.5)).error, CancelledError)
        assert await falling
        await asyncio.sleep(0.2)
        assert pool.told("x")[2:] == ["sleep", "asleep"]
        await pool.result("d", "x", executor=executor)
        assert pool.told("x")[4:] == ["wake", "run d", "ran d"]

    live(tmp_path, body)


def test_several_tasks_wake_their_engine_once(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        kind = {"executor": "sleepers.together", "await_s": 0.3}
        first = await pool.result("a", "x", **kind)
        await pool.result("b", "y", want_mib=800)
        results = await asyncio.gather(*(pool.result(f"c{n}", "x", **kind) for n in range(3)))
        assert {result["pid"] for result in results} == {first["pid"]}
        assert pool.told("x").count("wake") == 1

    live(tmp_path, body)


def test_a_batch_wakes_its_engine_once(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor="sleepers.groups")
        await pool.result("b", "y", want_mib=800)
        jobs = [pool.job(f"c{n}", "x", executor="sleepers.groups") for n in range(2)]
        outcomes = await asyncio.gather(*pool.place.run_group(jobs))
        assert [outcome.result["pid"] for outcome in outcomes] == [first["pid"]] * 2
        assert pool.told("x")[4:] == ["wake", "run c0", "ran c0", "run c1", "ran c1"]

    live(tmp_path, body)


def test_whoever_wakes_gets_its_room_back_from_others(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", hold_mib=600)
        other = await pool.result("b", "y", hold_mib=600, want_mib=700)
        assert (await pool.result("c", "x"))["pid"] == first["pid"]
        assert pool.told("y")[2:] == ["sleep", "asleep"]
        assert (await pool.result("d", "y"))["pid"] == other["pid"]
        assert pool.told("x")[-2:] == ["sleep", "asleep"]

    live(tmp_path, body)


def test_whoever_wakes_asks_for_no_more_than_it_gave_back(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", hold_mib=200)
        await pool.result("b", "y", hold_mib=500, want_mib=900)
        await pool.result("c", "x", want_mib=900)
        assert "sleep" not in pool.told("y")

    live(tmp_path, body)


def test_whoever_wakes_ends_what_will_not_sleep(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", hold_mib=600)
        other = await pool.result("b", "y", hold_mib=600, want_mib=700, sleep="refuse")
        assert (await pool.result("c", "x"))["pid"] == first["pid"]
        assert not psutil.pid_exists(other["pid"])

    live(tmp_path, body)


def test_two_that_wake_at_once_with_room_for_one_do_not_wait_for_each_other(
    tmp_path: Path,
) -> None:
    async def body(pool: Pool) -> None:
        pids = [(await pool.result(n, n, hold_mib=600, want_mib=700))["pid"] for n in "xy"]
        assert pool.engine("x").asleep
        assert await pool.engine("y").sleep()
        pool.engine("y").gave_back = pool.engine("x").gave_back
        again = await asyncio.gather(*(pool.result(f"{n}2", n) for n in "xy"))
        assert [result["pid"] for result in again] == pids

    live(tmp_path, body)


def test_one_wakes_while_another_is_loaded(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x")
        await pool.result("b", "y", want_mib=800)
        again, other = await asyncio.gather(
            pool.result("c", "x"), pool.result("d", "z", want_mib=500)
        )
        assert again["pid"] == first["pid"]
        assert other["held_mib"] == 300

    live(tmp_path, body)


def test_who_is_cancelled_while_others_make_room_keeps_its_engine_asleep(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", hold_mib=600)
        other = await pool.result("b", "y", hold_mib=600, want_mib=700, sleep_s=0.7)
        waiting = asyncio.ensure_future(pool.result("c", "x"))
        await pool.hears("y", "sleep")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert "wake" not in pool.told("x")
        assert (await pool.result("d", "x"))["pid"] == first["pid"]
        assert (await pool.result("e", "y"))["pid"] == other["pid"]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", ["sleepers", "sleepers.together"])
def test_a_task_that_is_cancelled_while_its_engine_wakes_never_begins_and_the_engine_stays(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor, wake_s=1.0)
        await pool.result("b", "y", want_mib=800)
        running = asyncio.ensure_future(pool.run("c", "x", executor=executor))
        await pool.hears("x", "wake")
        pool.place.stop("c")
        outcome = await asyncio.wait_for(running, 0.8)
        assert isinstance(outcome.error, CancelledError)
        assert (await pool.result("d", "x", executor=executor))["pid"] == first["pid"]
        assert pool.told("x")[4:] == ["wake", "run d", "ran d"]

    live(tmp_path, body)


@pytest.mark.parametrize("executor", EVERY_KIND)
def test_an_engine_that_does_not_wake_fails_its_task_and_is_replaced(
    executor: str, tmp_path: Path
) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x", executor=executor, wake="the driver said no")
        await pool.result("b", "y", want_mib=800)
        failed = await pool.run("c", "x", executor=executor)
        assert isinstance(failed.error, ExecutionError)
        assert str(failed.error) == "RuntimeError: the driver said no"
        assert "in wake" in pool.logged[0]
        assert "run c" not in pool.told("x")
        again = await pool.result("d", "x", executor=executor)
        assert again["pid"] != first["pid"]
        assert again["answers"] == 1

    live(tmp_path, body)


def test_everybody_who_waits_for_an_engine_that_does_not_wake_hears_why(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        kind = {"executor": "sleepers.together", "wake": "the driver said no", "wake_s": 0.5}
        await pool.result("a", "x", **kind)
        await pool.result("b", "y", want_mib=800)
        answers = await asyncio.gather(
            *(pool.run(f"c{n}", "x", **kind) for n in range(3)), return_exceptions=True
        )
        errors = [one.error if isinstance(one, Outcome) else one for one in answers]
        assert ["the driver said no" in str(error) for error in errors] == [True] * 3
        assert pool.told("x").count("wake") == 1

    live(tmp_path, body)


def test_memory_that_runs_out_while_one_wakes_is_a_crash_like_any_other(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x", wake="CUDA out of memory. Tried to allocate 2.00 GiB")
        await pool.result("b", "y", want_mib=800)
        with pytest.raises(CrashError, match="out of memory") as raised:
            await pool.run("c", "x")
        assert raised.value.oom
        assert engines() == []

    live(tmp_path, body)


def test_one_that_was_killed_in_its_sleep_is_replaced_unnoticed(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x")
        await pool.result("b", "y", want_mib=800)
        os.kill(first["pid"], signal.SIGKILL)
        again = await pool.result("c", "x")
        assert again["pid"] != first["pid"]
        assert "wake" not in pool.told("x")

    live(tmp_path, body)


def test_what_a_sleeper_keeps_here_counts_against_no_task(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        kind = {"hold_mib": 150, "keep_mib": 600, "wake_s": 1.0, "limit_mib": 400}
        first = await pool.result("a", "x", **kind)
        await pool.place.run(pool.job("b", "x", **kind))
        assert await pool.engine("x").sleep()
        await asyncio.sleep(1.0)
        assert psutil.Process(first["pid"]).memory_info().rss > 600 * MIB
        again = await pool.result("c", "x", **kind)
        assert again["pid"] == first["pid"]
        assert pool.engine("x")._watch.limit_bytes == 400 * MIB

    live(tmp_path, body)


# The place.


def test_a_sleeper_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first = await pool.result("a", "x")
        await pool.result("b", "y", want_mib=800, s=2.0)
        while psutil.pid_exists(first["pid"]):
            await asyncio.sleep(0.05)
        assert pool.told("x")[2:] == ["sleep", "asleep", "unload"]

    live(tmp_path, body, warm_idle_s=1.5)


def test_a_sleeper_counts_among_the_warm_ones(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        await pool.result("a", "x")
        other = await pool.result("b", "y", want_mib=800)
        while len(engines()) > 1:
            await asyncio.sleep(0.05)
        assert [process.pid for process in engines()] == [other["pid"]]
        assert pool.told("x")[-1] == "unload"

    live(tmp_path, body, warm_max=1)


def test_of_two_engines_of_one_key_the_one_that_is_awake_is_taken(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        first, second = await asyncio.gather(
            *(pool.result(name, "x", hold_mib=100, s=1.0) for name in ("a", "b"))
        )
        assert first["pid"] != second["pid"]
        older, newer = (engine for found in pool.place._engines.values() for engine in found)
        assert await older.sleep()
        assert not newer.asleep
        for number in range(2):
            await pool.result(f"c{number}", "x")
        assert "wake" not in pool.told("x")

    live(tmp_path, body)


def test_an_engine_whose_first_task_was_cancelled_is_loaded_by_the_next(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        running = asyncio.ensure_future(pool.run("a", "x"))
        while not (pool.place._engines and pool.engine("x")._conversations):
            await asyncio.sleep(0.001)
        pool.place.stop("a")
        assert isinstance((await running).error, CancelledError)
        pid = pool.engine("x")._process.pid
        assert await pool.result("b", "x") == {"pid": pid, "answers": 1, "held_mib": 300}

    live(tmp_path, body)


def test_an_engine_that_is_not_loaded_does_not_sleep(tmp_path: Path) -> None:
    async def body(pool: Pool) -> None:
        running = asyncio.ensure_future(pool.run("a", "x"))
        while not (pool.place._engines and pool.engine("x")._conversations):
            await asyncio.sleep(0.001)
        pool.place.stop("a")
        await running
        assert not await pool.engine("x").sleep()
        assert pool.told("x") == []

    live(tmp_path, body)


@attrs.define
class _Node:
    name: str
    model: str
    memory: str | None = None

    def to_dict(self, journal: str, *, after: Sequence[_Node]) -> dict[str, Any]:
        gpu = {"count": 1, **({"memory": self.memory} if self.memory else {})}
        return {
            "name": self.name,
            "dependsOn": [node.name for node in after],
            "spec": {
                "taskType": "sleepers",
                "model": self.model,
                "journal": journal,
                "resources": {"hardware": {"gpu": gpu}},
            },
        }


def test_a_worker_wakes_the_engine_of_an_earlier_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setattr(MeasuredNvml, "__init__", _one_gpu(MeasuredNvml.__init__))
    nodes = [_Node("a", "x"), _Node("b", "y", "900Mi"), _Node("c", "x")]
    graph = [node.to_dict(str(journal), after=nodes[:place]) for place, node in enumerate(nodes)]
    chosen = choose(tmp_path)
    workflow = plan({"spec": {"taskType": "sleepers", "graph": {"nodes": graph}}})

    async def work() -> list[StageReport]:
        local = LocalRun(workflow, chosen, load_plugins(chosen, files=[SLEEPERS]))
        return await asyncio.wait_for(local.run(), LIMIT_S)

    reports = {report.name: report for report in asyncio.run(work())}
    assert all(report.ok for report in reports.values()), reports
    pids = {name: report.result["pid"] for name, report in reports.items()}
    assert pids["a"] == pids["c"] != pids["b"]
    asleep = journal.read_text().splitlines()
    assert asleep.index("x asleep") < asleep.index("x wake") < len(asleep)


def _one_gpu(init: Callable[[MeasuredNvml], None]) -> Callable[[MeasuredNvml], None]:
    def made(self: MeasuredNvml) -> None:
        init(self)
        self.nvmlDeviceGetCount = lambda: 1

    return made
