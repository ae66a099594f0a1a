"""Runs programs in a jail: the item's folder, a clean environment, limits, no network.

``jail.py`` holds them; here is what they are given, and how the engine's loop waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import attrs

from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.syscalls import MACHINES, build_filter
from flowmesh_core import ExecutionError, ExecutorUnavailableError

__all__ = ["FOLDER_FILES", "Finished", "Sandbox", "Strength", "probe"]

FOLDER_FILES = 8
"""How many of the longest files that are allowed a whole folder may take."""

_JAIL = Path(__file__).with_name("jail.py")
_MINDER = (sys.executable, "-I", "-S", str(_JAIL))
_KEPT_BYTES = 256 * 1024  # of each of a program's two outputs
_PATIENCE_S = 2.0
_GRACE_S = 1.0  # for a server to end by itself once its input has ended
_DESCRIPTORS = 1024
_NICE = 10
_ENTRIES = 20_000  # of a folder
_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"),
    *("/etc/ssl", "/dev/zero", "/dev/random", "/dev/urandom"),
)
_RESOLVER = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ca-certificates")
_WRITABLE = ("/dev/null",)
_SCRATCH = ".tmp"
_ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",  # what was written before it was ended is kept
    "OMP_NUM_THREADS": "4",  # libraries else start one for each processor
}


@attrs.frozen(kw_only=True)
class Finished:
    """How a program ended, when nothing of it is left.

    Attributes:
        exit: Its exit status, or None when a signal ended it.
        signal: The name of that signal, or "".
        stopped: The limit over which it was ended: ``time``, ``memory``, ``processes``, ``disk``;
            or "".
        stdout: What it wrote, its middle left out where that is long.
        stderr: Likewise.
        seconds: From start to end.
    """

    exit: int | None
    signal: str
    stopped: str
    stdout: str
    stderr: str
    seconds: float


@attrs.frozen(kw_only=True)
class Strength:
    """What this machine can hold a program with.

    Attributes:
        level: ``strong`` is what a strict sandbox needs, ``weak`` only limits.
        landlock: Its version, 0 for none.
        namespaces: Whether users may make them.
        seccomp: Whether system calls are filtered.
        problem: What is missing, or "".
    """

    level: Literal["strong", "weak", "none"]
    landlock: int = 0
    namespaces: bool = False
    seccomp: bool = False
    problem: str = ""


@functools.cache
def probe() -> Strength:
    """Return what this machine can hold a program with, by trying it once."""
    problem = ""
    for strict, namespaces in ((True, True), (True, False), (False, True), (False, False)):
        words = _words({"strict": strict, "namespaces": namespaces, **_jailed(Path("/dev/null"))})
        exit_code, *told = _try(words)
        if exit_code == "0":
            landlock, has_namespaces, seccomp = map(int, told)
            return Strength(
                level="strong" if strict else "weak",
                landlock=landlock,
                namespaces=bool(has_namespaces),
                seccomp=bool(seccomp),
                problem="" if strict else problem,
            )
        problem = " ".join(told) if strict or not problem else problem
    return Strength(level="none", problem=problem)


def _try(words: Sequence[str]) -> list[str]:
    with tempfile.TemporaryFile() as report:
        subprocess.run(  # noqa: S603 - our own script
            [*_MINDER, *words, f"report={report.fileno()}", "leash=0", "--", "/bin/true"],
            pass_fds=[report.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        report.seek(0)
        return report.read().decode().split() or ["error", "the minder did not start"]


def _words(rules: Mapping[str, object]) -> list[str]:
    """Return rules as words of a command line; of a list each item is one."""
    listed = [
        (name, each)
        for name, value in rules.items()
        for each in (value if isinstance(value, list) else [value])
    ]
    return [f"{name}={int(each) if isinstance(each, bool) else each}" for name, each in listed]


def _jailed(
    *folders: Path, read: Iterable[Path] = (), network: bool = False
) -> dict[str, list[str]]:
    """Return what of files and system calls is open to a program that is given these folders."""
    resolver = _RESOLVER if network else ()
    machine = platform.machine()
    rules = {
        "read": [*map(str, (*_SYSTEM, *_interpreter(), *resolver, *read))],
        "write": [*map(str, (*_WRITABLE, *folders))],
    }
    if machine in MACHINES:
        rules["filter"] = [build_filter(machine, network=network).hex()]
    return rules


@functools.cache
def _interpreter() -> list[str]:
    """Return where this interpreter and the packages beside it are."""
    paths = sysconfig.get_paths()
    places = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return sorted({*places, sys.base_prefix, sys.executable, f"{sys.prefix}/pyvenv.cfg"})


@attrs.frozen(kw_only=True)
class Sandbox:
    """How programs are held on this worker.

    Attributes:
        strict: Whether a machine that cannot hold them is not used at all.
        read: Folders that they may read, besides the system and its interpreter.
        network: Whether they may be given a network: all that this machine reaches, its own
            services and private addresses too.
        memory_bytes: Of one program, and of all processes of it together.
        cpu_s: Processor time of each of its processes.
        file_bytes: Of each file that it writes; the whole folder may take eight times as much.
        processes: At once.
    """

    strict: bool = True
    read: tuple[Path, ...] = ()
    network: bool = False
    memory_bytes: int = 2**30
    cpu_s: int = 60
    file_bytes: int = 256 * 2**20
    processes: int = 64

    @classmethod
    def from_settings(cls, settings: AgentSettings) -> Sandbox:
        """Return the sandbox that the operator asks for."""
        return cls(
            strict=settings.sandbox == "strict",
            read=settings.sandbox_read,
            network=settings.sandbox_network,
            memory_bytes=settings.memory_bytes,
            cpu_s=settings.cpu_s,
            file_bytes=settings.files_max_bytes,
            processes=settings.processes,
        )

    def check(self) -> str:
        """Return what this machine lacks of a strict sandbox, "" for nothing; cached, but blocks.

        Raises:
            ExecutorUnavailableError: It lacks something, and the operator wants it strict.
        """
        strength = probe()
        if strength.level == "none" or (self.strict and strength.level != "strong"):
            raise ExecutorUnavailableError(
                f"programs of agents cannot be jailed on this worker: {strength.problem};"
                " FLOWMESH_AGENT_SANDBOX=weak runs them with what protection there is"
            )
        return strength.problem

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        seconds: float,
        folder: Path,
        network: bool = False,
    ) -> Finished:
        """Run a program in a folder, the only one it can write to, and wait until nothing is left.

        When it is cancelled, everything is ended before it raises.

        Args:
            argv: The program, as a path or to be found in the usual folders, and its arguments.
            stdin: What it can read.
            seconds: After so many it is ended.
            folder: It begins there; ``.tmp`` in it is for files that need not last.
            network: Whether it has the worker's network, where the operator allows that.

        Raises:
            ExecutionError: It cannot be started, or not under these rules.
            ExecutorUnavailableError: As ``check``.
        """
        if network and not self.network:
            raise ExecutionError("programs get no network here: FLOWMESH_AGENT_SANDBOX_NETWORK")
        await asyncio.to_thread(self.check)
        folder = folder.absolute()
        scratch = folder / _SCRATCH
        with contextlib.suppress(FileExistsError):  # whatever a program before has put there
            scratch.mkdir()
        rules = self._rules(folder, network=network) | {
            "address_space": self.memory_bytes,
            "cpu": self.cpu_s,
            "seconds": seconds,
            "folder": folder,
            "disk": FOLDER_FILES * self.file_bytes,
            "entries": _ENTRIES,
        }
        env = _ENVIRONMENT | {"HOME": str(folder), "TMPDIR": str(scratch)}
        ours, theirs = socket.socketpair()
        command = [
            *_words(rules | {"leash": theirs.fileno(), "report": theirs.fileno()}),
            "--",
            *argv,
        ]
        talk = asyncio.ensure_future(_talk(command, stdin, folder, env, ours, theirs))
        try:
            return await asyncio.shield(talk)
        except (OSError, ValueError) as exc:  # too long, or text that no system can hold
            raise ExecutionError(f"cannot start {argv[0]!r}: {exc}") from exc
        except asyncio.CancelledError:
            ours.shutdown(socket.SHUT_RDWR)  # the minder then ends everything, and `talk` with it
            talk.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait([talk], timeout=_PATIENCE_S)
            raise

    def wrap(
        self, argv: Sequence[str], *, folder: Path, network: bool = False, files_open: bool = False
    ) -> list[str]:
        """Return a command that holds a server that talks over stdin and stdout. It blocks.

        All of it ends soon after its stdin is closed, and at once when it is terminated. The
        environment is the caller's; ``HOME`` and ``TMPDIR`` should be in the folder.

        Args:
            argv: The server and its arguments.
            folder: The only one that it can write to.
            network: Whether it has the worker's network; that is for who calls this to decide.
            files_open: Whether files and system calls are left as they are, and only the number
                and memory of its processes is limited.

        Raises:
            ExecutorUnavailableError: As ``check``, unless ``files_open``.
        """
        if files_open:
            rules = self._limits()
        else:
            self.check()
            rules = self._rules(folder.absolute(), network=network)
        return [*_MINDER, *_words(rules | {"leash": 0, "grace": _GRACE_S}), "--", *argv]

    def _limits(self) -> dict[str, object]:
        return {
            "namespaces": probe().namespaces,
            "memory": self.memory_bytes,
            "file": self.file_bytes,
            "processes": self.processes,
            "descriptors": _DESCRIPTORS,
        }

    def _rules(self, folder: Path, *, network: bool) -> dict[str, object]:
        jailed = _jailed(folder, read=self.read, network=network)
        named = {"strict": self.strict, "network": network, "nice": _NICE}
        return {**self._limits(), **jailed, **named}


async def _talk(
    words: Sequence[str],
    stdin: bytes,
    folder: Path,
    env: Mapping[str, str],
    leash: socket.socket,
    theirs: socket.socket,
) -> Finished:
    """Run the minder to its end; it ends when ``leash`` is closed. Takes both sockets over."""
    began = time.monotonic()
    with contextlib.ExitStack() as failed:
        failed.callback(leash.close)
        with tempfile.TemporaryFile() as source, theirs:
            source.write(stdin)
            source.seek(0)
            minder = subprocess.Popen(  # noqa: S603 - our own script
                [*_MINDER, *words],
                bufsize=0,
                cwd=folder,
                env=env,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        failed.pop_all()
    with minder, leash:  # which is closed first
        leash.setblocking(False)
        reading = [asyncio.ensure_future(_read(pipe)) for pipe in (minder.stdout, minder.stderr)]
        report = (await asyncio.get_running_loop().sock_recv(leash, 2**16)).decode()
        # What was left alive by a minder that was killed may hold them open.
        _, unread = await asyncio.wait(reading, timeout=_PATIENCE_S)
        for reader in unread:
            reader.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await asyncio.to_thread(minder.wait)
    stdout, stderr = ("" if reader in unread else reader.result() for reader in reading)
    return _finish(report, stdout, stderr, time.monotonic() - began)


def _finish(report: str, stdout: str, stderr: str, seconds: float) -> Finished:
    status, *told = report.split(" ")
    if not status.isdecimal():
        raise ExecutionError(f"sandbox: {' '.join(told) or f'its minder was killed {stderr}'}")
    code = os.waitstatus_to_exitcode(int(status))
    return Finished(
        exit=code if code >= 0 else None,
        signal=signal.Signals(-code).name if code < 0 else "",
        stopped=told[3],
        stdout=stdout,
        stderr=stderr,
        seconds=seconds,
    )


async def _read(pipe: IO[bytes] | None) -> str:
    """Read to the end and keep some of the beginning and of the end."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    head, tail, left_out = b"", b"", 0
    try:
        while chunk := await reader.read(2**16):
            room = _KEPT_BYTES // 2 - len(head)
            head += chunk[:room]
            tail += chunk[room:]
            if (excess := len(tail) - _KEPT_BYTES // 2) > 0:
                tail, left_out = tail[excess:], left_out + excess
    finally:
        transport.close()
    gap = f"\n[{left_out} bytes left out]\n".encode() if left_out else b""
    return (head + gap + tail).decode(errors="replace")
