"""Find out which rank failed first, and say what became of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowmesh_core import CancelledError, CrashError, FlowmeshError

__all__ = ["explain"]

_TAIL_LINES = 30
_TAIL_BYTES = 16_384
# What torchrun, or a collective that lost its peer, does to ranks that had not failed.
_COLLATERAL = {"SIGTERM", "SIGABRT", "SIGPIPE"}
_LASTING = {"SIGILL", "SIGFPE", "SIGSYS"}


def explain(
    folder: Path, processes: int, *, agent_code: int, say: Callable[[str], None]
) -> FlowmeshError:
    """Return the error of the rank that failed first.

    That is one that ended without a word, since who loses a peer raises an error; else the one
    whose error came first.

    Args:
        folder: The attempt's folder.
        processes: How many ranks there were.
        agent_code: Exit code of the process that ran torchrun.
        say: Gets the end of the log of a rank but 0, whose log is known already.
    """
    exits = {int(rank): code for rank, code in _read(folder / ".launch/failures.json").items()}
    errors = {
        rank: found
        for rank in range(processes)
        if (found := _read(folder / f".launch/rank-{rank}.error.json"))
    }
    silent = [rank for rank in sorted(exits) if rank not in errors]
    crashed = [rank for rank in silent if _signal_name(exits[rank]) not in _COLLATERAL]
    earliest = sorted(errors, key=lambda rank: float(errors[rank]["at"]))
    candidates = (*crashed, *earliest, *silent)
    if not candidates:
        return _crash("torchrun", agent_code, _read_tail(folder / "logs/launcher.log"))
    rank = candidates[0]
    tail = _read_tail(folder / "logs" / f"rank-{rank}.log")
    tail = tail or _read_tail(folder / "logs/launcher.log")  # it had not come so far
    if rank != 0 and tail:
        say(f"the end of logs/rank-{rank}.log:\n{tail}")
    if rank in errors:
        return _rebuild(errors[rank]["error"], f"rank {rank} of {processes}")
    return _crash(f"rank {rank} of {processes}", exits[rank], tail)


def _rebuild(data: Mapping[str, Any], who: str) -> FlowmeshError:
    error = FlowmeshError.from_dict(data)
    if not isinstance(error, CancelledError):  # all of them were
        error.args = (f"{who}: {error}",)
    return error


def _crash(who: str, code: int, tail: str) -> CrashError:
    name = _signal_name(code)
    how = f"was ended by {name}" if name else f"exited with code {code}"
    how = how if code else "ended without a summary"
    words = tail.rpartition("\n")[2]
    return CrashError(
        f"{who} {how}" + (f"; the end of its log: {words}" if words else ""),
        exit_code=None if name else code,
        signal=name,
        oom="out of memory" in tail.lower(),
        retriable=name not in _LASTING,
    )


def _signal_name(code: int) -> str | None:
    return signal.Signals(-code).name if code < 0 else None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _read_tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return "\n".join(lines[-_TAIL_LINES:]).strip()
