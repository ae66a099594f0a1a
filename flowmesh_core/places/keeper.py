"""Start child processes such that everything they ever start can be found and ended. Linux only.

A script of its own, started by ``keeping.py``; it imports nothing of the project, so that it is up
in a moment and stays small. For each request the keeper forks a *minder*, which starts the child.
A minder is the subreaper of all below it: whatever a child starts stays below its minder, double
forks and sessions of their own included.

Requests come on descriptor 0: one byte each, with five descriptors. These are the child's *leash*,
a file with ``{"argv", "env", "cwd"}`` as JSON, and the child's control socket, stdout and stderr.
On the leash the minder says ``{"pid", "minder"}`` or ``{"error"}``, and ``{"exit", "left",
"left_alive"}`` when all has ended; it obeys the bytes ``T`` (SIGTERM to all), ``O`` (SIGKILL to
those that have lost their parent) and ``K`` (SIGKILL to all). The end of the leash or of the
keeper means ``K``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterable

CONTROL_FD = 3  # the control socket, in the child
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # Source: linux/prctl.h
OOM_PENALTY = 500
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05
LEAVE_MARGIN_S = 1.0

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process.

    Raises:
        OSError: The kernel refuses.
    """
    if libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def say(leash: int, **message: object) -> None:
    """Write one line to the worker, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(leash, json.dumps(message).encode() + b"\n")


def close_all(fds: Iterable[int]) -> None:
    """Close each descriptor."""
    for fd in fds:
        os.close(fd)


def child_bell() -> int:
    """Return a pipe's reading end that becomes readable whenever a child of this process ends."""
    bell, striker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(striker, warn_on_full_buffer=False)
    return bell


def wait_readable(*fds: int, limit_s: float | None = None) -> set[int]:
    """Wait until some can be read or have ended, and return those; none when time is over."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if limit_s is None else limit_s * 1000)}


def read_stat(pid: str) -> tuple[int, int, bool]:
    """Return parent and group of a process, 0 when it is gone, and whether it is no zombie.

    Source: proc_pid_stat(5); the name, in brackets, may itself hold blanks and brackets.
    """
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            state, parent, group = os.read(fd, 4096).rpartition(b")")[2].split(None, 3)[:3]
        finally:
            os.close(fd)
    except OSError:
        return 0, 0, False
    return int(parent), int(group), state not in {b"Z", b"X"}


def list_children() -> dict[int, dict[int, tuple[int, bool]]]:
    """Return group and liveness of every process on the machine, under its parent."""
    children: dict[int, dict[int, tuple[int, bool]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib loads slowly
        parent, group, lives = read_stat(name)
        children.setdefault(parent, {})[int(name)] = group, lives
    return children


def below(
    roots: Iterable[int], children: dict[int, dict[int, tuple[int, bool]]]
) -> dict[int, tuple[int, bool]]:
    """Return group and liveness of each descendant of these processes, given all children."""
    found: dict[int, tuple[int, bool]] = {}
    parents = list(roots)
    while parents:
        nearest = children.get(parents.pop(), {})
        parents += nearest
        found.update(nearest)
    return found


def send_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each; whoever is gone or may not be reached is passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap() -> tuple[dict[int, int], bool]:
    """Collect children that have ended: wait status by pid, and whether no child remains."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (entry := os.waitpid(-1, os.WNOHANG))[0]:
            ended[entry[0]] = entry[1]
        return ended, False
    return ended, True


def split_off(spare: Collection[int]) -> tuple[dict[int, tuple[int, bool]], set[int]]:
    """Return every descendant but spare and what is below those, and the groups of only such.

    Groups are negative, as ``kill`` takes them.
    """
    children = list_children()
    everyone = below([os.getpid()], children)
    kept = {*spare, *below(spare, children)}
    found = {pid: everyone[pid] for pid in everyone.keys() - kept}
    foreign = {os.getpgrp(), *(everyone[pid][0] for pid in everyone.keys() & kept)}
    return found, {-group for group, _ in found.values() if group not in foreign}


