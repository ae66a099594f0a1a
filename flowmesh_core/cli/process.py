"""Run a coroutine as the process's main job, and leave even when a thread will not end.

Python joins every thread of a pool before it exits; an executor's plain ``run`` that ignores its
cancel would keep the process for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

__all__ = ["leave", "run_main"]

ResultT = TypeVar("ResultT")
_JOIN_S = 2.0


def run_main(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run to the end on a new event loop, without waiting for its threads."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def leave(code: int) -> NoReturn:
    """Exit with a code, at the latest when threads have had a moment to end."""
    until = time.monotonic() + _JOIN_S
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in others:
        if not thread.daemon:
            thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() and not thread.daemon for thread in others):
        logging.getLogger(__name__).error("an executor did not stop; ending the process under it")
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code)
    raise SystemExit(code)
