"""The process in which an executor runs: one engine, one task at a time or several at once.

Until the first task names the executor, only the standard library and the core are loaded. A thread
listens to the worker, so that a cancel is noticed while the executor works; loading, a plain
``run`` and the loop of a coroutine have the main thread, which many libraries insist on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import inspect
import itertools
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, Literal, NoReturn

import attrs

from flowmesh_core.errors import CancelledError, ExecutionError, FlowmeshError, PluginError
from flowmesh_core.executor import (
    API_VERSION,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    as_executor_class,
)
from flowmesh_core.inputs import Inputs
from flowmesh_core.places.connection import Connection, give_up
from flowmesh_core.places.settle import answer_group, as_execution_error, as_outcome

__all__ = ["CONTROL_FD", "PROTOCOL_VERSION", "main"]

CONTROL_FD = 3
PROTOCOL_VERSION = 2
_log = logging.getLogger(__name__)


@attrs.define(eq=False)
class _Run:
    """One task in this process."""

    channel: int
    task: Mapping[str, Any]
    deadline: float | None
    stopping: bool = False
    begun: bool = False
    beginning: threading.Lock = attrs.field(factory=threading.Lock)
    interrupt: Callable[[], object] | None = None
    children: dict[int, Future[Outcome]] = attrs.field(factory=dict)
    numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    def begin(self) -> bool:
        """Return whether nobody has begun it, or answered it, before."""
        with self.beginning:
            first, self.begun = not self.begun, True
        return first

    def stop(self, grace_s: float) -> None:
        """Let the executor see it; a coroutine that does not look is cancelled after a while."""
        self.stopping = True
        timer = threading.Timer(grace_s / 2, self._interrupt)
        timer.daemon = True
        timer.start()

    def _interrupt(self) -> None:
        if self.interrupt is not None:
            self.interrupt()


# Tasks that begin together, the wish to sleep, or the end.
_Item = list[_Run] | Literal["sleep"] | None
# What a method of the executor answered, or raised.
_Done = tuple[object, BaseException | None]


class _Child:
    """The process's state.

    Args:
        connection: To the worker.
        info: The executor that this process is for.
    """

    def __init__(self, connection: Connection, info: ExecutorInfo) -> None:
        self._connection = connection
        self._info = info
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._runs: dict[int, _Run] = {}
        self._nudge: Callable[[], object] = lambda: None
        self._asleep = False
        self._settings: Any = None
        self._pid = os.getpid()
        self._spec_model: Any = None

    # On the listening thread.

    def listen(self) -> None:
        """Take messages until the worker says goodbye or is gone."""
        try:
            while (messages := self._connection.receive()) is not None:
                for channel, message in messages:
                    self._take(channel, message)
            self._put(None)
        except BaseException as exc:  # noqa: BLE001 - a deaf process is of no use
            give_up(exc)

    def _take(self, channel: int, message: Mapping[str, Any]) -> None:
        what = message["do"]
        if what == "run":
            remaining_s = message["remaining_s"]
            deadline = None if remaining_s is None else time.monotonic() + remaining_s
            self._runs[channel] = _Run(channel, message, deadline)
            self._connection.send(channel, {"say": "taken"})
            group = message["group"]
            if all(member in self._runs for member in group):
                self._put([self._runs[member] for member in group])
        elif what == "sleep":
            self._put("sleep")
        elif what == "unload":
            self._put(None)
        elif run := self._runs.get(channel):
            if what == "stop":
                run.stop(message["grace_s"])
                if run.begin():  # it waits for the engine, or for others
                    error = CancelledError(f"task {run.task['task_id']} was cancelled")
                    self._say_outcome(run, Outcome(error=error))
            else:
                _resolve(run.children.pop(message["number"]), message["outcome"])

    def _put(self, item: _Item) -> None:
        self._inbox.put(item)
        self._nudge()

    # On the main thread.

    def serve(self) -> None:
        """Load the engine for the first task, then answer tasks until told to unload."""
        loaded: tuple[Executor | None, list[_Run] | None] | None = None
        while loaded is None:
            waiting = self._await_tasks()
            if waiting is None:
                return
            loaded = self._load(waiting)
        executor, first = loaded
        if executor is None:
            return
        if first is not None and inspect.iscoroutinefunction(executor.run):
            asyncio.run(self._serve_coroutines(executor, first))
        elif first is not None:
            self._serve_in_turn(executor, first)
        _unload(executor)

    def _await_tasks(self) -> list[_Run] | None:
        """Return the next tasks that nobody has cancelled; None when told to unload."""
        waiting: list[_Run] = []
        while not waiting:  # what was cancelled meanwhile loads nothing
            item = self._inbox.get()
            if item is None:
                return None
            if item == "sleep":
                self._note_sleep(False, None)
            else:
                waiting = [run for run in item if not run.begun]
        return waiting

    def _load(self, waiting: list[_Run]) -> tuple[Executor | None, list[_Run] | None] | None:
        """Load the engine for tasks.

        Returns:
            The executor, and the tasks, or None instead of them when it cannot be loaded. None
            when that is due to these tasks alone, so that it may be loaded for others.
        """
        run, executor, begun = waiting[0], None, list[_Run]()
        try:
            executor = self._load_class()(self._settings)
            ctx = self._first_context(run)
            # Several share an engine: a cancel is answered at once, and the others wait on.
            shared = inspect.iscoroutinefunction(executor.run)
            begun = [] if shared else _begin(waiting)
            executor.load(ctx)
        except _SpecError as exc:
            self._fail(_begin([run]), exc.error, usable=True)
            return self._load(waiting[1:]) if waiting[1:] else None
        except BaseException as exc:  # noqa: BLE001 - executor boundary
            if executor is not None and run.begun and not begun:
                # It was cancelled meanwhile, and what it had brought may be gone.
                _log.warning("executor %s: %s", self._info.name, exc)
                _unload(executor)
                return None
            self._fail([*begun, *_begin(waiting)], exc)
            return executor, None
        return executor, [*begun, *_begin(waiting)]

    def _load_class(self) -> type[Executor]:
        from flowmesh_core.importing import import_target  # noqa: PLC0415 - not before it is needed

        if self._info.settings:
            from flowmesh_core.config import load_plugin_settings  # noqa: PLC0415

            model = import_target(self._info.settings)
            self._settings = load_plugin_settings(model, plugin=self._info.name)
        return as_executor_class(import_target(self._info.target), self._info.target)

    def _serve_in_turn(self, executor: Executor, group: list[_Run] | None) -> None:
        while group is not None:
            if len(group) == 1:
                self._answer(executor, group[0])
            elif group:
                self._answer_group(executor, group)
            item = self._inbox.get()
            due = self._due(executor, item)
            group = self._begin_next(item, due and _attempt(due))

    def _due(
        self, executor: Executor, item: _Item, *, busy: bool = False
    ) -> Callable[[], object] | None:
        """Return what the executor must do first: fall asleep, wake, or nothing."""
        if item == "sleep":
            return None if self._asleep or busy else executor.sleep
        wanted = item is not None and not all(run.begun for run in item)
        return executor.wake if self._asleep and wanted else None

    def _begin_next(self, item: _Item, done: _Done | None) -> list[_Run] | None:
        """Begin what nobody has cancelled, now that the executor did its part.

        Returns:
            The tasks, or None when the engine is to be unloaded.
        """
        if item is None:
            return None
        if item == "sleep":
            self._note_sleep(*(done or (self._asleep, None)))
            return []
        if done is not None:
            _, error = done
            if error is not None:
                self._fail(_begin(item), error)
                return None
            self._asleep = False
            self._say(0, "awake")
        return _begin(item)

    def _note_sleep(self, answer: object, error: BaseException | None) -> None:
        if error is not None:
            _log.error("executor %s: sleep raised", self._info.name, exc_info=error)
        self._asleep = bool(answer)
        _flush_output()
        self._say(0, "asleep", done=self._asleep)

    def _fail(self, group: list[_Run], exc: BaseException, *, usable: bool = False) -> None:
        """Answer tasks whose engine could not be loaded, or did not wake."""
        for run in group:
            self._say_outcome(run, Outcome(error=self._as_error(run, exc)), usable=usable)

    def _answer_group(self, executor: Executor, group: list[_Run]) -> None:
        runs = {run.task["task_id"]: run for run in group}
        ctxs = []
        for run in group:
            try:
                ctxs.append(self._context(run))
            except FlowmeshError as exc:  # a spec that only this environment's model refuses
                self._say_outcome(run, Outcome(error=exc))
        for task_id, outcome in answer_group(executor, ctxs):
            self._say_outcome(runs[task_id], outcome)

    def _answer(self, executor: Executor, run: _Run) -> None:
        try:
            answer = executor.run(self._context(run))
            if inspect.isawaitable(answer):
                answer = asyncio.run(_await(answer))
            outcome = as_outcome(executor, answer)
        except BaseException as exc:  # noqa: BLE001 - executor boundary
            outcome = Outcome(error=self._as_error(run, exc))
        if os.getpid() != self._pid:
            os._exit(0)  # a fork that came back from `run`
        self._say_outcome(run, outcome)

    async def _serve_coroutines(self, executor: Executor, group: list[_Run] | None) -> None:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        self._nudge = lambda: loop.call_soon_threadsafe(arrived.set)
        tasks: set[asyncio.Task[None]] = set()
        while group is not None:
            for run in group:
                task = asyncio.ensure_future(self._answer_coroutine(executor, run))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                run.interrupt = functools.partial(loop.call_soon_threadsafe, task.cancel)
            while self._inbox.empty():
                arrived.clear()
                if self._inbox.empty():
                    await arrived.wait()
            item = self._inbox.get()
            # What the worker has given up may still run here.
            due = self._due(executor, item, busy=not all(task.done() for task in tasks))
            group = self._begin_next(item, due and await _attempt_on_loop(due))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_coroutine(self, executor: Executor, run: _Run) -> None:
        try:
            answer: Any = executor.run(self._context(run))
            outcome = as_outcome(executor, await answer)
        except asyncio.CancelledError:
            outcome = Outcome(error=ExecutionError("the executor cancelled itself"))
        except BaseException as exc:  # noqa: BLE001 - executor boundary
            outcome = Outcome(error=self._as_error(run, exc))
        self._say_outcome(run, outcome)

    def _first_context(self, run: _Run) -> RunContext:
        try:
            return self._context(run)
        except FlowmeshError as exc:
            raise _SpecError(exc) from exc

    def _context(self, run: _Run) -> RunContext:
        task, channel = run.task, run.channel
        return RunContext(
            task_id=task["task_id"],
            task_type=task["task_type"],
            spec=self._validate(task),
            raw_spec=task["spec"] if task["raw_spec"] is None else task["raw_spec"],
            metadata=task["metadata"],
            folder=Path(task["folder"]),
            inputs=Inputs.from_dict(task["inputs"]),
            attempt=task["attempt"],
            final_folder=Path(task["final_folder"]),
            previous=task["previous"] and Path(task["previous"]),
            settings=self._settings,
            devices=tuple(task["devices"]),
            deadline=run.deadline,
            clock=time.monotonic,
            batch_scale=task["batch_scale"],
            is_cancelled=lambda: run.stopping,
            on_progress=lambda values: self._say(channel, "progress", values=values),
            on_log=lambda level, text: self._say(channel, "log", level=level, message=text),
            on_ready=lambda answer, ttl_s: self._say_ready(channel, answer, ttl_s),
            start_child=lambda spec: self._start_child(run, spec),
        )

    def _validate(self, task: Mapping[str, Any]) -> Any:
        if not self._info.spec:
            return task["spec"]
        from flowmesh_core.importing import import_target  # noqa: PLC0415 - as in _load_class
        from flowmesh_core.validation import validate_model  # noqa: PLC0415

        if self._spec_model is None:
            self._spec_model = import_target(self._info.spec)
        where = f"task {task['task_id']}"
        return validate_model(self._spec_model, task["spec"], where=where, prefix="spec")

    # From any thread of the executor.

    def _say(self, channel: int, what: str, **fields: Any) -> None:
        self._connection.send(channel, {"say": what, **fields})

    def _say_ready(self, channel: int, answer: Any, ttl_s: float | None) -> None:
        outcome = answer if isinstance(answer, Outcome) else Outcome(result=answer)
        self._say(channel, "ready", outcome=outcome.to_dict(), ttl_s=ttl_s)

    def _start_child(self, run: _Run, spec: Mapping[str, Any]) -> Future[Outcome]:
        number = next(run.numbers)
        future = run.children[number] = Future()
        self._say(run.channel, "run_task", number=number, spec=spec)
        future.add_done_callback(lambda done: self._give_up_child(run, number, done))
        return future

    def _give_up_child(self, run: _Run, number: int, done: Future[Outcome]) -> None:
        if done.cancelled():
            with contextlib.suppress(OSError):  # the worker is gone, and the child with it
                self._say(run.channel, "give_up", number=number)

    def _as_error(self, run: _Run, exc: BaseException) -> FlowmeshError:
        if not isinstance(exc, FlowmeshError):
            text = "".join(traceback.format_exception(exc))
            self._say(run.channel, "log", level="error", message=text)
        return as_execution_error(exc)

    def _say_outcome(self, run: _Run, outcome: Outcome, *, usable: bool = True) -> None:
        _flush_output()
        del self._runs[run.channel]
        try:
            self._say(run.channel, "outcome", outcome=outcome.to_dict(), usable=usable)
        except Exception as exc:  # noqa: BLE001 - what an executor answers may be anything
            error = ExecutionError(f"the result cannot be sent: {exc}")
            self._say(run.channel, "outcome", outcome=Outcome(error=error).to_dict(), usable=usable)


class _SpecError(Exception):
    """A task's spec is refused by the model of this environment alone."""

    def __init__(self, error: FlowmeshError) -> None:
        super().__init__(str(error))
        self.error = error


