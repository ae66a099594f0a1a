"""Run a program that reaches only what it is given, and end all that it started. Linux only.

A script of its own, started by ``sandbox.py`` as ``python -I -S jail.py NAME=VALUE... -- PROGRAM``;
it imports nothing of the project, so that it is up in a moment. It becomes the *minder* of the
program: it ends everything below it when the program ends, when time is over or a limit passed,
on SIGTERM, and when the other end of its *leash*, a pipe or socket, is closed.

What holds the program: Landlock (files, signals to others), the seccomp filter that it is given,
limits, no privileges, and a user and a PID namespace where the kernel allows these.
Source: Documentation/userspace-api/landlock.rst, seccomp(2), user_namespaces(7), capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
import sys
import time
import warnings  # noqa: F401 - execvp imports it, when nothing can be read any more
from collections.abc import Callable, Iterable

# Source: linux/prctl.h, linux/securebits.h, linux/sched.h, linux/landlock.h
PDEATHSIG, SET_SECCOMP, CAPBSET_READ, SECUREBITS, SUBREAPER, NO_NEW_PRIVS = 1, 22, 23, 28, 36, 38
AMBIENT, CLEAR_ALL = 47, 4
NO_ROOT, NO_ROOT_LOCKED, FILTER, CAPABILITIES = 1, 2, 2, 41
NEW_USER, NEW_PID = 0x10000000, 0x20000000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RIGHTS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}  # how many each version of Landlock knows; then 16
READ = 1 | 1 << 2 | 1 << 3  # execute and read files, list folders
# Devices, sockets and links are left out: a link could lead somebody else astray.
WRITE = READ | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 13 | 1 << 14
OF_FILES = 1 | 1 << 1 | 1 << 2 | 1 << 14
TCP, SIGNALS_AND_SOCKETS = 3, 3
FOREMOST = -20
LOOK_S, GLANCE_S, PATIENCE_S = 0.1, 0.02, 5.0
NONE = float("inf")  # where there is no limit
AT_ONCE = 100
LOOKS_SHARE = 20  # of the minder's time at most a twentieth goes into looking
UNMAPPED = 65534

libc = ctypes.CDLL(None, use_errno=True)


class Rules(dict[str, list[str]]):
    """What the command line says: each name with its values."""

    def number(self, name: str, default: float = 0) -> float:
        """Return a name's only value."""
        return float(self[name][0]) if name in self else default


class Hold:
    """What holds a program, as far as this machine allows."""

    def __init__(self, latest_landlock: int) -> None:
        try:
            version = syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
        except OSError:
            version = 0
        self.landlock = min(version, latest_landlock)
        self.namespaces = self.filtered = False

    @property
    def signals(self) -> bool:
        """Whether nobody below the minder can send a signal to anybody else, nor can the minder."""
        return self.namespaces or self.landlock >= 6

    def missing(self) -> list[str]:
        """Return what a strict jail needs and this one lacks; truncating is held from 3 on."""
        found = {
            "Landlock (version 3 or later)": self.landlock >= 3,
            "Landlock (version 6 or later) or PID namespaces": self.signals,
            "seccomp": self.filtered,
        }
        return [name for name, present in found.items() if not present]


def check(result: int) -> int:
    """Return what a call gave, or raise the error that it left behind."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def syscall(number: int, *arguments: object) -> int:
    """Call what the C library has no name for."""
    return check(int(libc.syscall(ctypes.c_long(number), *arguments)))


def prctl(option: int, first: int, second: object = None) -> int:
    """Get or set an attribute of this process."""
    zero = ctypes.c_ulong(0)
    return check(int(libc.prctl(option, ctypes.c_ulong(first), second, zero, zero)))


def enter_namespaces() -> None:
    """Go on as the first process of new namespaces, while this one waits for it.

    Nothing in them outlives that first process, whoever ends it.

    Raises:
        OSError: It is not allowed here.
    """
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(NEW_USER | NEW_PID))
    for name, text in (
        ("uid_map", f"{user or UNMAPPED} {user} 1"),  # never root, not even of its own world
        ("setgroups", "deny"),
        ("gid_map", f"{group or UNMAPPED} {group} 1"),
    ):
        write(f"/proc/self/{name}", text)
    first = os.fork()
    if first:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: os.kill(first, signal.SIGKILL))
        leave(os.waitpid(first, 0)[1])
    prctl(PDEATHSIG, signal.SIGKILL)


def attempt(call: Callable[..., object], *arguments: object) -> None:
    """Do it if it can be done: whoever it is for may be gone."""
    try:  # noqa: SIM105 - contextlib loads slowly
        call(*arguments)
    except OSError:
        pass


def write(path: str, text: str) -> None:
    """Write to a file of the kernel."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def leave(status: int) -> None:
    """Exit as a shell does for a program with this wait status."""
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def restrict(
    version: int, files: int = 0, tcp: int = 0, grants: Iterable[tuple[str, int]] = ()
) -> None:
    """Give up these rights but for those granted to paths, and from version 6 on signals."""
    scoped = SIGNALS_AND_SOCKETS if version >= 6 else 0
    attributes = struct.pack("QQQ", files, tcp if version >= 4 else 0, scoped)
    size = ctypes.c_size_t(len(attributes))
    ruleset = ctypes.c_int(syscall(CREATE_RULESET, attributes, size, ctypes.c_uint32(0)))
    for path, rights in grants:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        granted = rights & files & (-1 if os.path.isdir(path) else OF_FILES)  # noqa: PTH112
        rule = struct.pack("=Qi", granted, place)
        syscall(ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(place)
    syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset.value)