def end_below(
    patience_s: float, spare: Collection[int] = ()
) -> tuple[dict[int, int], set[int], set[int]]:
    """Kill every descendant, but for spare and what is below those.

    All are stopped before any is killed: a stopped process starts no other, and keeps its place
    where their number is limited. Whole groups are stopped as well, for those that start and end
    faster than they can be listed. It is over when the kernel knows of no child, or when a scan
    found nobody and nobody was reaped after it: whom a scan misses has just lost a parent, and
    that parent waits to be reaped.

    Returns:
        Wait status by pid of whoever was reaped, the pids that had to be killed, and those that
        still live after ``patience_s`` seconds.
    """
    statuses: dict[int, int] = {}
    stopped: set[int] = set()
    killed: set[int] = set()
    found: dict[int, tuple[int, bool]] | None = None
    pause_s, deadline = FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        ended, childless = reap()
        statuses.update(ended)
        if childless or (found == {} and not ended):
            return statuses, killed, set()
        found, groups = split_off(spare)
        living = {pid for pid, (_, lives) in found.items() if lives}
        if time.monotonic() > deadline:
            return statuses, killed - living, living
        if fresh := found.keys() - stopped:
            send_all({*fresh, *groups}, signal.SIGSTOP)
            stopped |= fresh
            continue
        killed.update(living)
        send_all(found, signal.SIGKILL)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def start(argv: list[str], env: dict[str, str], cwd: str, fds: Iterable[int]) -> int:
    """Fork and execute ``argv``, whose first item is a path; return the pid.

    Raises:
        OSError: The child could not be started; the text says what and why.
    """
    problem, report = os.pipe()
    minder = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            prepare(minder, cwd, fds)
            os.execve(argv[0], argv, env)  # noqa: S606 - no shell is meant
        except (OSError, ValueError) as exc:
            os.write(report, str(exc).encode())
        finally:
            os._exit(127)
    os.close(report)
    with open(problem, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor; ends at exec
        text = file.read()
    if text:
        raise OSError(f"cannot start {argv[0]!r}: {text}")
    return pid


def prepare(minder: int, cwd: str, fds: Iterable[int]) -> None:
    """Give this fork what the child is to find: session, signals, descriptors, folder."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != minder:
        os._exit(127)  # the minder ended before it could be watched
    os.setsid()
    with contextlib.suppress(OSError):  # the kernel may not let us choose
        score = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(score, b"%d" % min(int(os.pread(score, 16, 0)) + OOM_PENALTY, 1000), 0)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for fd, target in zip(fds, (CONTROL_FD, 1, 2), strict=True):  # every other one closes at exec
        os.dup2(fd, target)
    os.chdir(cwd)


def mind(leash: int, request: int, fds: list[int], keeper: int, patience_s: float) -> None:
    """Start one child, and stay until it and everything it started have ended.

    Args:
        leash: Stream to and from the worker.
        request: File that says what to start.
        fds: Control socket, stdout and stderr of the child.
        keeper: Pipe that ends with the keeper.
        patience_s: How long to wait for processes that do not die.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # a fork does not inherit it
    bell = child_bell()
    try:
        child = start(**json.loads(os.pread(request, os.fstat(request).st_size, 0)), fds=fds)
    except OSError as exc:
        say(leash, error=str(exc))
        return
    close_all((request, *fds))
    say(leash, pid=child, minder=os.getpid())
    status = watch(child, leash, bell, keeper, patience_s)
    statuses, killed, living = end_below(patience_s)
    if status is None:
        status = statuses.get(child)
    say(leash, exit=status, left=len(killed - {child}), left_alive=len(living))


def watch(child: int, leash: int, bell: int, keeper: int, patience_s: float) -> int | None:
    """Wait for the end of the child and return its wait status, or None when all must end."""
    while True:
        ready = wait_readable(leash, bell, keeper)
        if bell in ready:
            os.read(bell, 4096)
            ended, _ = reap()
            if child in ended:
                return ended[child]
        orders = read_orders(leash) if leash in ready else b""
        if keeper in ready or b"K" in orders:
            return None
        if b"T" in orders:
            send_all(below([os.getpid()], list_children()), signal.SIGTERM)
        if b"O" in orders and child in (ended := end_below(patience_s, spare=(child,))[0]):
            return ended[child]


def read_orders(leash: int) -> bytes:
    """Read what the worker wants; when it is gone, it wants all killed."""
    try:
        return os.read(leash, 4096) or b"K"
    except ConnectionError:
        return b"K"


def receive(requests: socket.socket) -> list[int] | None:
    """Return the descriptors of the next request, or None when the worker is gone."""
    room = socket.CMSG_SPACE(5 * 4)
    try:
        byte, ancillary, _, _ = requests.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    return [fd for _, _, data in ancillary for fd in memoryview(data).cast("i")] if byte else None


def fork_for(received: list[int]) -> int:
    """Fork; raise OSError when there are too many processes, or open files for the request."""
    if len(received) < 5:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return os.fork()


def keep(requests: socket.socket, patience_s: float) -> None:
    """Serve requests until the worker is gone; returns in the keeper, and in each minder too."""
    keeper, lifeline = os.pipe()
    bell = child_bell()
    minders: dict[int, int] = {}  # leash by pid
    while True:
        ready = wait_readable(requests.fileno(), bell)
        if bell in ready:
            os.read(bell, 4096)
            settle(minders, patience_s)
        if requests.fileno() not in ready:
            continue
        received = receive(requests)
        if received is None:
            leave(minders, bell, patience_s)
            return
        try:
            pid = fork_for(received)
        except OSError as exc:
            for leash in received[:1]:
                say(leash, error=f"the keeper cannot start a process: {exc}")
            close_all(received)
            continue
        leash, request, *fds = received
        if pid == 0:
            requests.close()
            close_all((lifeline, *minders.values()))  # others wait for the end of these
            mind(leash, request, fds, keeper, patience_s)
            return
        minders[pid] = leash
        close_all((request, *fds))


def settle(minders: dict[int, int], patience_s: float) -> None:
    """Reap minders, and end whatever is left of those that were killed.

    The keeper holds each leash until then: when the worker sees it end, nothing is left.
    """
    ended, _ = reap()
    if any(status != 0 or pid not in minders for pid, status in ended.items()):
        ended.update(end_below(patience_s, spare=minders)[0])
    close_all([minders.pop(pid) for pid in ended if pid in minders])


def leave(minders: dict[int, int], bell: int, patience_s: float) -> None:
    """See that the minders end what is theirs, for they lost the worker as well, and then the rest.

    Minders are not stopped and killed like others: a keeper that was killed over it would leave
    one that is stopped for good.
    """
    deadline = time.monotonic() + patience_s + LEAVE_MARGIN_S
    while minders and (limit_s := deadline - time.monotonic()) > 0:
        if wait_readable(bell, limit_s=limit_s):
            os.read(bell, 4096)
            settle(minders, patience_s)
    end_below(patience_s)


def main() -> None:
    """Keep children for the worker at the other end of descriptor 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.chdir("/")
    requests = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, CONTROL_FD):  # taken for good, so that no descriptor gets a number of the child's
        os.dup2(null, fd)
    gc.freeze()
    keep(requests, patience_s=float(sys.argv[1]))


if __name__ == "__main__":
    main()
