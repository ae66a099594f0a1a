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
from typing import Any, NoReturn

import attrs

from flowmesh_core.errors import CancelledError, ExecutionError, FlowmeshError, PluginError
from flowmesh_core.executor import API_VERSION, Executor, ExecutorInfo, Outcome, RunContext
from flowmesh_core.inputs import Inputs
from flowmesh_core.places.frames import Decoder, encode
from flowmesh_core.places.settle import answer_group, as_execution_error, as_outcome

__all__ = ["CONTROL_FD", "PROTOCOL_VERSION", "main"]

CONTROL_FD = 3
PROTOCOL_VERSION = 1
_CHUNK = 65536
_LOST = 70


class Connection:
    """The child's end of the socket; ``send`` may be called from any thread."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._sending = threading.Lock()
        self._decoder = Decoder()
        self._owner = os.getpid()

    def send(self, channel: int, message: Mapping[str, Any]) -> None:
        """Send one message; without a worker to hear it the process ends at once.

        A fork of the executor's own has nothing to say.
        """
        if os.getpid() != self._owner:
            return
        for frame in encode(channel, message):
            try:
                with self._sending:
                    self._socket.sendall(frame)
            except OSError as exc:
                _give_up(exc)

    def receive(self) -> list[tuple[int, Any]] | None:
        """Wait for what comes next; None when the worker is gone."""
        data = self._socket.recv(_CHUNK)
        return self._decoder.feed(data) if data else None


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


class _Child:
    """The process's state.

    Args:
        connection: To the worker.
        info: The executor that this process is for.
    """

    def __init__(self, connection: Connection, info: ExecutorInfo) -> None:
        self._connection = connection
        self._info = info
        self._inbox: queue.SimpleQueue[list[_Run] | None] = queue.SimpleQueue()
        self._runs: dict[int, _Run] = {}
        self._wake: Callable[[], object] = lambda: None
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
            _give_up(exc)

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

    def _put(self, group: list[_Run] | None) -> None:
        self._inbox.put(group)
        self._wake()

    # On the main thread.

    def serve(self) -> None:
        """Load the engine for the first task, then answer tasks until told to unload."""
        first = self._inbox.get()
        if first is None:
            return
        executor: Executor | None = None
        first = [run for run in first if run.begin()]
        try:
            cls = self._load_class()
            executor = cls(self._settings)
            if first:
                executor.load(self._context(first[0]))
        except BaseException as exc:  # noqa: BLE001 - executor boundary
            for run in first:
                self._say_outcome(run, Outcome(error=self._as_error(run, exc)), usable=False)
        else:
            if inspect.iscoroutinefunction(executor.run):
                asyncio.run(self._serve_coroutines(executor, first))
            else:
                self._serve_in_turn(executor, first)
        if executor is not None:
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                executor.unload()

    def _load_class(self) -> type[Executor]:
        from flowmesh_core.importing import import_target  # noqa: PLC0415 - not before it is needed

        if self._info.settings:
            from flowmesh_core.config import load_plugin_settings  # noqa: PLC0415

            model = import_target(self._info.settings)
            self._settings = load_plugin_settings(model, plugin=self._info.name)
        cls = import_target(self._info.target)
        if not (isinstance(cls, type) and issubclass(cls, Executor)):
            raise PluginError(f"{self._info.target} must be a subclass of flowmesh_core.Executor")
        return cls

    def _serve_in_turn(self, executor: Executor, group: list[_Run] | None) -> None:
        while group is not None:
            if len(group) == 1:
                self._answer(executor, group[0])
            elif group:
                self._answer_group(executor, group)
            group = self._next()

    def _next(self) -> list[_Run] | None:
        """Wait for the next tasks and begin those that nobody has cancelled meanwhile."""
        group = self._inbox.get()
        return None if group is None else [run for run in group if run.begin()]

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
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
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
            group = self._next()
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
        return future

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


async def _await(answer: Any) -> Any:
    return await answer


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


def _give_up(exc: BaseException) -> NoReturn:
    """End the process: it cannot hear its worker any more."""
    os.write(2, f"fatal: the connection to the worker is lost: {exc!r}\n".encode())
    os._exit(_LOST)


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
