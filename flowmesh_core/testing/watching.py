"""Looks at an executor from inside its process: what that was before a call, and after it.

``watch`` makes a subclass that writes one line of JSON to a journal when ``load``, ``run``,
``run_group`` or ``unload`` begins and when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import inspect
import json
import locale
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from flowmesh_core.config import read_environment
from flowmesh_core.executor import Executor, Outcome, RunContext, as_executor_class
from flowmesh_core.importing import import_target

__all__ = ["KIT", "LONG_LINE", "STATE", "find_json_faults", "watch", "watch_target"]

# Key of a task's metadata that asks the watcher for something.
KIT = "flowmesh_kit"
LONG_LINE = "=" * (1 << 20)
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_PATIENCE_S = 0.5
_LOADS = 3


def watch_target(target: str, journal: str, worker_pid: int) -> type[Executor]:
    """Import ``package.module:Class`` and watch it; called in the executor's process."""
    return watch(as_executor_class(import_target(target), target), Path(journal), worker_pid)


def watch(cls: type[Executor], journal: Path, worker_pid: int) -> type[Executor]:
    """Return a subclass that behaves like the class and tells the journal.

    Args:
        cls: Any executor; a coroutine ``run`` stays one.
        journal: A file that may exist already.
        worker_pid: The worker's process, in which executors run inline.
    """
    coroutine = inspect.iscoroutinefunction(cls.run)
    body = {
        "_watched": cls,
        "_journal": _Journal(journal, worker_pid),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "run": _run_coroutine if coroutine else _run,
        "load": _load,
        "run_group": _run_group,
        "unload": _unload,
    }
    metaclass: Any = type(cls)
    watched: type[Executor] = metaclass(cls.__name__, (cls,), body)
    return watched


class _Journal:
    """A file of JSON lines, one write each, that several processes may append to."""

    def __init__(self, path: Path, worker_pid: int) -> None:
        self._path = path
        self.inline = os.getpid() == worker_pid
        self._visible = _visible_devices()
        self._folder = os.getcwd()  # noqa: PTH109 - relative names are meant
        self.left: dict[str, dict[str, int]] = {}

    def note(self, call: str, edge: str, tasks: Iterable[str], **more: Any) -> None:
        line = {
            "call": call,
            "edge": edge,
            "tasks": list(tasks),
            "pid": os.getpid(),
            "state": _snapshot(),
            "devices": [self._visible, _visible_devices()],
            **more,
        }
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    @contextlib.contextmanager
    def around(self, call: str, *ctxs: RunContext) -> Iterator[dict[str, Any]]:
        """Write both lines; whoever calls adds what the second one says."""
        tasks = [ctx.task_id for ctx in ctxs]
        self.note(call, "begin", tasks)
        more: dict[str, Any] = {"error": ""}
        try:
            yield more
        except BaseException as exc:
            more["error"] = f"{type(exc).__name__}: {exc}"
            raise
        finally:
            self.left = find_leftovers(tuple(str(ctx.folder) for ctx in ctxs))
            self.note(call, "end", tasks, left=self.left, files=self._files(), **more)

    def _files(self) -> list[str]:
        """Return what lies in a child's working folder; the worker's own is everybody's."""
        if self.inline or not Path(self._folder).is_dir():
            return []
        return sorted(set(os.listdir(self._folder)) - {"logs"})  # noqa: PTH208 - names are meant


def _prepare(ctx: RunContext, more: dict[str, Any]) -> None:
    """Listen to its reports, which the core would put right, and do what the kit asks for."""
    fractions: list[Any] = []
    more["fractions"], report = fractions, ctx.on_progress

    def listen(values: Mapping[str, Any]) -> None:
        if values.get("fraction") is not None:
            fractions.append(values["fraction"])
        report(values)

    ctx.on_progress = listen
    asked = ctx.metadata.get(KIT)
    if asked == "half":
        ctx.batch_scale = 0.5
    if asked == "print":
        print(LONG_LINE)  # noqa: T201 - what is printed is checked
        print(LONG_LINE, file=sys.stderr)  # noqa: T201 - as above
        ctx.log(LONG_LINE)


def _judge(ctx: RunContext, answer: Any, more: dict[str, Any]) -> None:
    more["faults"] = find_json_faults(answer)
    if ctx.metadata.get(KIT) == "settle" and ctx.inputs.rows is not None:
        more["rows"] = sum(1 for _ in ctx.inputs.rows)


def _must_settle(journal: _Journal, ctx: RunContext, before: Any, until: float) -> bool:
    """Return whether what a task started may be ending still."""
    if ctx.metadata.get(KIT) != "settle" or time.monotonic() > until:
        return False
    now = find_leftovers((str(ctx.folder),))
    return any(Counter(now[kind]) - Counter(before.get(kind, {})) for kind in now)


def _load(self: Any, ctx: RunContext) -> Any:
    if not hasattr(self, "_first_context"):
        self._first_context = ctx
    with self._journal.around("load", ctx):
        return self._watched.load(self, ctx)


def _run(self: Any, ctx: RunContext) -> Any:
    before = self._journal.left
    with self._journal.around("run", ctx) as more:
        _prepare(ctx, more)
        answer = self._watched.run(self, ctx)
        if inspect.isawaitable(answer):  # the core awaits it
            answer = asyncio.run(_await(answer))
        _judge(ctx, answer, more)
        until = time.monotonic() + _PATIENCE_S
        while _must_settle(self._journal, ctx, before, until):
            time.sleep(0.02)
    return answer


