"""Runs one executor under watch, as a worker would: real places, warm from task to task."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import attrs
import psutil

from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.config import Settings, read_environment
from flowmesh_core.contract import Task, parse_task
from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import Capability, Executor, ExecutorInfo, Outcome
from flowmesh_core.importing import import_plugin_file, plugin_module_name
from flowmesh_core.members import run_members
from flowmesh_core.plugins import Plugins
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.runner import Runner
from flowmesh_core.telemetry.probes import GpuReader
from flowmesh_core.testing.harness import build_runner
from flowmesh_core.testing.watching import KIT, watch

__all__ = ["Bench", "Ran", "parse_spec"]

ResultT = TypeVar("ResultT")
_SLOTS = 2
_LOOK_S = 0.01
_BEGIN_S = 5.0
# What the worker's own clean-up may take after a task was given up.
_END_S = 60.0
_JOIN_S = 5.0
_PLUGIN = '''"""Stands in for the executor's own module; names its class when it is asked."""

from flowmesh_core.testing.watching import watch_target


def __getattr__(name):
    if name != "Watched":
        raise AttributeError(name)
    return watch_target({target!r}, {journal!r}, {pid})
'''


@attrs.frozen(kw_only=True)
class Ran:
    """What became of one task.

    Attributes:
        folder: Its attempt's folder.
        progress: All that it reported.
        served: It said that it is ready, was cancelled then, and has ended.
        journal: What its process noted about it, in order.
    """

    task_id: str
    outcome: Outcome
    folder: Path
    progress: Sequence[Mapping[str, Any]] = ()
    served: bool = False
    journal: Sequence[Mapping[str, Any]] = ()

    def noted(self, call: str, edge: str) -> list[Mapping[str, Any]]:
        """Return what was noted at the beginnings or ends of a method's calls."""
        return [note for note in self.journal if (note["call"], note["edge"]) == (call, edge)]


class Bench:
    """A runner on an event loop of its own thread; used from one other thread.

    Args:
        info: The executor's declaration.
        cls: Its class when it comes from code, and so runs in this process.
        plugins: What is installed.
        settings: ``results_dir`` gets everything.
        limit_s: Longest that anything may take.
    """

    def __init__(
        self,
        info: ExecutorInfo,
        cls: type[Executor] | None,
        plugins: Plugins,
        settings: Settings,
        limit_s: float,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._limit_s = limit_s
        self._journal = settings.results_dir.parent / "journal.jsonl"
        self._journal.touch()
        self._progress: dict[str, list[Mapping[str, Any]]] = {}
        self._folders = TaskFolders(settings.results_dir)
        visible = read_environment().get("CUDA_VISIBLE_DEVICES")
        uses_gpu = Capability.GPU in info.capabilities
        self._gpus = GpuReader(visible_devices=visible).list_gpus() if uses_gpu else []
        self._registry = self._register(info, cls)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="flowmesh-bench", daemon=True
        )
        self._thread.start()
        self._runner: Runner | None = None
        self._stuck = ""

    def _register(self, info: ExecutorInfo, cls: type[Executor] | None) -> ExecutorRegistry:
        """Put the watched class in the place of the executor's own."""
        others = [other for other in self._plugins.executors if other.name != info.name]
        registry = ExecutorRegistry(
            others, gpu_count=len(self._gpus), pythons=self._plugins.pythons
        )
        if cls is not None:
            registry.register(info, watch(cls, self._journal, os.getpid()))
            return registry
        path = self._journal.with_name(f"watched_{os.getpid()}_{id(self)}.py")
        path.write_text(
            _PLUGIN.format(target=info.target, journal=str(self._journal), pid=os.getpid())
        )
        import_plugin_file(path)
        registry.register(attrs.evolve(info, target=f"{plugin_module_name(path)}:Watched"))
        self._plugins = Plugins(
            self._plugins.manager,
            self._plugins.reports,
            files=[*self._plugins.files, path],
            pythons=self._plugins.pythons,
        )
        return registry

    # What checks call.

    def run(self, spec: Mapping[str, Any], task_id: str, *, do: str = "", owner: str = "") -> Ran:
        """Run one task to its end; a service is stopped as soon as it is up.

        Args:
            spec: The document's ``spec``.
            task_id: Another attempt begins when it ran before.
            do: What the watcher is asked for.
            owner: Whose task it is.

        Raises:
            TimeoutError: It has not ended within the bench's limit.
        """
        try:
            task = parse_spec(spec, task_id, do, owner)
        except FlowmeshError as exc:
            return self._refused(task_id, exc)
        return self._wait(self._run(task))

    def stop(self, spec: Mapping[str, Any], task_id: str) -> Ran:
        """Run a task and cancel it as soon as it runs."""
        try:
            task = parse_spec(spec, task_id)
        except FlowmeshError as exc:
            return self._refused(task_id, exc)
        return self._wait(self._stop(task))

    def run_together(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Ran]:
        """Run tasks as one merged dispatch; one that the contract refuses never gets there."""
        tasks = []
        for name, spec in specs.items():
            with contextlib.suppress(FlowmeshError):
                tasks.append(parse_spec(spec, name))
        return self._wait(self._run_together(tasks))

    def stop_together(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Ran]:
        """Run tasks as one merged dispatch, and cancel all as soon as one runs."""
        return self._wait(self._stop_together([parse_spec(specs[name], name) for name in specs]))

    def overlap(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Ran]:
        """Begin all, and cancel what still runs as soon as all should have begun."""
        return self._wait(self._overlap([parse_spec(specs[name], name) for name in specs]))

    def close(self) -> list[int]:
        """Unload every engine; another task loads again.

        Returns:
            The processes that have not ended with it.
        """
        pids = {note["pid"] for note in self.read_journal()} - {os.getpid()}
        if self._runner is not None:
            runner, self._runner = self._runner, None
            self._wait(runner.close())
        return [pid for pid in sorted(pids) if _runs_executors(pid)]

    def end(self) -> None:
        """Close, and end the thread; a loop that is blocked for ever stays."""
        try:
            self.close()
            self._wait(self._loop.shutdown_default_executor())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_JOIN_S)
            if not self._thread.is_alive():
                self._loop.close()

    def read_journal(self) -> list[Mapping[str, Any]]:
        """Return all that was noted."""
        return [json.loads(line) for line in self._journal.read_text("utf-8").splitlines()]

    def _refused(self, task_id: str, error: FlowmeshError) -> Ran:
        outcome = Outcome(error=error)
        return Ran(task_id=task_id, outcome=outcome, folder=self._settings.results_dir)

    # On the loop.

    def _wait(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        if self._stuck:
            work.close()
            raise TimeoutError(self._stuck)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self._limit_s + _END_S)
        except concurrent.futures.TimeoutError:
            future.cancel()
            limit_s = self._limit_s + _END_S
            self._stuck = f"nothing came back within {limit_s:g} s (limit_s); does it block a loop?"
            raise TimeoutError(self._stuck) from None

    def _open(self) -> Runner:
        if self._runner is None:
            note: Callable[[str, Mapping[str, Any]], None] = lambda task_id, values: (  # noqa: E731
                self._progress.setdefault(task_id, []).append(values)
            )
            self._runner = build_runner(
                self._settings,
                self._plugins,
                self._registry,
                note,
                slots=_SLOTS,
                gpus=self._gpus,
            )
        return self._runner

    async def _run(self, task: Task) -> Ran:
        runner = self._open()
        attempt = self._begin(task)
        runner.admit([task.task_id])
        served = False
        try:
            async with runner.reserve(task) as reservation:
                outcome = await runner.run(task, attempt, reservation)
            if service := runner.services.get(task.task_id):
                served = True
                runner.cancel(task.task_id, "the check is over")
                await asyncio.wait([service])
        except FlowmeshError as exc:
            outcome = Outcome(error=exc)
        finally:
            runner.dismiss([task.task_id])
        return self._tell(task, attempt, outcome, served=served)

    async def _stop(self, task: Task) -> Ran:
        running = asyncio.ensure_future(self._run(task))
        while not running.done() and not self._begun(task.task_id):
            await asyncio.sleep(_LOOK_S)
        self._open().cancel(task.task_id, "the kit cancels it")
        return await running

    async def _stop_together(self, tasks: Sequence[Task]) -> dict[str, Ran]:
        running = asyncio.ensure_future(self._run_together(tasks))
        while not running.done() and not any(self._begun(task.task_id) for task in tasks):
            await asyncio.sleep(_LOOK_S)
        for task in tasks:
            self._open().cancel(task.task_id, "the kit cancels it")
        return await running

    async def _overlap(self, tasks: Sequence[Task]) -> dict[str, Ran]:
        running = {task.task_id: asyncio.ensure_future(self._run(task)) for task in tasks}
        looks = int(_BEGIN_S / _LOOK_S)  # that the rest have to begin, once one has
        while not any(work.done() for work in running.values()):
            begun = sum(map(self._begun, running))
            if begun == len(running) or not looks:
                break
            looks -= begun > 0
            await asyncio.sleep(_LOOK_S)
        for task_id in running:
            self._open().cancel(task_id, "the kit has seen enough")
        return {task_id: await work for task_id, work in running.items()}

    async def _run_together(self, tasks: Sequence[Task]) -> dict[str, Ran]:
        runner = self._open()
        members = [(task, self._begin(task)) for task in tasks]
        runner.admit([task.task_id for task in tasks])
        try:
            async with runner.reserve(tasks[0], size=len(tasks)) as reservation:
                answers = run_members(runner, members, reservation)
                outcomes = {task_id: outcome async for task_id, outcome, _ in answers}
            await self._settle({task.task_id for task in tasks})
        finally:
            runner.dismiss([task.task_id for task in tasks])
        return {
            task.task_id: self._tell(task, attempt, outcomes[task.task_id])
            for task, attempt in members
        }

    async def _settle(self, tasks: Set[str]) -> None:
        """Wait until ``run_group`` has ended, which comes after its last answer."""
        for _ in range(int(_JOIN_S / _LOOK_S)):
            notes = [note for note in self.read_journal() if note["call"] == "run_group"]
            edges = Counter(note["edge"] for note in notes if not tasks.isdisjoint(note["tasks"]))
            if edges["begin"] == edges["end"]:
                return
            await asyncio.sleep(_LOOK_S)

    def _begin(self, task: Task) -> Attempt:
        self._progress.pop(task.task_id, None)
        return self._folders.begin(task.task_id, task.destination)

    def _begun(self, task_id: str) -> bool:
        return any(note["call"].startswith("run") for note in self._notes(task_id))

    def _notes(self, task_id: str) -> Iterator[Mapping[str, Any]]:
        return (note for note in self.read_journal() if task_id in note["tasks"])

    def _tell(self, task: Task, attempt: Attempt, outcome: Outcome, *, served: bool = False) -> Ran:
        return Ran(
            task_id=task.task_id,
            outcome=outcome,
            folder=attempt.folder,
            progress=tuple(self._progress.get(task.task_id, ())),
            served=served,
            journal=[*self._notes(task.task_id)],
        )


def _runs_executors(pid: int) -> bool:
    """Whether a process is still the one that was a place's child; numbers are used again."""
    with contextlib.suppress(psutil.Error):
        return any("places.child" in word for word in psutil.Process(pid).cmdline())
    return False


def parse_spec(
    spec: Mapping[str, Any], task_id: str = "kit", do: str = "", owner: str = ""
) -> Task:
    """Return the task that a bench runs for a spec."""
    metadata = {**({KIT: do} if do else {}), **({"owner": owner} if owner else {})}
    return parse_task({"spec": dict(spec), "metadata": metadata}, task_id=task_id)
