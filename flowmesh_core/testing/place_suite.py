"""What every driver of ``flowmesh.places`` must do; its author subclasses ``PlaceSuite``.

Each check is one clause of ``docs/conformance.md``. The place runs ``kit.probe``, an executor of
the kit, so ``flowmesh_core`` must be installed wherever it runs executors.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import attrs
import psutil
import pytest

from flowmesh_core.config import Settings, load_settings
from flowmesh_core.errors import CancelledError, FlowmeshError
from flowmesh_core.executor import Outcome, RunContext
from flowmesh_core.importing import import_target
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.task_log import TaskLog
from flowmesh_core.testing.place_probe import INFO, STEPS, Probe
from flowmesh_core.testing.verdicts import attempt, clause, drive, find_left, refuse, skip

__all__ = ["PlaceSuite"]

T = TypeVar("T")
_LOOK_S = 0.01
_METADATA = {"name": "Zoë 漢字", "labels": {"team": "a"}, "none": None}


@attrs.define(kw_only=True, eq=False)
class _Work:
    """One task, and what is heard of it."""

    job: Job
    folder: Path
    progress: list[Mapping[str, Any]]
    lines: list[str]
    cancelled: list[bool]

    @property
    def waits(self) -> bool:
        """Whether it has said that it is in the middle of its work."""
        return any(report["message"] == "waiting" for report in self.progress)


class _Session:
    """Does with a place what a worker does."""

    def __init__(self, place: Place, settings: Settings) -> None:
        self.place = place
        self._settings = settings
        self._works: list[_Work] = []

    async def prepare(
        self, do: str, task_id: str = "kit-1", *, engine: str = "a", reads: Sequence[Path] = ()
    ) -> _Work:
        """Make a task's folder, and bring it and what the task reads to the place."""
        folder = self._settings.results_dir / f".{task_id}.attempt"
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        there = await self.place.stage_in([folder, *reads])
        missing = [str(path) for path in (folder, *reads) if path not in there]
        refuse(f"stage_in does not say where {path} lies now" for path in missing)
        log = TaskLog(
            folder, mask=lambda: SecretMask({}), publish=lambda *_: None, max_bytes=1 << 20
        )
        reading = [str(there[path]) for path in reads]
        spec = {"taskType": "kit.probe", "do": do, "engine": engine, "reads": reading}
        progress, lines, cancelled = list[Mapping[str, Any]](), list[str](), list[bool]()
        ctx = RunContext(
            task_id=task_id,
            task_type="kit.probe",
            spec=spec,
            raw_spec=spec,
            metadata=_METADATA,
            folder=there[folder],
            final_folder=self._settings.results_dir / task_id,
            attempt=3,
            deadline=time.monotonic() + 1000,
            clock=time.monotonic,
            is_cancelled=lambda: bool(cancelled),
            on_progress=progress.append,
            on_log=lambda level, text: lines.append(f"{level}: {text}"),
        )
        job = Job(info=INFO, spec=spec, ctx=ctx, log=log)
        work = _Work(job=job, folder=folder, progress=progress, lines=lines, cancelled=cancelled)
        self._works.append(work)
        return work

    async def run(self, work: _Work) -> Outcome | BaseException:
        """Run it to its end, and bring back what it wrote."""
        answer = await attempt(self.place.run(work.job))
        await self.place.collect(work.folder)
        return answer

    async def begin(self, do: str, task_id: str = "kit-1", *, engine: str = "a") -> _Begun:
        """Return a task that is in the middle of its work."""
        work = await self.prepare(do, task_id, engine=engine)
        running = asyncio.ensure_future(self.run(work))
        while not work.waits and not running.done():
            await asyncio.sleep(_LOOK_S)
        return _Begun(work, running)

    def stop(self, work: _Work) -> None:
        """Ask it to stop."""
        work.cancelled.append(True)
        self.place.stop(work.job.ctx.task_id)

    async def close(self) -> None:
        """Stop what a check that failed has left running, and close the place twice."""
        for work in self._works:
            work.cancelled.append(True)
        await self.place.close()
        await self.place.close()
        for work in self._works:
            work.job.log.close()


@attrs.frozen
class _Begun:
    """A task that runs."""

    work: _Work
    running: asyncio.Future[Outcome | BaseException]


