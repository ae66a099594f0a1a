"""Our places keep what the suite checks; places that are right but for one fault do not."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest

from flowmesh_core.errors import ExecutionError, FlowmeshError
from flowmesh_core.executor import Outcome
from flowmesh_core.importing import import_plugin_file
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.places.inline import InlinePlace
from flowmesh_core.places.process import ProcessPlace
from flowmesh_core.testing import PlaceSuite
from flowmesh_core.testing.place_probe import Probe

TESTS = Path(__file__).parents[1]
NO_KILL = "Python cannot end a thread"


class TestInline(PlaceSuite):
    place = InlinePlace
    cannot_kill = NO_KILL


class TestProcess(PlaceSuite):
    place = ProcessPlace


class TestStaged(PlaceSuite):
    place = import_plugin_file(TESTS / "executors" / "staged_place.py").StagedPlace


# Broken on purpose.

CASES: dict[str, tuple[type[Place], str, str]] = {}


def breaks(clause: str, told: str) -> Callable[[type[Place]], type[Place]]:
    """Name the check that must reject a place, alone, and what that must say."""

    def note(cls: type[Place]) -> type[Place]:
        CASES[cls.__name__] = (cls, f"place.{clause}", told)
        return cls

    return note


@breaks("run", r"wanted was .*, got Outcome\(.*'place': 'mine'")
class AddsItsName(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        outcome = await super().run(job)
        return attrs.evolve(outcome, result={**outcome.result, "place": "mine"})


@breaks("context", "ctx.attempt is 1 there, and 3 here")
class ForgetsTheAttempt(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        return await super().run(attrs.evolve(job, ctx=attrs.evolve(job.ctx, attempt=1)))


class Elsewhere(InlinePlace):
    """Brings everything to another folder, and back."""

    def there(self, path: Path) -> Path:
        return self.context.folder / path.name

    async def stage_in(self, paths: Sequence[Path]) -> Mapping[Path, Path]:
        for path in paths:
            copy = shutil.copyfile if path.is_file() else shutil.copytree
            self.copy(copy, path)
        return {path: self.there(path) for path in paths}

    def copy(self, copy: Any, path: Path) -> None:
        if path.is_file():
            copy(path, self.there(path))
        else:
            copy(path, self.there(path), dirs_exist_ok=True)

    async def collect(self, folder: Path) -> None:
        shutil.copytree(self.there(folder), folder, dirs_exist_ok=True)


@breaks("stage-in", "staged in were .*'changed'.*, the executor read .*'first")
class CopiesOnce(Elsewhere):
    def copy(self, copy: Any, path: Path) -> None:
        if not self.there(path).exists():
            super().copy(copy, path)


@breaks("collect", "made.txt of kit-tell is not in its folder after collect")
class BringsNothingBack(Elsewhere):
    async def collect(self, folder: Path) -> None:
        """Forget about it."""


@breaks("error", "raised was a retriable InputError, got ExecutionError")
class FlattensErrors(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        try:
            return await super().run(job)
        except FlowmeshError as exc:
            raise ExecutionError(str(exc)) from exc

    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        return InlineGroup(self, super().run).run_group(jobs)


class InlineGroup(InlinePlace):
    """A group that is run by another method than a task alone."""

    def __init__(self, place: InlinePlace, run: Callable[[Job], Any]) -> None:
        super().__init__(place.context)
        self._run_one = run

    async def run(self, job: Job) -> Outcome:
        outcome: Outcome = await self._run_one(job)
        return outcome


@breaks("reports", r"heard \[1, 3, 5")
class DropsEverySecondReport(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        heard, tell = [0], job.ctx.on_progress

        def on_progress(values: Mapping[str, Any]) -> None:
            heard[0] += 1
            if heard[0] % 2:
                tell(values)

        job.ctx.on_progress = on_progress
        return await super().run(job)


@breaks("reports", "logged were .*, heard .*'info: ")
class FlattensLevels(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        tell = job.ctx.on_log
        job.ctx.on_log = lambda _level, text: tell("info", text)
        return await super().run(job)


@breaks("stop", "kit-nobody")
class KnowsOnlyItsTasks(InlinePlace):
    def __init__(self, context: PlaceContext) -> None:
        super().__init__(context)
        self.known: dict[str, Job] = {}

    async def run(self, job: Job) -> Outcome:
        self.known[job.ctx.task_id] = job
        return await super().run(job)

    def stop(self, task_id: str) -> None:
        del self.known[task_id]


@breaks("stop-one", "the stop of kit-1 ended kit-2, too")
class StopsAll(KnowsOnlyItsTasks):
    stopped: bool = False

    async def run(self, job: Job) -> Outcome:
        asked = job.ctx.is_cancelled
        job.ctx.is_cancelled = lambda: asked() or (self.stopped and job.ctx.task_id == "kit-2")
        return await super().run(job)

    def stop(self, task_id: str) -> None:
        self.stopped = True


@breaks("cancel", "cancelled, run must raise asyncio.CancelledError, got Outcome")
class SwallowsTheCancel(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        try:
            return await super().run(job)
        except asyncio.CancelledError:
            return Outcome(result={})


@breaks("kill", r"process \d+ still runs after the cancel")
class LetsItRunOn(ProcessPlace):
    async def run(self, job: Job) -> Outcome:
        running = asyncio.ensure_future(super().run(job))
        return await asyncio.shield(running)

    async def close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            if "ProcessPlace.run" in str(task.get_coro()):
                task.cancel()
        await super().close()


@breaks("engine", "a task for engine 'b' ran on engine 'a'")
class KeepsOneEngine(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        key = {}
        if job.ctx.raw_spec["do"] == "tell":
            first = vars(self).setdefault("first", job.ctx.raw_spec["engine"])
            key = {"engine": first}
        told = job.ctx.raw_spec
        job.ctx.raw_spec = {**told, **key}
        outcome = await super().run(job)
        if "raw_spec" in outcome.result:
            return attrs.evolve(outcome, result={**outcome.result, "raw_spec": dict(told)})
        return outcome


@breaks("warm", "a second task of one key loaded the engine again")
class NeverWarm(InlinePlace):
    async def run(self, job: Job) -> Outcome:
        place = InlinePlace(self.context)
        try:
            return await place.run(job)
        finally:
            await place.close()


@breaks("group", "member kit-0 was answered with")
class MixesAnswers(InlinePlace):
    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        running = super().run_group(jobs)
        return running[::-1] if len(running) == 3 else running


@breaks("group", "run_group gave 1 tasks for 3 jobs")
class AnswersTheFirstAlone(InlinePlace):
    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        return super().run_group(jobs[:1] if len(jobs) == 3 else jobs)


@breaks("member", "its neighbour got CancelledError")
class EndsTheGroup(InlinePlace):
    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        running = super().run_group(jobs)
        if len(jobs) == 2:
            running[0].add_done_callback(lambda _done: running[1].cancel())
        return running


@breaks("closed", "2 engines were not unloaded by close|4 engines")
class NeverUnloads(InlinePlace):
    async def close(self) -> None:
        self._engines.clear()


@breaks("closed", r"left among threads: watcher \(1\)")
class LeavesAThread(InlinePlace):
    ended: ClassVar[threading.Event] = threading.Event()

    async def close(self) -> None:
        await super().close()
        if not vars(self).get("closed"):
            threading.Thread(target=self.ended.wait, name="watcher").start()
        vars(self)["closed"] = True


@pytest.fixture
def ending_what_is_left() -> Iterator[None]:
    living = Probe.living
    yield
    LeavesAThread.ended.set()
    LeavesAThread.ended.clear()
    Probe.living = living


CHECKS = {
    check.pytestmark[0].args[0]: check
    for name, check in vars(PlaceSuite).items()
    if name.startswith("test_")
}


@pytest.mark.usefixtures("ending_what_is_left")
@pytest.mark.parametrize("name", CASES)
def test_a_place_is_rejected_by_the_one_check_for_its_fault(name: str, tmp_path: Path) -> None:
    cls, clause, told = CASES[name]
    failed = {}
    suite = type("Suite", (PlaceSuite,), {"place": cls, "cannot_kill": NO_KILL})()
    if clause == "place.kill":
        suite.cannot_kill = ""
    for number, (checked, check) in enumerate(CHECKS.items()):
        if issubclass(cls, ProcessPlace) and checked != clause:
            continue  # each starts processes
        try:
            check(suite, tmp_path / str(number))
        except pytest.fail.Exception as exc:
            failed[checked] = str(exc)
        except pytest.skip.Exception:
            continue
        except KeyError as exc:  # what a place raises itself is as good a verdict
            failed[checked] = str(exc)
    assert clause in failed, failed
    assert list(failed) == [clause], failed
    assert re.search(told, failed[clause]), failed[clause]


def test_every_check_has_a_place_that_breaks_it_and_its_row_on_the_page() -> None:
    assert {clause for _, clause, _ in CASES.values()} == set(CHECKS)
    page = (TESTS.parent / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert list(CHECKS) == re.findall(r"^\| `(place\.[a-z-]+)` \|", page, re.MULTILINE)


def test_a_suite_without_a_place_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="set `place` to a subclass of Place"):
        CHECKS["place.run"](PlaceSuite(), tmp_path)
