"""Why an executor's process ended without an answer, as far as can be told from outside.

==================================  ====================  ==============================
how it ended                        retriable             because
==================================  ====================  ==============================
over the memory it was allowed      no                    it will ask for as much again
killed by the kernel, no memory     yes                   others needed memory as well
its last words: out of memory       yes                   so may a GPU's other users have
SIGKILL for no known reason         yes                   somebody outside meant it
SIGILL, SIGFPE, SIGSYS              no                    the program is built that way
SIGXCPU, SIGXFSZ                    no                    the same limit stands next time
other signals (SIGSEGV, SIGABRT,    yes                   drivers, devices and peers fail,
SIGBUS, SIGTERM)                                          and threads race
exit code other than 0              yes                   libraries exit when a device or
                                                          peer fails; a task's own faults
                                                          come as exceptions
exit code 0                         no                    the program took itself as done
==================================  ====================  ==============================
"""

from __future__ import annotations

import errno
import re
import signal as signals
from collections.abc import Callable

from flowmesh_core.errors import CrashError
from flowmesh_core.places.memory import Watch, count_oom_kills

__all__ = ["OomKills", "explain_exit", "is_out_of_memory"]

_GIB = 1 << 30
_NEARLY_ALL = 0.95
_LINE_CHARS = 300
_FINAL = {"SIGILL", "SIGFPE", "SIGSYS", "SIGXCPU", "SIGXFSZ"}