def scope(hold: Hold) -> None:
    """See to it that signals of the minder reach nobody but those below it.

    Raises:
        OSError: They would, though the kernel says that they do not.
    """
    prctl(NO_NEW_PRIVS, 1)
    if hold.landlock >= 6:
        restrict(hold.landlock)
        try:
            os.kill(os.getppid() or 1, 0)  # 1 is oneself, in a namespace
        except PermissionError:
            return
        if not hold.namespaces:
            raise OSError("signals leave the Landlock domain")


def limit(rules: Rules) -> None:
    """Limit what this process takes of the machine, and what it may do as root."""
    for kind, name in (
        (resource.RLIMIT_AS, "address_space"),
        (resource.RLIMIT_FSIZE, "file"),
        (resource.RLIMIT_NOFILE, "descriptors"),
    ):
        if name in rules:
            resource.setrlimit(kind, (int(rules.number(name)),) * 2)
    if "cpu" in rules:  # first SIGXCPU, which tells why
        seconds = int(rules.number("cpu"))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.setpriority(os.PRIO_PROCESS, 0, int(rules.number("nice")))
    attempt(write, "/proc/self/oom_score_adj", "1000")  # ends before the worker when memory does
    prctl(AMBIENT, CLEAR_ALL, ctypes.c_ulong(0))
    if os.geteuid() == 0 and any(
        libc.prctl(CAPBSET_READ, n, 0, 0, 0) == 1 for n in range(CAPABILITIES)
    ):
        prctl(SECUREBITS, NO_ROOT | NO_ROOT_LOCKED)  # what root starts then has no privileges