class PlaceSuite:
    """Subclass it as ``class TestMine(PlaceSuite)`` and set ``place``.

    Attributes:
        place: The driver.
        settings: Fields of ``Settings`` that it needs.
        cannot_kill: Why it cannot end an executor that ignores a cancel; empty when it can.
        grace_s: What a stop leaves an executor that obeys.
        limit_s: Longest that one check may take.
    """

    place: ClassVar[type[Place] | None] = None
    settings: ClassVar[Mapping[str, Any]] = {}
    cannot_kill: ClassVar[str] = ""
    grace_s: ClassVar[float] = 10.0
    limit_s: ClassVar[float] = 60.0

    def drive(self, folder: Path, work: Callable[[_Session], Awaitable[T]]) -> T:
        """Work with a new place, which is closed twice afterwards."""
        driver = self.place
        if driver is None:
            pytest.fail("set `place` to a subclass of Place", pytrace=False)
        results, own = folder / "results", folder / "worker"
        for path in (results, own):
            path.mkdir(parents=True, exist_ok=True)
        settings = load_settings({}, **{"results_dir": results, **self.settings})

        async def main() -> T:
            context = PlaceContext(
                settings=settings, load_class=lambda info: import_target(info.target), folder=own
            )
            session = _Session(driver(context), settings)
            try:
                return await work(session)
            finally:
                await session.close()

        return drive(main(), self.limit_s)

    # One task.

    @clause("place.run")
    def test_a_task_is_answered_with_what_its_executor_returned(self, tmp_path: Path) -> None:
        """Nothing is added to it, and nothing is lost."""

        async def work(session: _Session) -> list[str]:
            answer = await session.run(await session.prepare("report"))
            wanted = {"task_id": "kit-1"}
            return [] if _result(answer) == wanted else [f"wanted was {wanted}, got {answer!r}"]

        refuse(self.drive(tmp_path, work))

    @clause("place.context")
    def test_the_executor_is_told_about_its_task(self, tmp_path: Path) -> None:
        """Whatever ``RunContext`` says here, it says there."""

        async def work(session: _Session) -> list[str]:
            prepared = await session.prepare("tell")
            told = _result(await session.run(prepared))
            ctx = prepared.job.ctx
            wanted: dict[str, Any] = {
                "task_id": "kit-1",
                "attempt": 3,
                "metadata": _METADATA,
                "devices": [],
                "raw_spec": dict(ctx.raw_spec),
            }
            faults = [
                f"ctx.{key} is {told.get(key)!r} there, and {value!r} here"
                for key, value in wanted.items()
                if told.get(key) != value
            ]
            left_s = told.get("remaining_s")
            if left_s is None or not 0 < left_s <= 1000:
                faults.append(f"ctx.remaining_s is {left_s} there, and at most 1000 here")
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.stage-in")
    def test_the_executor_reads_what_was_staged_in(self, tmp_path: Path) -> None:
        """It lies where ``stage_in`` says, with its content of now."""
        file, folder = tmp_path / "inputs" / "Zoë.txt", tmp_path / "inputs" / "weights"
        folder.mkdir(parents=True)
        (folder / "a").write_text("within")

        async def work(session: _Session) -> list[str]:
            faults = []
            for text in ("first 漢字", "changed"):
                file.write_text(text, "utf-8")
                prepared = await session.prepare("tell", reads=[file, folder / "a"])
                read = _result(await session.run(prepared)).get("read")
                if read != [text, "within"]:
                    faults.append(f"staged in were {[text, 'within']}, the executor read {read}")
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.collect")
    def test_files_come_back_also_from_a_task_that_failed(self, tmp_path: Path) -> None:
        """What an executor wrote lies in the attempt's folder after ``collect``."""

        async def work(session: _Session) -> list[str]:
            faults = []
            for do in ("tell", "refuse"):
                prepared = await session.prepare(do, f"kit-{do}")
                await session.run(prepared)
                made = prepared.folder / "made.txt"
                if not made.exists() or made.read_text() != f"by kit-{do}":
                    faults.append(f"{made.name} of kit-{do} is not in its folder after collect")
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.error")
    def test_what_the_executor_raised_is_raised(self, tmp_path: Path) -> None:
        """An error of ours keeps code, text and ``retriable``; of any other, the text is told."""

        async def work(session: _Session) -> list[str]:
            faults = []
            refused = _error(await session.run(await session.prepare("refuse")))
            told = (getattr(refused, "code", ""), getattr(refused, "retriable", None), str(refused))
            if told != ("input", True, "the kit's input"):
                faults.append(f"raised was a retriable InputError, got {refused!r}: {told}")
            blunder = _error(await session.run(await session.prepare("blunder", "kit-2")))
            if "the kit's mistake" not in str(blunder):
                faults.append(f'raised was ValueError("the kit\'s mistake"), got {blunder!r}')
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.reports")
    def test_progress_and_log_arrive_in_order_before_the_answer(self, tmp_path: Path) -> None:
        """Every report and every line, once."""

        async def work(session: _Session) -> list[str]:
            prepared = await session.prepare("report")
            await session.run(prepared)
            steps = [report.get("step") for report in prepared.progress]
            wanted = [*range(1, STEPS + 1)]
            faults = [f"reported were {wanted}, heard {steps}"] if steps != wanted else []
            lines = [f"warning: line {step} 漢字" for step in wanted]
            if prepared.lines != lines:
                faults.append(f"logged were {lines}, heard {prepared.lines}")
            return faults

        refuse(self.drive(tmp_path, work))

    # Ends.

    @clause("place.stop")
    def test_an_executor_that_looks_is_told_to_stop(self, tmp_path: Path) -> None:
        """``stop`` returns at once, whatever it names; ``ctx.cancelled`` becomes true there."""

        async def work(session: _Session) -> list[str]:
            session.place.stop("kit-nobody")
            begun = await session.begin("wait")
            session.stop(begun.work)
            return await self._judge_stopped(begun)

        refuse(self.drive(tmp_path, work))

    @clause("place.stop-one")
    def test_a_stop_ends_nobody_else(self, tmp_path: Path) -> None:
        """Only the task that is named stops."""

        async def work(session: _Session) -> list[str]:
            first = await session.begin("wait")
            other = await session.begin("wait", "kit-2", engine="b")
            session.stop(first.work)
            faults = await self._judge_stopped(first)
            await session.run(await session.prepare("tell", "kit-3", engine="c"))
            if other.running.done():
                faults.append(f"the stop of kit-1 ended kit-2, too: {other.running.result()!r}")
            session.stop(other.work)
            return faults + await self._judge_stopped(other)

        refuse(self.drive(tmp_path, work))

    async def _judge_stopped(self, begun: _Begun) -> list[str]:
        await asyncio.wait({begun.running}, timeout=self.grace_s)
        name = begun.work.job.ctx.task_id
        if not begun.running.done():
            return [f"{name} was told to stop and still runs after {self.grace_s:g} s (grace_s)"]
        answer = begun.running.result()
        by_itself = _result(answer).get("stopped") or isinstance(_error(answer), CancelledError)
        return [] if by_itself else [f"{name} was told to stop, and ended with {answer!r}"]

    @clause("place.cancel")
    def test_a_task_that_is_given_up_leaves_the_place_usable(self, tmp_path: Path) -> None:
        """``run`` lets the cancel pass, and the next task of the same engine is answered."""

        async def work(session: _Session) -> list[str]:
            prepared = await session.prepare("wait")
            running = asyncio.ensure_future(session.place.run(prepared.job))
            while not prepared.waits and not running.done():
                await asyncio.sleep(_LOOK_S)
            prepared.cancelled.append(True)
            running.cancel()
            raised = await attempt(running)
            faults = []
            if not isinstance(raised, asyncio.CancelledError):
                faults.append(f"cancelled, run must raise asyncio.CancelledError, got {raised!r}")
            answer = await session.run(await session.prepare("tell", "kit-2"))
            if _result(answer).get("task_id") != "kit-2":
                faults.append(f"the next task got {answer!r}")
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.kill")
    def test_what_ignores_a_cancel_is_ended(self, tmp_path: Path) -> None:
        """When ``run`` raises the cancel, the executor's process has ended."""
        if self.cannot_kill:
            skip(self.cannot_kill)

        async def work(session: _Session) -> list[str]:
            prepared = await session.prepare("ignore")
            running = asyncio.ensure_future(session.place.run(prepared.job))
            while not prepared.waits and not running.done():
                await asyncio.sleep(_LOOK_S)
            session.stop(prepared)
            running.cancel()
            await attempt(running)
            where = prepared.progress[-1]
            alive = where["host"] == socket.gethostname() and _runs(where["pid"])
            return [f"process {where['pid']} still runs after the cancel"] if alive else []

        refuse(self.drive(tmp_path, work))

    # Engines.

    @clause("place.engine")
    def test_a_task_gets_the_engine_of_its_key(self, tmp_path: Path) -> None:
        """Another model is another engine."""

        async def work(session: _Session) -> list[str]:
            faults = []
            for number, engine in enumerate("aba"):
                prepared = await session.prepare("tell", f"kit-{number}", engine=engine)
                got = _result(await session.run(prepared)).get("engine")
                if got != engine:
                    faults.append(f"a task for engine {engine!r} ran on engine {got!r}")
            return faults

        refuse(self.drive(tmp_path, work))

    @clause("place.warm")
    def test_an_engine_stays_warm(self, tmp_path: Path) -> None:
        """The next task with the same key does not load again."""

        async def work(session: _Session) -> list[str]:
            await session.run(await session.prepare("tell"))
            served = _result(await session.run(await session.prepare("tell", "kit-2")))["served"]
            return [] if served == 2 else ["a second task of one key loaded the engine again"]

        refuse(self.drive(tmp_path, work))

    # Groups.

    @clause("place.group")
    def test_each_member_of_a_group_gets_its_own_answer(self, tmp_path: Path) -> None:
        """One asyncio task each, in the order of the jobs; a bad member fails alone."""

        async def work(session: _Session) -> Iterator[str]:
            does = ["tell", "refuse", "tell"]
            members = [await session.prepare(do, f"kit-{n}") for n, do in enumerate(does)]
            running = session.place.run_group([member.job for member in members])
            if len(running) != len(members):
                return iter([f"run_group gave {len(running)} tasks for {len(members)} jobs"])
            answers = [await attempt(one) for one in running]
            return _judge_members(does, answers)

        refuse(self.drive(tmp_path, work))

    @clause("place.member")
    def test_a_member_that_is_stopped_ends_alone(self, tmp_path: Path) -> None:
        """The others of its group are answered."""

        async def work(session: _Session) -> list[str]:
            members = [
                await session.prepare(do, f"kit-{n}") for n, do in enumerate(["wait", "tell"])
            ]
            running = session.place.run_group([member.job for member in members])
            while not members[0].waits and not running[0].done():
                await asyncio.sleep(_LOOK_S)
            session.stop(members[0])
            answers = [asyncio.ensure_future(attempt(one)) for one in running]
            faults = await self._judge_stopped(_Begun(members[0], answers[0]))
            other = await answers[1]
            if _result(other).get("task_id") != "kit-1":
                faults.append(f"its neighbour got {other!r}")
            return faults

        refuse(self.drive(tmp_path, work))

    # The end.

    @clause("place.closed")
    def test_nothing_is_left_once_it_is_closed(self, tmp_path: Path) -> None:
        """``close`` unloads every engine, may come twice, and to a place that ran nothing."""

        async def nothing(_session: _Session) -> None:
            """Close a place that ran nothing."""

        async def work(session: _Session) -> None:
            for engine in "ab":
                await session.run(await session.prepare("tell", f"kit-{engine}", engine=engine))

        before = Probe.living
        self.drive(tmp_path, nothing)
        faults = find_left(lambda: self.drive(tmp_path, work))
        if Probe.living > before:
            faults.append(f"{Probe.living - before} engines were not unloaded by close")
        refuse(faults)


def _judge_members(does: Sequence[str], answers: Sequence[Any]) -> Iterator[str]:
    for number, (do, answer) in enumerate(zip(does, answers, strict=True)):
        if do == "tell" and _result(answer).get("task_id") != f"kit-{number}":
            yield f"member kit-{number} was answered with {answer!r}"
        elif do == "refuse" and getattr(_error(answer), "code", "") != "input":
            yield f"member kit-{number} raised an InputError, got {answer!r}"


def _result(answer: Any) -> Mapping[str, Any]:
    return answer.result if isinstance(answer, Outcome) else {}


def _error(answer: Any) -> BaseException | FlowmeshError | None:
    return answer.error if isinstance(answer, Outcome) else answer


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