# As torch, vLLM, llama.cpp, JAX, CUDA, ROCm, C++, Rust, Go and the C library word it. "Out of
# memory" must end its clause: advice on "CUDA out of memory errors" is none.
_OUT_OF_MEMORY = re.compile(
    r"""
    (?:cuda|hip|xpu|mps|gpu|error|fail(?:ed|ure)|fatal|runtime|resource.exhausted)(?:\ backend)?
        [\s:'"()\d-]{1,12} out\ of\ memory
        (?=\s*$ | [.:;!?'")] | \ (?:\(|at|occurred|while|allocating|trying))
    | (?:cuda|hip)Error(?:MemoryAllocation|OutOfMemory) | _ERROR_OUT_OF_MEMORY
    | ErrorOutOf(?:Device|Host)Memory | _STATUS_ALLOC_FAILED | rocblas_status_memory_error
    | resource.exhausted:\ failed\ to\ allocate | \bOOM\ when\ allocating
    | MemoryError(?=[:(]|\s*$) | \bbad_alloc\b
    | cannot\ allocate\ memory (?!\ in\ static\ TLS)
    | CPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | unable\ to\ allocate\ [\d.]+\ \w+\ for\ an\ array
    | memory\ allocation\ of\ \d+\ bytes\ failed
    | (?:failed|unable)\ to\ allocate\ (?:\w+\ ){0,2}buffers?\b
    | insufficient\ memory\ \(attempted\ to\ allocate
    | no\ available\ memory\ for\ the\ cache\ blocks
    | free\ memory\ on\ device\b [^\n]* \bless\ than\ desired\ GPU\ memory
    | larger\ than\ the\ (?:available\ KV\ cache\ memory
        | maximum\ number\ of\ tokens\ that\ can\ be\ stored\ in\ KV\ cache)
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_REASON = re.compile(
    r"error|exception|fatal|fail|abort|assert|terminate called|panic|killed|corrupt|cannot|can't",
    re.IGNORECASE,
)
_INVISIBLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f]")


class OomKills:
    """Counts what the kernel kills in this control group for want of memory, from now on.

    Args:
        count: Returns how many there were ever, or None where the kernel does not say.
    """

    def __init__(self, count: Callable[[], int | None] = count_oom_kills) -> None:
        self._count = count
        self._before = count() or 0

    def since(self) -> int:
        """Return how many were killed since; 0 also where the kernel does not say."""
        return max(0, (self._count() or 0) - self._before)


def is_out_of_memory(trouble: BaseException | str) -> bool:
    """Tell whether an exception, or what a process printed, says that memory ran out.

    Memory of the machine or of a GPU; shared memory and disks are none. An exception's cause,
    and that one's, count as well.
    """
    if isinstance(trouble, str):
        return _OUT_OF_MEMORY.search(trouble) is not None
    if isinstance(trouble, MemoryError):
        return True
    if isinstance(trouble, OSError) and trouble.errno == errno.ENOMEM:
        return True
    if _OUT_OF_MEMORY.search(f"{type(trouble).__name__}: {trouble}"):
        return True
    return trouble.__cause__ is not None and is_out_of_memory(trouble.__cause__)


def explain_exit(
    *,
    what: str,
    code: int | None = None,
    signal: str | None = None,
    output_tail: str = "",
    watch: Watch | None = None,
    machine_limit_bytes: int | None = None,
    oom_kills: int = 0,
) -> CrashError:
    """Find out why a process ended before it had answered.

    Args:
        what: Begins the message: ``executor 'vllm'``.
        code: Its exit code, when it exited.
        signal: Name of the signal that ended it: ``SIGKILL``.
        output_tail: The end of what it printed for this task. A line of it goes into the
            message, with whatever secrets it holds.
        watch: The memory of its tree.
        machine_limit_bytes: What all processes here may use together.
        oom_kills: What ``OomKills`` counted since it started.

    Returns:
        The error, to be raised by the caller.
    """
    over_limit = watch is not None and watch.exceeded
    shortage = _limit_shortage(watch) or _kernel_shortage(
        code, signal, watch, machine_limit_bytes, oom_kills
    )
    if not shortage and is_out_of_memory(output_tail):
        shortage = "its output says so"
    cause = f", out of memory: {shortage}" if shortage else ""
    if signal == "SIGKILL" and not cause:
        cause = ", cause unknown"
    words = _last_words(output_tail)
    may_pass = signal not in _FINAL if signal else code != 0
    return CrashError(
        f"{what} {_describe_end(code, signal)}{cause}" + (f": {words}" if words else ""),
        exit_code=code,
        signal=signal,
        oom=bool(shortage),
        retriable=not over_limit and (bool(shortage) or may_pass),
    )


def _describe_end(code: int | None, signal: str | None) -> str:
    if signal is None:
        return f"ended with exit code {code}" if code else "ended without an answer"
    number = signals.Signals.__members__.get(signal)
    words = number and signals.strsignal(number)
    return f"was ended by {signal} ({words.lower()})" if words else f"was ended by {signal}"


def _limit_shortage(watch: Watch | None) -> str:
    if watch is None or not watch.exceeded or watch.limit_bytes is None:
        return ""
    return (
        f"{_gib(watch.last_bytes)} in use, {_gib(watch.limit_bytes)} allowed; "
        "raise spec.resources.hardware.memory"
    )


def _kernel_shortage(
    code: int | None,
    signal: str | None,
    watch: Watch | None,
    machine_limit_bytes: int | None,
    oom_kills: int,
) -> str:
    """Say what speaks for the kernel having ended it, or a process on which it depended."""
    # Whose helper was killed mostly exits by itself, with an error.
    if oom_kills and (signal == "SIGKILL" or code):
        return f"the kernel killed {oom_kills} in its control group meanwhile"
    if watch is None or signal != "SIGKILL":
        return ""
    limits = [size for size in (watch.limit_bytes, machine_limit_bytes) if size is not None]
    if not limits or watch.last_bytes <= _NEARLY_ALL * min(limits):
        return ""
    return f"{_gib(watch.last_bytes)} of {_gib(min(limits))} in use when last measured"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.2f} GiB"


def _last_words(output: str) -> str:
    """Return the line that says most likely why, the last about memory or else about an error."""
    lines = [_INVISIBLE.sub("", line).strip() for line in output.splitlines()]
    for pattern in (_OUT_OF_MEMORY, _REASON):
        found = next((line for line in reversed(lines) if pattern.search(line)), "")
        if found:
            return found if len(found) <= _LINE_CHARS else found[: _LINE_CHARS - 1] + "…"
    return ""
