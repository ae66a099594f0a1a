"""Calls into foreign code that may never come back: made beside, and waited for so long."""

from __future__ import annotations

import concurrent.futures
import importlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TypeVar

__all__ = ["EscapeError", "StillRunningError", "call_within", "describe_exception", "locate"]

_T = TypeVar("_T")
_CORE = str(Path(__file__).parent)
_STANDARD = re.compile(r"/lib/python3[.\d]*/(?!\w+-packages/)|^<frozen ")
_MACHINERY = (
    "<frozen importlib",
    threading.__file__,
    *(*concurrent.futures.__path__, *importlib.__path__),
)


class StillRunningError(Exception):
    """The call goes on; ``stack`` is where it stood, outermost first, as text."""

    def __init__(self, stack: traceback.StackSummary) -> None:
        self.stack = "".join(stack.format())
        where = locate((frame.filename, frame.lineno) for frame in reversed(stack))
        super().__init__(f"still running{where}")


class EscapeError(Exception):
    """The call raised ``cause``, which ends a process where it is raised on the main thread."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause
        super().__init__(f"{type(cause).__name__}: {cause}")


def locate(frames: Iterable[tuple[str, object]]) -> str:
    """Return ``, at file:line`` of the first frame outside the standard library.

    Args:
        frames: File and line of each, innermost first; of the first one if none is outside.
    """
    known = [f", at {file}:{line}" for file, line in sorted(frames, key=_is_standard)]
    return known[0] if known else ""


def _is_standard(frame: tuple[str, object]) -> bool:
    return bool(_STANDARD.search(frame[0]))


def call_within(function: Callable[[], _T], limit_s: float) -> _T:
    """Return what a call returns, or raise what it raises.

    A thread cannot be ended: one that is late is left behind, and what it answers is lost. It
    holds no process up that ends. A ``KeyboardInterrupt`` is the user's: with a limit, what the
    call raises of that kind comes as another error.

    Args:
        function: Called on a thread of its own.
        limit_s: How long it may take; 0 sets no limit and calls it here.

    Raises:
        StillRunningError: It has not come back.
        EscapeError: It raised ``KeyboardInterrupt``, ``SystemExit`` or their like on its thread.
    """
    if not limit_s:
        return function()
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as exc:  # noqa: BLE001 - whoever waits for it gets it
            future.set_exception(exc)
        except BaseException as exc:  # noqa: BLE001 - the same, but it ends nobody
            future.set_exception(EscapeError(exc))

    thread = threading.Thread(target=run, name="flowmesh-plugin", daemon=True)
    thread.start()
    if not concurrent.futures.wait([future], limit_s).done:
        raise StillRunningError(_stack_of(thread))
    return future.result()


def _stack_of(thread: threading.Thread) -> traceback.StackSummary:
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - documented
    return _without_ours(traceback.extract_stack(frame) if frame else [])


def describe_exception(exc: BaseException) -> str:
    """Return the traceback of foreign code, without the steps that led there."""
    told = traceback.TracebackException.from_exception(exc)
    told.stack = _without_ours(told.stack)
    return "".join(told.format())


def _without_ours(frames: Iterable[traceback.FrameSummary]) -> traceback.StackSummary:
    foreign = [frame for frame in frames if not frame.filename.startswith((_CORE, *_MACHINERY))]
    return traceback.StackSummary.from_list(foreign)