def _unload(executor: Executor) -> None:
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        executor.unload()


def _begin(group: list[_Run]) -> list[_Run]:
    """Begin the tasks that nobody has cancelled meanwhile."""
    return [run for run in group if run.begin()]


async def _await(answer: Any) -> Any:
    return await answer


def _attempt(method: Callable[[], Any]) -> _Done:
    """Return what a method of the executor answers, or what it raises."""
    try:
        answer = method()
        return asyncio.run(_await(answer)) if inspect.isawaitable(answer) else answer, None
    except BaseException as exc:  # noqa: BLE001 - executor boundary
        return None, exc


async def _attempt_on_loop(method: Callable[[], Any]) -> _Done:
    """Do the same on the loop of a coroutine ``run``."""
    try:
        answer = method()
        return await answer if inspect.isawaitable(answer) else answer, None
    except BaseException as exc:  # noqa: BLE001 - executor boundary
        return None, exc


def _flush_output() -> None:
    """Push out what Python and C still buffer: the worker reads the task's output to its end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the executor may close or replace it
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def _resolve(future: Future[Outcome], outcome: Mapping[str, Any]) -> None:
    with contextlib.suppress(InvalidStateError):  # the executor gave up on it
        future.set_result(Outcome.from_dict(outcome))


def _refuse(connection: Connection, text: str) -> NoReturn:
    connection.send(0, {"say": "refused", "error": PluginError(text).to_dict()})
    raise SystemExit(1)


def main() -> None:
    """Serve the worker at the other end of file descriptor 3."""
    stream = socket.socket(fileno=CONTROL_FD)
    stream.set_inheritable(False)
    faulthandler.enable()
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    connection = Connection(stream)
    messages = connection.receive()
    while messages == []:
        messages = connection.receive()
    if messages is None:
        return
    (_, start), *others = messages
    if start["protocol"] != PROTOCOL_VERSION:
        wanted = start["protocol"]
        _refuse(connection, f"the worker speaks protocol {wanted}, this core {PROTOCOL_VERSION}")
    logging.basicConfig(level=start["log_level"], format="%(levelname)s %(name)s %(message)s")
    if start["plugin_files"]:
        from flowmesh_core.importing import import_plugin_file  # noqa: PLC0415 - rare

        for path in start["plugin_files"]:
            import_plugin_file(Path(path))
    connection.send(0, {"say": "hello", "api_version": API_VERSION})
    child = _Child(connection, ExecutorInfo.from_dict(start["info"]))
    for channel, message in others:
        child._take(channel, message)  # noqa: SLF001 - the listener has not begun
    threading.Thread(target=child.listen, name="flowmesh-listener", daemon=True).start()
    child.serve()