async def _run_coroutine(self: Any, ctx: RunContext) -> Any:
    before = self._journal.left
    with self._journal.around("run", ctx) as more:
        _prepare(ctx, more)
        answer = await self._watched.run(self, ctx)
        _judge(ctx, answer, more)
        until = time.monotonic() + _PATIENCE_S
        while _must_settle(self._journal, ctx, before, until):
            await asyncio.sleep(0.02)
    return answer


async def _await(answer: Any) -> Any:
    return await answer


def _run_group(self: Any, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Any]]:
    with self._journal.around("run_group", *ctxs) as more:
        more["answered"] = []
        for task_id, answer in self._watched.run_group(self, ctxs):
            more["answered"].append(task_id)
            yield task_id, answer


def _unload(self: Any) -> None:
    """Unload twice, which must be harmless, and look whether loading again takes more memory."""
    with self._journal.around("unload"):
        self._watched.unload(self)
    with self._journal.around("unload_again"):
        self._watched.unload(self)
    own_load = self._watched.load is not Executor.load
    if self._journal.inline and own_load and hasattr(self, "_first_context"):
        self._journal.note("memory", "end", [], resident_bytes=[*_load_again(self)])


def _load_again(executor: Any) -> Iterator[int]:
    for _ in range(_LOADS):
        another = executor._watched(executor.settings)  # noqa: SLF001 - our own attribute
        another.load(executor._first_context)  # noqa: SLF001 - as above
        another.unload()
        del another
        gc.collect()
        yield psutil.Process().memory_info().rss


# What a process looks like.


def _snapshot() -> dict[str, Any]:
    return {name: read() for name, read in STATE.items()}


def _environment() -> dict[str, str]:
    """What changed shows, what a secret says does not."""
    return {name: _digest(value) for name, value in read_environment().items()}


def _root_logger() -> list[Any]:
    root = logging.getLogger()
    return [root.level, *map(repr, root.handlers), logging.root.manager.disable]


def _start_method() -> str:
    """Return the one that counts: whoever asks for it while none is set, sets the first."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _digest(value: str) -> str:
    return hashlib.blake2b(value.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - the name alone
    except FileNotFoundError:
        return "removed"


def _umask() -> str:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(line for line in status.splitlines() if line.startswith("Umask")).split()[1]


def _handler(number: signal.Signals) -> Any:
    try:
        return signal.getsignal(number)
    except ValueError:  # not on this system
        return None


def _visible_devices() -> dict[str, str]:
    environ = read_environment()
    return {name: environ[name] for name in _VISIBLE if name in environ}


# What is everybody's in a process, by the name that messages and ``may_change`` use.
STATE: Mapping[str, Callable[[], Any]] = {
    "environment": _environment,
    "working folder": _working_folder,
    "umask": _umask,
    "signal handlers": lambda: {number.name: repr(_handler(number)) for number in signal.Signals},
    "root logger": _root_logger,
    "warnings": lambda: [repr(entry) for entry in warnings.filters],
    "locale": lambda: locale.setlocale(locale.LC_ALL),
    "sys.stdout": lambda: id(sys.stdout),
    "sys.stderr": lambda: id(sys.stderr),
    "sys.path": lambda: list(sys.path),
    "socket timeout": socket.getdefaulttimeout,
    "start method": _start_method,
}


def find_leftovers(own: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    """Return how many threads, processes and descriptors of each kind there are.

    Args:
        own: Folders whose open files are the core's logs.
    """
    return {
        "threads": Counter(map(_plain_name, filter(_is_foreign, threading.enumerate()))),
        "processes": Counter(_children()),
        "descriptors": Counter(_descriptors(own)),
    }


def _is_foreign(thread: threading.Thread) -> bool:
    """Return whether it runs no function of the core, nor is it the one that asks."""
    if thread in (threading.main_thread(), threading.current_thread()):
        return False
    function = getattr(thread, "_target", None) or getattr(thread, "function", None)  # of a timer
    return not (getattr(function, "__module__", None) or "").startswith("flowmesh_core.")


def _plain_name(thread: threading.Thread) -> str:
    """Return its name without the number, so that one may take another's place."""
    return re.sub(r"\d+", "N", thread.name)


def _children() -> Iterator[str]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            yield " ".join(process.cmdline() or [process.name()])[:120]


def _descriptors(own: tuple[str, ...]) -> Iterator[str]:
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if not name.startswith(own) and not name.startswith("/proc/"):
                yield name.partition(":[")[0]


def find_json_faults(answer: Any) -> list[str]:
    """Return what is no JSON in an executor's answer."""
    result = answer.result if isinstance(answer, Outcome) else answer
    if not isinstance(result, Mapping):
        return [f"the answer must be a mapping or an Outcome, got {type(result).__name__}"]
    return [*_faults(result, "result")][:10]


def _faults(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield f"{path} has the key {key!r}, which is no text"
            yield from _faults(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, which JSON has no number for"
    elif not isinstance(value, (str, int, float, type(None))):
        yield f"{path} is of type {type(value).__name__}, which is no JSON"
