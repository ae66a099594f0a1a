"""Executors that are right but for one fault each; a single-file plugin beside ``sound.py``.

``breaks`` names the clause that must reject a class, and what its message must say.
"""

from __future__ import annotations

import asyncio
import locale
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from flowmesh_plugin_sound import Flat, Serves, Sound, Together, declare
from pydantic import BaseModel

from flowmesh_core import (
    Artifact,
    CancelledError,
    Capability,
    Executor,
    ExecutorInfo,
    InputError,
    Outcome,
    RunContext,
    TaskSpec,
    hookimpl,
)


@attrs.frozen
class Case:
    """What one class does wrong.

    Attributes:
        clause: The check that must reject it, alone.
        told: What that must say.
        suite: What its author gives the kit beside the usual.
    """

    info: ExecutorInfo
    clause: str
    told: str
    suite: Mapping[str, Any]


CASES: list[Case] = []
SOUND = Sound.__module__


def breaks(
    clause: str,
    told: str,
    *more: Capability,
    place: str = "process",
    suite: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Callable[[type], type]:
    def note(cls: type) -> type:
        known = {"target": f"{__name__}:{cls.__name__}", **fields}
        info = declare(f"broken.{cls.__name__}", *more, place=place, **known)
        CASES.append(Case(info, clause, told, suite or {}))
        return cls

    return note


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    return [case.info for case in CASES]


# Declarations.


@breaks("example", "cannot import .*:Nowhere", target=f"{__name__}:Nowhere")
class MissingTarget(Sound):
    pass


@breaks("example", "must be a subclass of flowmesh_core.Executor")
class NoExecutor:
    pass


@breaks("example", "must define run, or run_group for several tasks at once")
class RunsNothing(Executor):
    pass


@breaks("example", "there is no example: set spec, or let ExecutorInfo.example", example="")
class NoExample(Sound):
    pass


@breaks("light", "cannot import .*:NOWHERE", example="flowmesh_plugin_sound:NOWHERE")
class DanglingExample(Sound):
    pass


@breaks(
    "example",
    r"there is no example: ExecutorInfo.example \(.*:find_corpus\) raised ValueError: no corpus",
    example=f"{__name__}:find_corpus",
)
class RaisesInItsExample(Sound):
    pass


def find_corpus(folder: Path) -> Mapping[str, Any]:
    raise ValueError("no corpus")


@breaks(
    "example",
    r"ExecutorInfo.example \(.*:CORPUS\) must be a mapping, or a callable .*, got list",
    example=f"{__name__}:CORPUS",
)
class HasAListAsExample(Sound):
    pass


CORPUS = ["hello"]


@breaks(
    "models",
    "^ExecutorInfo.spec: .*:Sound must be a subclass of .*, got Sound",
    spec=f"{SOUND}:Sound",
)
class HasNoSpecModel(Sound):
    pass


@breaks(
    "models",
    "^ExecutorInfo.result: .*:CORPUS must be a subclass of pydantic.BaseModel, got list",
    result=f"{__name__}:CORPUS",
)
class HasNoResultModel(Sound):
    pass


class Careless(BaseModel):
    pitch: int = 0


class CarelessSpec(TaskSpec):
    voice: Careless = Careless()
    steps: int = 2


@breaks(
    "models",
    r"spec.voice \(Careless\) drops unknown keys",
    spec=f"{__name__}:CarelessSpec",
    suite={"refused": [{"data": {"type": "list", "items": ["bad"]}}]},
)
class DropsKeys(Sound):
    pass


# Results.


@breaks("example", "executor.failed: the executor tried to end the process: SystemExit")
class Exits(Sound):
    def answer(self, ctx: RunContext) -> Any:
        sys.exit(3)


@breaks("result", "the answer must be a mapping or an Outcome, got NoneType")
class AnswersNothing(Sound):
    def answer(self, ctx: RunContext) -> Any:
        return None


@breaks("result", "result.path is of type PosixPath, which is no JSON")
class AnswersNoJson(Sound):
    def answer(self, ctx: RunContext) -> Any:
        return {**super().answer(ctx), "path": ctx.folder}


@breaks("result", "result.score is nan, which JSON has no number for")
class AnswersNaN(Sound):
    def answer(self, ctx: RunContext) -> Any:
        return {**super().answer(ctx), "score": float("nan")}


@breaks("result", "result.by has the key 3, which is no text")
class AnswersNumbersAsKeys(Sound):
    def answer(self, ctx: RunContext) -> Any:
        return {**super().answer(ctx), "by": {3: "three"}}


@breaks("result", r"not the result that it declares: result.items\[0\].output is required")
class AnswersOtherSchema(Sound):
    def items(self, ctx: RunContext) -> Any:
        return [{"index": item["index"], "text": item["output"]} for item in super().items(ctx)]


@breaks("artifacts", "its outcome names 'model.bin', which is not in ctx.folder")
class NamesNoFile(Sound):
    def answer(self, ctx: RunContext) -> Any:
        return Outcome(result=super().answer(ctx), artifacts=[Artifact("model.bin")])


# Files and state.


class Spoils(Sound):
    def answer(self, ctx: RunContext) -> Any:
        self.spoil(ctx)
        return super().answer(ctx)

    def spoil(self, ctx: RunContext) -> None:
        raise NotImplementedError


@breaks("files", "it left .*/home/notes.txt; write below ctx.folder")
class WritesIntoHome(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        Path.home().joinpath("notes.txt").write_text("notes")


@breaks("files", "it left .*/tmp/mine-")
class LeavesTemporaryFiles(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        tempfile.mkdtemp(prefix="mine-")


@breaks("files", "it left ./here.txt")
class WritesWhereItWorks(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        Path("here.txt").write_text("here")


@breaks("files", "it left .*/results/beside.txt")
class WritesBeside(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        ctx.folder.with_name("beside.txt").write_text("beside")


@breaks("retry", "a second attempt at its example failed with .*FileExistsError")
class MindsItsEarlierFiles(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        if ctx.previous:
            raise FileExistsError(ctx.previous)


@breaks("state", "run changed the working folder from .* to ")
class ChangesFolder(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        os.chdir(ctx.folder)


@breaks("state", "run changed the environment: ACME_MODE")
class ChangesEnvironment(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        os.environ["ACME_MODE"] = ctx.task_id


@breaks("state", "load changed the environment: ACME_LOADED", place="inline")
class ChangesTheWorkersEnvironment(Sound):
    def load(self, ctx: RunContext) -> None:
        os.environ["ACME_LOADED"] = "1"


@breaks("state", "run changed the environment: ACME_LATER")
class ChangesEnvironmentLater(Spoils):
    runs = 0

    def spoil(self, ctx: RunContext) -> None:
        self.runs += 1
        if self.runs == 2:
            os.environ["ACME_LATER"] = "1"


@breaks("state", "run_group changed the environment: ACME_GROUPED", Capability.GROUP)
class ChangesEnvironmentForGroups(Sound):
    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        os.environ["ACME_GROUPED"] = "1"
        yield from super().run_group(ctxs)


@breaks(
    "state",
    "may_change: 'env' must be one of environment, working folder, ",
    suite={"may_change": {"env": "it is told by its variable"}},
)
class MayChangeWhatIsUnknown(Sound):
    pass


@breaks("state", "run changed the signal handlers: SIGUSR1")
class ChangesSignals(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@breaks("state", "run changed the root logger")
class ChangesRootLogger(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        logging.getLogger().addHandler(logging.NullHandler())


@breaks("state", r"run changed the warnings: \+ \('ignore', None, <class 'Warning'>")
class ChangesWarnings(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        warnings.simplefilter("ignore")


@breaks("state", "run changed the umask from 0022 to 0077")
class ChangesUmask(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        os.umask(0o77)


@breaks("state", "run changed the locale")
class ChangesLocale(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        now = locale.setlocale(locale.LC_NUMERIC)
        locale.setlocale(locale.LC_NUMERIC, "C" if now != "C" else "C.UTF-8")


@breaks("state", "run changed the socket timeout")
class ChangesSocketTimeout(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        socket.setdefaulttimeout(60)


@breaks("state", "run changed the start method")
class ChangesStartMethod(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        multiprocessing.set_start_method("spawn", force=True)


@breaks("state", r"run changed the sys.path: \+ \S+/\.kit-first\.attempt-1")
class ChangesPath(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        sys.path.append(str(ctx.folder))


@breaks("state", r"run changed the sys.path: - \S+\.zip")
class ForgetsPath(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        sys.path[:] = [path for path in sys.path if not path.endswith(".zip")]


@breaks("state", "run changed the sys.path: their order")
class TurnsPath(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        sys.path.append(sys.path.pop(0))


@breaks("log", "a line of 1 MB did not arrive in logs/stdout.log")
class SilencesOutput(Sound):
    def load(self, ctx: RunContext) -> None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as it lives


# What is left.


@breaks("threads", "each run leaves 1 more thread Thread-N")
class LeavesThread(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()


@breaks("threads", "each run leaves 1 more thread flowmesh-mine")
class LeavesThreadOfAFamiliarName(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        wait = threading.Event().wait
        threading.Thread(target=wait, name="flowmesh-mine", daemon=True).start()


@breaks("threads", "each refused, cancelled or grouped run leaves 1 more thread Thread-N")
class LeavesThreadWhenCancelled(Sound):
    def run(self, ctx: RunContext) -> Any:
        try:
            return super().run(ctx)
        except CancelledError:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            raise


@breaks(
    "threads",
    "each refused, cancelled or grouped run leaves . more thread Thread-N",
    Capability.GROUP,
)
class LeavesThreadOfAGroup(Sound):
    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        yield from super().run_group(ctxs)


@breaks(
    "descriptors",
    "each refused, cancelled or grouped run leaves 1 more open descriptor of /dev/null",
)
class LeavesDescriptorWhenRefusing(Sound):
    def items(self, ctx: RunContext) -> Any:
        try:
            return super().items(ctx)
        except InputError:
            os.open(os.devnull, os.O_RDONLY)
            raise


@breaks("processes", "each run leaves 1 more process sleep 600")
class LeavesProcess(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        subprocess.Popen(["sleep", "600"])


@breaks("descriptors", "each run leaves 1 more open descriptor of /dev/null")
class LeavesDescriptor(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        os.open(os.devnull, os.O_RDONLY)


@breaks("isolation", "last.txt holds 48392029384, which only an earlier task of another owner had")
class TellsOthers(Sound):
    last = ""

    def answer(self, ctx: RunContext) -> Any:
        (ctx.folder / "last.txt").write_text(self.last)
        answer = super().answer(ctx)
        self.last = str(answer)
        return answer


@breaks("isolation", "its result holds 48392029384, which only an earlier task of another owner")
class KeepsAnswersByTheirNumber(Sound):
    kept: dict[int, Any] = {}  # noqa: RUF012 - the fault itself

    def items(self, ctx: RunContext) -> Any:
        items = super().items(ctx)
        return self.kept.setdefault(len(items), items)


@breaks("isolation", "result.seen grows from run to run, 1 to [0-9]+ entries")
class Piles(Sound):
    seen: tuple[int, ...] = ()

    def answer(self, ctx: RunContext) -> Any:
        self.seen = (*self.seen, len(self.seen))
        return {**super().answer(ctx), "seen": list(self.seen)}


# Refusals.


@breaks("refused", r"refused\[1\] must fail with .*, got executor.failed: ValueError: no such row")
class RaisesValueError(Sound):
    def items(self, ctx: RunContext) -> Any:
        try:
            return super().items(ctx)
        except InputError:
            raise ValueError("no such row") from None


@breaks("refused", r"refused\[1\] must fail with .*, got success")
class TakesAnything(Sound):
    def items(self, ctx: RunContext) -> Any:
        return [
            {"index": n, "output": str(row.prompt)} for n, row in enumerate(ctx.inputs.rows or ())
        ]


@breaks("final", r"refused\[1\] is retriable, and would fail the same again: input")
class AsksForMore(Sound):
    def items(self, ctx: RunContext) -> Any:
        try:
            return super().items(ctx)
        except InputError as exc:
            raise InputError(str(exc), retriable=True) from exc


@breaks(
    "cold",
    r"refused\[1\] as the first task of its engine must .*, got executor.failed: ValueError",
    suite={"refused": [{"data": {"type": "list", "items": [*more, "bad"]}} for more in ("", "a")]},
)
class RefusesWhenWarm(Sound):
    asked = False

    def items(self, ctx: RunContext) -> Any:
        first, self.asked = not self.asked, True
        try:
            return super().items(ctx)
        except InputError:
            if first:
                raise ValueError("no such row") from None
            raise


@breaks("cold", r"refused\[1\] as the second task of its engine must .*, got success")
class RefusesWhenCold(Sound):
    knows = ""

    def items(self, ctx: RunContext) -> Any:
        before, self.knows = self.knows, self.knows or "nothing"
        try:
            items = super().items(ctx)
        except InputError:
            if before == "nothing":
                return []
            raise
        self.knows = "what is good"
        return items


class Reads(Sound):
    def items(self, ctx: RunContext) -> Any:
        for row in ctx.inputs.rows or ():
            self.read(str(row.prompt))
        return super().items(ctx)

    def read(self, text: str) -> object:
        raise NotImplementedError


@breaks("unicode", "rows that are unicode must be answered, .* got executor.failed: UnicodeEncode")
class ReadsAsciiAlone(Reads):
    def read(self, text: str) -> object:
        return text.encode("ascii")


@breaks("empty", "rows that are empty must be answered, .* got executor.failed: IndexError")
class NeedsText(Reads):
    def read(self, text: str) -> object:
        return text[0]


@breaks("empty", "1 rows that are empty were answered with 0 items")
class PassesOver(Sound):
    def items(self, ctx: RunContext) -> Any:
        return [item for item in super().items(ctx) if item["output"]]


@breaks("large", "1 rows that are large .* 10000 items, .* give an example with a row that is long")
class AnswersPieces(Flat):
    pass


@breaks("large", "rows that are large must be answered, .* got crash: ")
class DiesOfLength(Reads):
    def read(self, text: str) -> object:
        return os._exit(7) if len(text) > 1 << 20 else None


# Ends.


class Lasts(Sound):
    def run(self, ctx: RunContext) -> Any:
        until = time.monotonic() + (30 if ctx.spec.steps > 2 else 0)
        while time.monotonic() < until and not self.is_over(ctx):
            time.sleep(0.01)
        return self.answer(ctx)

    def is_over(self, ctx: RunContext) -> bool:
        raise NotImplementedError


@breaks("cancel", r"run had not ended after its cancel \(grace_s 1\)")
class IgnoresCancel(Lasts):
    def is_over(self, ctx: RunContext) -> bool:
        return ctx.remaining_s == 0


@breaks("cancel", r"run_group had not ended after its cancel \(grace_s 1\)", Capability.GROUP)
class IgnoresCancelOfAGroup(Sound):
    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        if ctxs[0].spec.steps > 2:
            time.sleep(30)
        yield from super().run_group(ctxs)


@breaks(
    "cancel",
    r"run_group had not ended after its cancel \(grace_s 1\)",
    Capability.GROUP,
    inputs=(),
    suite={"refused": [{"voice": {"pitsh": 1}}]},
)
class IgnoresCancelOfAGroupWithoutRows(IgnoresCancelOfAGroup):
    pass


@breaks("deadline", r"run had not ended after its deadline \(grace_s 1\)")
class IgnoresDeadline(Lasts):
    def is_over(self, ctx: RunContext) -> bool:
        late = ctx.remaining_s is not None and ctx.remaining_s < 0.25  # the worker's clock decides
        return ctx.cancelled and not late


@breaks("cancel", "or let a coroutine's CancelledError pass")
class SwallowsCancelledError(Sound):
    async def run(self, ctx: RunContext) -> Any:
        while ctx.spec.steps > 2 and ctx.remaining_s:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return self.answer(ctx)


@breaks("concurrent", "one task began only when the other had ended", Capability.CONCURRENT)
class BlocksLoop(Together):
    async def pause(self, pause_s: float) -> None:
        time.sleep(pause_s)

    async def run(self, ctx: RunContext) -> Any:
        for _ in range(ctx.spec.steps):
            ctx.check()
            await self.pause(0.01)
        return self.answer(ctx)


@breaks("concurrent", "let run be a coroutine", Capability.CONCURRENT)
class TakesTurns(Sound):
    pass


@breaks("progress", "progress fell from 0.9 to 0.1")
class FallsBack(Spoils):
    def spoil(self, ctx: RunContext) -> None:
        for fraction in (0.9, 0.1, 1.0):
            ctx.progress(fraction)

    def run(self, ctx: RunContext) -> Any:
        return self.answer(ctx) if ctx.spec.steps == 2 else super().run(ctx)


@breaks("progress", "progress ended at 0.5 of a task that succeeded, not at 1")
class NeverArrives(FallsBack):
    def spoil(self, ctx: RunContext) -> None:
        ctx.progress(0.5)


@breaks("progress", "progress is 50, not 0 to 1")
class CountsPercents(FallsBack):
    def spoil(self, ctx: RunContext) -> None:
        ctx.progress(50)


# Warm engines.


@breaks("warm", r"load was called \d times for three tasks of one engine")
class LoadsAgain(Spoils):
    def load(self, ctx: RunContext) -> None:
        """Nothing; it counts that it is called."""

    def spoil(self, ctx: RunContext) -> None:
        self.load(ctx)


@breaks("unload", "unload raised the first time: RuntimeError: still busy")
class CannotUnload(Sound):
    def unload(self) -> None:
        raise RuntimeError("still busy")


@breaks("unload", "unload raised the second time: AttributeError")
class UnloadsOnce(Sound):
    def load(self, ctx: RunContext) -> None:
        self.engine = object()

    def unload(self) -> None:
        del self.engine


@breaks("memory", "loading and unloading again keeps 3[23] MiB each time", place="inline")
class KeepsMemory(Sound):
    kept: list[bytes] = []  # noqa: RUF012 - the fault itself

    def load(self, ctx: RunContext) -> None:
        self.kept.append(b"x" * (32 << 20))


@breaks("devices", "CUDA_VISIBLE_DEVICES became '0', it was lent ''")
class TakesAnotherDevice(Sound):
    def load(self, ctx: RunContext) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"


# Capabilities.


@breaks("ready", "its run ended without a call of ctx.ready", Capability.SERVICE)
class NeverUp(Serves):
    def run(self, ctx: RunContext) -> Any:
        return self.answer(ctx)


@breaks("service-end", "run had not ended after its cancel", Capability.SERVICE)
class StaysUp(Serves):
    def run(self, ctx: RunContext) -> Any:
        self.announce(ctx, self.answer(ctx))
        while True:
            time.sleep(0.01)


@breaks("shrink", "half the batch answers .*HELL.*, the whole .*HELLO", Capability.SHRINK)
class ShrinksAnswers(Sound):
    def items(self, ctx: RunContext) -> Any:
        less = -1 if ctx.batch_scale < 1 else None
        return [{**item, "output": item["output"][:less]} for item in super().items(ctx)]


@breaks(
    "shrink",
    'half the batch answers .*"loss": 2}, the whole .*"loss": 1}',
    Capability.SHRINK,
    result="",
)
class ShrinksBesideTimes(Sound):
    """Has something in its answer that no run repeats."""

    def answer(self, ctx: RunContext) -> Any:
        answer = super().answer(ctx)
        loss = 2 if ctx.batch_scale < 1 else 1
        return {"ended": str(time.time_ns()), "ok": answer["ok"], "loss": loss}


class Groups(Sound):
    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        answers = list(super().run_group(ctxs))
        yield from self.change(answers) if len(ctxs) > 1 else answers

    def change(self, answers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        raise NotImplementedError


@breaks("answers", r"run_group answered kit-member-\d 0 times, not once", Capability.GROUP)
class LosesMember(Groups):
    def change(self, answers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return answers[:-1]


@breaks("answers", r"run_group answered kit-member-\d 2 times, not once", Capability.GROUP)
class AnswersTwice(Groups):
    def change(self, answers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return [answers[0], *answers]


@breaks(
    "answers",
    "run_group was given no two members that differ",
    Capability.GROUP,
    group_key=["data"],
)
class AgreesOnTooMuch(Sound):
    pass


@breaks(
    "own",
    r"kit-member-\d was answered with \d+, which another member asked for",
    Capability.GROUP,
    suite={"refused": [{"voice": {"pitsh": 1}}]},
)
class MixesAnswers(Groups):
    def change(self, answers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        names, given = zip(*answers, strict=True)
        return list(zip(names, (*given[1:], given[0]), strict=True))


@breaks(
    "own",
    r"kit-member-\d was given the answer of kit-member-\d",
    Capability.GROUP,
    suite={
        "refused": [{"voice": {"pitsh": 1}}],
        "variants": [{"data": {"type": "list", "items": ["other"]}}],
    },
)
class MixesVariants(MixesAnswers):
    pass


@breaks("neighbours", "kit-good-0 failed beside a bad member with input", Capability.GROUP)
class SpoilsNeighbours(Sound):
    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
        yield from [(ctx.task_id, self.run(ctx)) for ctx in ctxs]


@breaks(
    "invariant",
    "kit-member-0 is answered .*48392029384!.* beside others, .*48392029384.* alone",
    *(Capability.GROUP, Capability.BATCH_INVARIANT),
)
class DependsOnNeighbours(Groups):
    def change(self, answers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        for _, answer in answers:
            for item in answer["items"] if isinstance(answer, Mapping) else ():
                item["output"] += "!"
        return answers
