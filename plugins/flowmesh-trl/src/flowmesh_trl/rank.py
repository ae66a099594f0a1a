"""``python -m flowmesh_trl.rank``: one of the processes that train together.

Arguments: the folder that ``launch`` made, which holds ``job.json``, and ``--target
module:function`` for another training function than ``flowmesh_trl.training:train``. It is called
with the job and a link, and returns the summary as JSON data. Standard input is the lifeline: when
it ends or says anything, this process and what it started end at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core import CancelledError, CrashError, ExecutionError, FlowmeshError
from flowmesh_trl.job import Link, TrainingJob

__all__ = ["TRAIN", "hold_lifeline", "main"]

TRAIN = "flowmesh_trl.training:train"
_OUT_OF_MEMORY = re.compile(r"out of ?memory|can't allocate memory", re.IGNORECASE)


def main(argv: Sequence[str]) -> None:
    """Train as one rank; write summary or error. A failure ends the process."""
    parser = argparse.ArgumentParser(prog="flowmesh_trl.rank")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default=TRAIN)
    options = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))  # noqa: TID251 - torchrun says it no other way
    try:
        _run(options.folder, options.target, rank)
    except BaseException as exc:  # noqa: BLE001 - executor boundary, of another process
        failed_at = time.monotonic()  # before the traceback, which may take a while
        traceback.print_exc()
        _write_error(options.folder / f"rank-{rank}.error.json", exc, failed_at)
        sys.stdout.flush()
        # Not for a cancelled rank: torchrun would end the others, which may still be saving.
        # Threads of a broken collective would hold up a regular exit.
        os._exit(0 if isinstance(exc, CancelledError) else 1)


def _run(folder: Path, target: str, rank: int) -> None:
    job = TrainingJob.from_dict(json.loads((folder / "job.json").read_bytes()))
    _print_to(job.folder / "logs" / f"rank-{rank}.log")
    threading.Thread(target=hold_lifeline, name="lifeline", daemon=True).start()
    module, _, name = target.partition(":")
    train: Callable[[TrainingJob, Link], Any] = getattr(importlib.import_module(module), name)
    summary = train(job, _build_link(folder, rank))
    if rank == 0:
        _say(folder, summary=summary)
    _leave_group()


def _print_to(log: Path) -> None:
    """Send all output there, that of C and of child processes included."""
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable()


def hold_lifeline() -> None:
    """Kill this process's group, torchrun's or one rank's, when standard input ends or speaks."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _build_link(folder: Path, rank: int) -> Link:
    stop = str(folder / "stop")
    must_stop = functools.partial(os.path.exists, stop)
    if rank != 0:
        return Link(say=_print_line, must_stop=must_stop)
    return Link(
        report=lambda **values: _say(folder, progress=values),
        say=lambda line: _say(folder, log=line),
        must_stop=must_stop,
    )


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _say(folder: Path, **message: Any) -> None:
    """Tell the launcher: one line of ``reports.jsonl``."""
    line = json.dumps(message, default=_plain)
    with (folder / "reports.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _plain(value: Any) -> Any:
    """Return the number of a scalar of NumPy or torch, else the text of a value."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):  # the latter two: several elements
        return str(value)


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _write_error(path: Path, exc: BaseException, failed_at: float) -> None:
    error = exc if isinstance(exc, FlowmeshError) else _as_error(exc)
    passing = path.with_suffix(".new")
    passing.write_text(json.dumps({"at": failed_at, "error": error.to_dict()}))
    passing.replace(path)


def _as_error(exc: BaseException) -> FlowmeshError:
    text = f"{type(exc).__name__}: {exc}"
    if isinstance(exc, MemoryError) or _OUT_OF_MEMORY.search(text):
        return CrashError(text, oom=True)
    return ExecutionError(text, retriable=isinstance(exc, OSError))


if __name__ == "__main__":
    main(sys.argv[1:])
