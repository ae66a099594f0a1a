"""A call in a Python of its own, which may raise, crash or hang there: how it ended, and where."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import attrs

from flowmesh_core.errors import PluginError
from flowmesh_core.places.environments import end_group
from flowmesh_core.time_limit import locate

__all__ = ["Trial", "try_call"]

_SPARE_S = 20.0  # for the interpreter to start, before its own clock does
_NOISE_BYTES = 16_384
# The answer goes to a copy of standard output, so that nothing that is printed stands in it.
_CODE = """
import faulthandler, json, os, sys
sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
asked = json.load(sys.stdin)
sys.path[:] = asked["path"] or sys.path
from flowmesh_core.importing import import_target
call = import_target(asked["target"])
faulthandler.enable()
faulthandler.dump_traceback_later(asked["limit_s"], exit=True)
answer = call(**asked["arguments"])
json.dump(answer, sink)
sink.flush()
os._exit(0)
"""
_TIMEOUT = re.compile(r"^Timeout \(\d+:\d\d:\d\d", re.MULTILINE)
_OURS = re.compile(r"^flowmesh_core\.errors\.\w+: ")
_MACHINERY = re.compile(
    r'^  File "(<frozen |<string>|.*/importlib/|.*/flowmesh_core/).*\n?', re.MULTILINE
)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)


@attrs.frozen(kw_only=True)
class Trial:
    """How a call ended.

    Attributes:
        answer: What it returned; None when it did not.
        problem: How it ended instead, in one line; empty when it returned.
        hung: Whether it ended because its time was over.
        output: The end of what it printed, with the traceback if there is one.
    """

    answer: Any = None
    problem: str = ""
    hung: bool = False
    output: str = ""


def try_call(
    target: str,
    arguments: Mapping[str, Any],
    *,
    limit_s: float,
    environ: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> Trial:
    """Call ``package.module:function`` of the core in a fresh process and wait for it.

    Args:
        target: Light to import; what may hang is the call.
        arguments: JSON data, by name; so is the answer.
        limit_s: How long the call may take.
        environ: Of the process; this one's by default.
        python: Interpreter of another environment, which has a core of its own.
    """
    path = None if python else sys.path
    command = [str(python), "-I"] if python else [sys.executable]
    asked = {"target": target, "arguments": arguments, "limit_s": limit_s, "path": path}
    # Files, not pipes: what is left running may hold a pipe open for ever.
    with TemporaryFile() as question, TemporaryFile() as answer, TemporaryFile() as noise:
        question.write(json.dumps(asked).encode())
        question.seek(0)
        files = {"stdin": question, "stdout": answer, "stderr": noise}
        status = _run([*command, "-c", _CODE], limit_s + _SPARE_S, env=environ, **files)
        output = _end_of(noise)
        if status == 0:
            answer.seek(0)
            return Trial(answer=json.load(answer), output=output)
    hung = status is None or bool(_TIMEOUT.search(output))
    if hung:
        output = _MACHINERY.sub("", output).rstrip()
        return Trial(problem=_where(output, limit_s), hung=True, output=output)
    return Trial(problem=_how(status or 0, output), output=output)


def _run(command: Sequence[str], limit_s: float, **options: Any) -> int | None:
    """Return the exit status; None when it had to be killed."""
    try:
        process = subprocess.Popen(command, start_new_session=True, **options)  # noqa: S603
    except OSError as exc:
        raise PluginError(f"{command[0]} cannot be started: {exc.strerror}") from exc
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def _end_of(noise: IO[bytes]) -> str:
    size = noise.seek(0, 2)
    noise.seek(max(0, size - _NOISE_BYTES))
    return noise.read().decode(errors="replace").strip()


def _where(output: str, limit_s: float) -> str:
    return f"hangs: it did not end within {limit_s:g} s{locate(_FRAME.findall(output))}"


def _how(status: int, output: str) -> str:
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    last = _OURS.sub("", output.splitlines()[-1]) if output else "it said nothing"
    return last if status == 1 else f"its process ended with exit code {status}: {last}"
