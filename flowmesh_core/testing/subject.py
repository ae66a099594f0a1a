"""One executor under examination: what its author gave, and the runs that checks share."""

from __future__ import annotations

import json
import site
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.config import load_settings, read_environment
from flowmesh_core.errors import FlowmeshError, PluginError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, as_executor_class
from flowmesh_core.importing import import_target
from flowmesh_core.plugins import Plugins, PluginState, load_plugins
from flowmesh_core.testing.bench import Bench, Ran

__all__ = ["Subject", "find_files"]

Spec = Mapping[str, Any]
# How many there are more of each name, by kind: threads, processes, descriptors.
Leftovers = Mapping[str, Mapping[str, int]]
# Reads the same backwards and in every case, so that most of what executors do to texts keeps it.
_MARKS = ("48392029384", "71650905617")
_TURNS = 8


class Subject:
    """The executor of one suite.

    Args:
        suite: The class whose attributes say what to examine.
        folder: Empty; everything is written below it.
    """

    def __init__(self, suite: Any, folder: Path) -> None:
        self.suite = suite
        self.folder = folder
        self.home, self.tmp = folder / "home", folder / "tmp"
        self.plugin = self.problem = self.no_example = ""
        self.info: ExecutorInfo | None = None
        self.spec: Spec | None = None
        self._patch = pytest.MonkeyPatch()
        try:
            self._settings = load_settings(
                {},
                results_dir=folder / "results",
                cancel_grace_s=suite.grace_s,
                task_timeout_s=suite.limit_s,
                worker_id="kit",
                **suite.settings,
            )
            self._plugins = load_plugins(self._settings, files=suite.plugin_files)
            self.declared = self.info = self._find()
        except FlowmeshError as exc:
            self.problem = str(exc)
            return
        self._find_example()

    def _find(self) -> ExecutorInfo:
        if not isinstance(self.suite.executor, str):
            if self.suite.info is None:
                raise PluginError("executor is a class, so set info to its ExecutorInfo as well")
            info: ExecutorInfo = self.suite.info
            as_executor_class(self.suite.executor, info.target)
            return info
        name = self.suite.executor
        for report in self._plugins.reports:
            for info in report.executors:
                if info.name == name:
                    self.plugin = report.name
                    return info
        raise PluginError(_not_installed(name, self._plugins))

    def _find_example(self) -> None:
        given, where, target = self.suite.spec, "spec", self.declared.example
        if given is None and target:
            where = f"ExecutorInfo.example ({target})"
            try:
                given = import_target(target)
            except FlowmeshError as exc:
                self.problem = str(exc)
                return
        if given is None:
            self.no_example = "set spec, or let ExecutorInfo.example name one"
            return
        try:
            self.spec = self.resolve(given, where)
        except PluginError as exc:
            self.no_example = str(exc)

    def resolve(self, given: Any, where: str = "a spec of the suite") -> Spec:
        """Return a spec that an author gave, or what a callable that an author gave makes.

        Args:
            given: Either.
            where: Who gave it.

        Raises:
            PluginError: The callable raised, or there is no mapping.
        """
        if callable(given):
            folder = self.folder / "example"
            folder.mkdir(exist_ok=True)
            try:
                given = given(folder)
            except Exception as exc:  # executor boundary: an author's own code raises anything
                raise PluginError(f"{where} raised {type(exc).__name__}: {exc}") from exc
        if not isinstance(given, Mapping):
            told = f"a mapping, or a callable that returns one, got {type(given).__name__}"
            raise PluginError(f"{where} must be {told}")
        return {"taskType": min(self.declared.task_types), "executor": self.declared.name, **given}

    # Surroundings.

    def __enter__(self) -> Subject:
        """Give everything that is started from now on a home and a folder for temporary files."""
        environ, patch = read_environment(), self._patch
        cache = environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
        patch.setenv("XDG_CACHE_HOME", cache)  # caches are for what is not the task's
        if "TORCHINDUCTOR_CACHE_DIR" not in environ:  # whoever imports torch makes one in TMPDIR
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache}/torchinductor")
        if site.ENABLE_USER_SITE:  # Python looks for it below the home
            patch.setenv("PYTHONPATH", site.getusersitepackages(), prepend=":")
        for name, path in (("HOME", self.home), ("TMPDIR", self.tmp)):
            path.mkdir()
            patch.setenv(name, str(path))
        patch.setattr(tempfile, "tempdir", None)
        return self

    def __exit__(self, *exc: object) -> None:
        """End what runs, and put the surroundings back."""
        try:
            if "bench" in vars(self):
                self.bench.end()
        finally:
            self._patch.undo()

    @cached_property
    def bench(self) -> Bench:
        """Where it runs; started by its first use."""
        cls: type[Executor] | None = None
        if not isinstance(self.suite.executor, str):
            cls = self.suite.executor
        return Bench(self.declared, cls, self._plugins, self._settings, self.suite.limit_s)

    @property
    def inline(self) -> bool:
        """Whether it runs in this process."""
        return not isinstance(self.suite.executor, str) or self.declared.places[0] == "inline"

    @property
    def example(self) -> Spec:
        """The spec to run."""
        assert self.spec is not None, self.no_example
        return self.spec

    # Runs that checks share.

    @cached_property
    def story(self) -> tuple[Ran, ...]:
        """The example once; again as a second attempt; and as another task, when it succeeds."""
        first = self.bench.run(self.example, "kit-first")
        if not first.outcome.ok:
            return (first,)
        again = self.bench.run(self.example, "kit-first")
        return first, again, self.bench.run(self.example, "kit-third", do="settle")

    @property
    def first(self) -> Ran:
        """The example, run in a new process."""
        return self.story[0]

    @cached_property
    def marked(self) -> list[tuple[Ran, Sequence[str]]]:
        """Runs after a task that held a mark in all that is its own, with what they must not hold.

        The first of them is of the same shape, with another mark for another owner; the second is
        the example.
        """
        mark, other = _MARKS
        self._mark(mark)
        return [(self._mark(other), [mark]), (self.bench.run(self.example, "kit-after"), _MARKS)]

    def _mark(self, mark: str) -> Ran:
        spec = {**self.example, **(self.rows([mark]) or {})}
        ran = self.bench.run({**spec, "kitMark": mark}, f"kit-{mark}", owner=mark)
        if ran.outcome.error:  # it knows no such key
            ran = self.bench.run(spec, f"kit-{mark}", owner=mark)
        return ran

    @cached_property
    def refusals(self) -> list[Ran]:
        """What it must refuse, and what came of it."""
        return self._refuse(0)

    def _refuse(self, turn: int) -> list[Ran]:
        specs = enumerate(map(self.resolve, self.suite.refused))
        return [self.bench.run(spec, f"kit-refused-{turn}-{n}") for n, spec in specs]

    def refuse_cold(self) -> Iterator[tuple[int, str, Ran]]:
        """Yield what came of each as the first task of an engine, and as its second.

        What is refused before an engine is asked is left out: it comes to the same.
        """
        specs = map(self.resolve, self.suite.refused)
        for number, (spec, warm) in enumerate(zip(specs, self.refusals, strict=True)):
            if not warm.journal:
                continue
            self.bench.close()
            for turn in ("first", "second"):
                yield number, turn, self.bench.run(spec, f"kit-{turn}-refused-{number}")

    @cached_property
    def cancelled(self) -> list[Ran]:
        """What runs for long, cancelled: alone, and where it is to run in groups, in one."""
        return self._cancel(0)

    def _cancel(self, turn: int) -> list[Ran]:
        serves = Capability.SERVICE in self.declared.capabilities
        if self.suite.long_spec is None or serves:
            return []
        spec = self.resolve(self.suite.long_spec)
        first = self.bench.stop(spec, f"kit-cancelled-{turn}")
        ran = [first]
        rows = [self.rows([mark]) or {} for mark in _MARKS]
        groups = Capability.GROUP in self.declared.capabilities
        if groups and first.noted("run", "end"):
            group = {f"kit-cancelled-{turn}-{n}": {**spec, **part} for n, part in enumerate(rows)}
            ran += self.bench.stop_together(group).values()
        return ran

    @cached_property
    def growth(self) -> Mapping[str, Leftovers] | None:
        """What is left more after each turn of the example, and of runs that end otherwise.

        Pools and caches fill in the first turns; what grows in all of them is a leak. None when
        its process did not outlive a turn of the example.
        """
        alone = _find_growing(chain(self.story[1:], self._turns(range(_TURNS - 2))))
        if alone is None:
            return None
        if alone:
            return {"run": alone}
        others = chain(self.story[-1:], self._turns(takewhile(self._run_others, range(_TURNS))))
        return {"refused, cancelled or grouped run": _find_growing(others) or {}}

    def _turns(self, numbers: Iterable[int]) -> Iterator[Ran]:
        for number in numbers:
            yield self.bench.run(self.example, f"kit-turn-{number}", do="settle")

    def _run_others(self, turn: int) -> bool:
        """Refuse, cancel and group once more; return whether any of that got to the executor."""
        ran = [*self._refuse(turn), *self._cancel(turn)] if turn else []
        if turn == 0:
            ran = [*self.refusals, *self.cancelled]
        if Capability.GROUP in self.declared.capabilities and self.members:
            members = {f"{name}-{turn}": spec for name, spec in self.members.items()}
            ran += (self.bench.run_together(members) if turn else self.together).values()
        return any(one.journal for one in ran)

    def rows(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """Return the part of a spec that asks about texts; None when it reads no rows."""
        if "rows" not in self.declared.inputs:
            return None
        return {"data": {"type": "list", "items": list(texts)}}

    @cached_property
    def members(self) -> dict[str, Spec]:
        """Tasks that may run together: two that differ, and one that is the first once more."""
        if self.suite.variants:
            others = [self.resolve(spec) for spec in self.suite.variants]
            tasks = [self.example, *others]
        elif self.rows([]):
            tasks = [{**self.example, **(self.rows([mark]) or {})} for mark in _MARKS]
        else:
            return {}
        return {f"kit-member-{n}": spec for n, spec in enumerate([*tasks, tasks[0]])}

    def strangers(self, task_id: str) -> list[str]:
        """Return the marks that belong to other members than this one."""
        if self.suite.variants:
            return []
        own = json.dumps(self.members[task_id])
        return [mark for mark in _MARKS if mark not in own]

    @cached_property
    def together(self) -> dict[str, Ran]:
        """All members at once."""
        return self.bench.run_together(self.members)

    @cached_property
    def alone(self) -> dict[str, Ran]:
        """Each member by itself."""
        return {
            name: self.bench.run(spec, name.replace("member", "alone"))
            for name, spec in self.members.items()
        }

    @cached_property
    def closed(self) -> tuple[list[Mapping[str, Any]], list[int]]:
        """All that was noted until its engines were unloaded, and the processes that stayed."""
        assert self.story
        alive = self.bench.close()
        return self.bench.read_journal(), alive

    def stray_files(self) -> list[str]:
        """Return what lies where no task may write, but for the caches of a home."""
        results = self._settings.results_dir
        # Libraries look there for settings, and some make the folder for them.
        strays = [path for path in find_files(self.home) if not Path(path).is_dir()]
        strays = [path for path in strays if not Path(path).is_relative_to(self.home / ".cache")]
        strays += find_files(self.tmp)
        strays += [str(path) for path in results.iterdir() if not path.name.startswith(".")]
        notes = self.bench.read_journal()
        return sorted({*strays, *(f"./{name}" for note in notes for name in note.get("files", ()))})


def _not_installed(name: str, plugins: Plugins) -> str:
    known = ", ".join(info.name for info in plugins.executors) or "none"
    bad = [report for report in plugins.reports if report.state is not PluginState.LOADED]
    reasons = "".join(
        f"; plugin {report.name} is {report.state.value}: {report.reason}" for report in bad
    )
    return f"executor {name!r} is not installed; installed are {known}{reasons}"


def _find_growing(runs: Iterable[Ran]) -> Leftovers | None:
    """Return what the last of some runs left more than the one before; none once it stands still.

    Returns:
        None when they are not of one process.
    """
    before, grown = None, {}
    for ran in runs:
        ends = ran.noted("run", "end")
        if not ends or (before and before["pid"] != ends[-1]["pid"]):
            return None
        if before:
            pairs = {kind: (left, before["left"][kind]) for kind, left in ends[-1]["left"].items()}
            grown = {kind: Counter(now) - Counter(old) for kind, (now, old) in pairs.items()}
            if not any(grown.values()):
                return {}
        before = ends[-1]
    return grown


def find_files(folder: Path) -> Iterator[str]:
    """Yield every file and every empty folder below a folder."""
    found = sorted(folder.rglob("*"))
    return (str(path) for path in found if not path.is_dir() or not any(path.iterdir()))