def confine(rules: Rules, hold: Hold) -> None:
    """Hold this process as the rules say; what the kernel lacks is left out unless strict.

    Raises:
        OSError: Something cannot be done, or a strict jail lacks something.
    """
    if "write" in rules and hold.landlock:
        grants = [(path, READ) for path in rules.get("read", ()) if os.path.exists(path)]  # noqa: PTH110
        grants += [(path, WRITE) for path in rules["write"]]
        tcp = 0 if rules.number("network") else TCP
        restrict(hold.landlock, (1 << RIGHTS.get(hold.landlock, 16)) - 1, tcp, grants)
    if "filter" in rules:
        code = bytes.fromhex(rules["filter"][0])
        program = struct.pack("HxxxxxxQ", len(code) // 8, address(code))
        hold.filtered = libc.prctl(SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0) == 0
    if rules.number("strict") and (missing := hold.missing()):
        raise OSError(f"this kernel lacks {', '.join(missing)}")


def address(code: bytes) -> int:
    """Return where in memory these bytes lie, as long as they are held."""
    return ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value or 0


def start(argv: list[str], rules: Rules, hold: Hold) -> tuple[int, str]:
    """Start the program; return its pid and what holds it.

    Raises:
        OSError: It cannot be started, or not under these rules.
    """
    problem, report = os.pipe()
    minder = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            prctl(PDEATHSIG, signal.SIGKILL)
            if os.getppid() != minder:
                os._exit(127)  # the minder ended before it could be watched
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
                signal.signal(number, signal.SIG_DFL)
            limit(rules)
            confine(rules, hold)
            held = (hold.landlock, hold.namespaces, hold.filtered)
            os.write(report, " ".join(f"{part:d}" for part in held).encode())
            os.execvp(argv[0], argv)  # noqa: S606 - no shell is meant
        except (OSError, ValueError) as exc:
            os.write(report, f"\n{exc}".encode())
        finally:
            os._exit(127)
    os.close(report)
    with open(problem, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor; ends at exec
        told, failed, why = file.read().partition("\n")
    if failed:
        raise OSError(f"cannot start {argv[0]!r}: {why}")
    return pid, told


def bell() -> int:
    """Return a pipe that gives the number of each signal that this process gets."""
    ring, striker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(striker, warn_on_full_buffer=False)
    return ring


def reap(statuses: dict[int, int]) -> bool:
    """Collect some of who has ended, and return whether anybody is left.

    Not all: processes can end as fast as they are collected.
    """
    try:
        for _ in range(AT_ONCE):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            statuses[pid] = status
    except ChildProcessError:
        return False
    return True


def watch(program: int, rules: Rules, ring: int, statuses: dict[int, int]) -> str:
    """Wait until all must end, and return why: "" when the program has ended by itself."""
    poll = select.poll()
    poll.register(ring, select.POLLIN)
    leash = int(rules.number("leash"))
    poll.register(leash, 0)  # tells of its end alone
    now, crowd = time.monotonic(), crowding()
    deadline, why, look = now + rules.number("seconds", NONE), "time", now + LOOK_S
    while now < deadline:
        for fd, _ in poll.poll(max(0, min(deadline, look, now + GLANCE_S) - now) * 1000):
            if fd == leash:
                poll.unregister(leash)
                deadline, why = time.monotonic() + rules.number("grace"), "leash"
            elif set(os.read(ring, 4096)) != {signal.SIGCHLD}:
                return "signal"
        reap(statuses)
        if program in statuses:
            return ""
        now, threads = time.monotonic(), crowding()
        crowd = min(crowd, threads)  # what ends elsewhere must hide nobody
        if now >= look or threads - crowd > rules.number("processes", NONE):
            crowd, spent = threads, time.process_time()  # who comes during a look is not in it
            if excess := over_limit(rules):
                return excess
            look = now + max(LOOK_S, LOOKS_SHARE * (time.process_time() - spent))
    return why


def crowding() -> int:
    """Return how many threads the machine has: a glance that shows whether it is time to look."""
    with open("/proc/loadavg", "rb") as file:  # noqa: PTH123 - pathlib loads slowly
        return int(file.read().split()[3].partition(b"/")[2])


def below() -> dict[int, int]:
    """Return how many pages each process below this one holds, by its pid.

    These pids are those of /proc, not of a namespace of one's own.
    Source: proc_pid_stat(5); the name, in brackets, may itself hold blanks and brackets.
    """
    children: dict[int, dict[int, int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib loads slowly
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - likewise
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), {})[int(name)] = int(fields[21])
    pages: dict[int, int] = {}
    parents = [int(os.readlink("/proc/self"))]  # noqa: PTH115 - likewise
    while parents:
        nearest = children.get(parents.pop(), {})
        pages.update(nearest)
        parents += nearest
    return pages


def taken(folder: str, entries_max: float) -> float:
    """Return how many bytes of disk the files of a folder take; infinite for too many entries."""
    size, count, folders = 0, 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if count > entries_max:
                        return NONE
        except OSError:
            continue  # gone by now
    return size


def over_limit(rules: Rules) -> str:
    """Return which limit all of them together have passed, or ""."""
    pages = below()
    if len(pages) > rules.number("processes", NONE):
        return "processes"
    if sum(pages.values()) * resource.getpagesize() > rules.number("memory", NONE):
        return "memory"
    disk = taken(rules["folder"][0], rules.number("entries")) if "disk" in rules else 0
    return "disk" if disk > rules.number("disk") else ""


def end_all(hold: Hold, statuses: dict[int, int]) -> None:
    """Kill everybody below this process, and wait for them."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        # One call reaches all of them at once, forks under way included: signals end at the domain
        # or namespace. Without these, whom a list misses is on the next one.
        for pid in [-1] if hold.signals else below():
            attempt(os.kill, pid, signal.SIGKILL)
        if not reap(statuses):
            return
        time.sleep(0.001)


def main() -> None:
    """Run what the command line says, and tell on ``report`` how it ended."""
    end = sys.argv.index("--")
    rules = Rules()
    for word in sys.argv[1:end]:
        name, _, value = word.partition("=")
        rules.setdefault(name, []).append(value)
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib loads slowly
        if int(fd) > 2:
            attempt(os.set_inheritable, int(fd), False)
    # However many there are, the minder has its turn; nobody but root's may come first.
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    rules["nice"] = [str(usual + int(rules.number("nice")))]
    attempt(os.setpriority, os.PRIO_PROCESS, 0, FOREMOST)
    statuses: dict[int, int] = {}
    status = 127 << 8
    try:
        hold = Hold(int(rules.number("landlock", 99)))
        if rules.number("namespaces"):
            enter_namespaces()
            hold.namespaces = True
        ring = bell()
        scope(hold)
        prctl(SUBREAPER, 1)
        program, held = start(sys.argv[end + 1 :], rules, hold)
        why = watch(program, rules, ring, statuses)
        end_all(hold, statuses)
        status = statuses.get(program, signal.SIGKILL)
        told = f"{status} {held} {why}"
    except OSError as exc:
        told = f"error {exc}"
    tell(rules, told)
    leave(status)


def tell(rules: Rules, text: str) -> None:
    """Say how it ended to who asked, who may be gone; to others only that it could not begin."""
    if "report" in rules:
        attempt(os.write, int(rules.number("report")), text.encode())
    elif text.startswith("error"):
        attempt(os.write, 2, f"{text}\n".encode())


if __name__ == "__main__":
    main()
