"""The keeper, with real processes: whatever a child does, nothing of it stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from flowmesh_core.errors import CrashError
from flowmesh_core.places.keeping import KEEPER, ExitStatus, Keeper, KeptProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the keeper needs Linux")

WAIT_S = 20
PYTHON = (sys.executable, "-I", "-S", "-c")
KILLED = "SIGKILL"

# Says "up" when it has left its parent and its session and does not hear SIGTERM.
RUNAWAY = """
import os, signal, time
mine, theirs = os.pipe()
middle = os.fork()
if middle:
    os.waitpid(middle, 0)
    os.read(mine, 1)
else:
    os.setsid()
    middle = os.getpid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.getppid() == middle:
        time.sleep(0.001)
    os.write(1, b"up\\n")
    os.write(theirs, b"x")
    time.sleep(600)
"""
RUNAWAY_AND_STAY = RUNAWAY + "\ntime.sleep(600)"


@attrs.define
class Running:
    """A child and the worker's ends of its control socket and of its output."""

    process: KeptProcess
    control: socket.socket
    output: socket.socket

    async def line(self) -> str:
        loop = asyncio.get_running_loop()
        text = b""
        while not text.endswith(b"\n"):
            part = await asyncio.wait_for(loop.sock_recv(self.output, 1), WAIT_S)
            assert part, f"the output ended after {text!r}"
            text += part
        return text.decode().rstrip("\n")

    async def rest(self) -> bytes:
        loop = asyncio.get_running_loop()
        text = b""
        while part := await asyncio.wait_for(loop.sock_recv(self.output, 65536), WAIT_S):
            text += part
        return text

    async def status(self) -> ExitStatus:
        return await asyncio.wait_for(self.process.ended, WAIT_S)


@attrs.define
class Bench:
    """A keeper, and what the tests spawned with it."""

    keeper: Keeper
    stack: contextlib.ExitStack
    marker: str
    keepers: set[int | None] = attrs.field(factory=set)

    async def spawn(
        self, *argv: str, env: Mapping[str, str] | None = None, cwd: Path = Path("/")
    ) -> Running:
        ends = [self.stack.enter_context(end) for _ in "co" for end in socket.socketpair()]
        control, child_control, output, child_output = ends
        output.setblocking(False)
        process = await asyncio.wait_for(
            self.keeper.spawn(
                argv,
                env={} if env is None else env,
                cwd=cwd,
                control=child_control.fileno(),
                stdout=child_output.fileno(),
                stderr=child_output.fileno(),
            ),
            WAIT_S,
        )
        child_control.close()
        child_output.close()
        self.keepers.add(self.keeper.pid)
        return Running(process, control, output)

    async def script(self, text: str) -> Running:
        """Run Python source; every process that it forks can be found by the marker."""
        return await self.spawn(*PYTHON, text, self.marker)

    async def shell(self, text: str) -> Running:
        return await self.spawn("/bin/sh", "-c", text, self.marker)

    def found(self) -> list[int]:
        return find(self.marker)


def find(marker: str) -> list[int]:
    """Return the living processes that have the marker among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def read_stats() -> Iterator[tuple[str, int, int]]:
    """Read state, parent and session of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = path.read_bytes().rpartition(b")")[2].split()[:4]
            yield state.decode(), int(parent), int(session)


def sessions() -> set[int]:
    return {session for state, _, session in read_stats() if state != "Z"}


def children_of(pid: int) -> int:
    return sum(parent == pid for _, parent, _ in read_stats())


def wait_until(condition: Callable[[], bool], *, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def status_field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)[name].strip()


def descriptors(pid: int) -> list[str]:
    return sorted(path.name for path in Path(f"/proc/{pid}/fd").iterdir())


def open_files(pid: int) -> int:
    return len(descriptors(pid))


@contextlib.asynccontextmanager
async def new_bench(**options: Any) -> AsyncIterator[Bench]:
    keeper = Keeper(**options)
    with contextlib.ExitStack() as stack:
        bench = Bench(keeper, stack, uuid.uuid4().hex)
        try:
            yield bench
        finally:
            await asyncio.wait_for(keeper.close(), WAIT_S)
            wait_until(lambda: sessions().isdisjoint(bench.keepers))  # of keeper and minders


def on_bench(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test with a bench of its own."""

    def run(*args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            async with new_bench() as bench:
                await test(bench, *args, **kwargs)

        asyncio.run(main())

    run.__name__ = test.__name__
    return run


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", ExitStatus(code=0)),
        ("exit 3", ExitStatus(code=3)),
        ("kill -TERM $$", ExitStatus(signal="SIGTERM")),
        ("kill -SEGV $$", ExitStatus(signal="SIGSEGV")),
        ("kill -35 $$", ExitStatus(signal="SIGRTMIN+1")),
    ],
)
def test_exit_codes_and_signals_are_told_apart(script: str, expected: ExitStatus) -> None:
    @on_bench
    async def run(bench: Bench) -> None:
        assert await (await bench.shell(script)).status() == expected

    run()


@on_bench
async def test_kill_reaches_what_left_its_parent_and_its_session(bench: Bench) -> None:
    child = await bench.script(RUNAWAY_AND_STAY)
    assert await child.line() == "up"
    assert len(bench.found()) == 2
    child.process.kill()
    assert await child.status() == ExitStatus(signal=KILLED, left=1)
    assert bench.found() == []


@on_bench
async def test_what_a_child_leaves_behind_ends_with_it(bench: Bench) -> None:
    child = await bench.script(RUNAWAY)
    assert await child.line() == "up"
    assert await child.status() == ExitStatus(code=0, left=1)
    assert bench.found() == []


@on_bench
async def test_terminate_asks_every_descendant_and_lets_it_finish(bench: Bench) -> None:
    child = await bench.script(
        """
import os, signal, time
mine, theirs = os.pipe()
def finish(*_):
    os.close(theirs)
    os.read(mine, 1)  # ends with the other process
    os.write(1, b"bye\\n")
    os._exit(5)
def finish_first(*_):
    os.write(1, b"bye\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
middle = os.fork()
if not middle:
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, finish_first)
else:
    os.waitpid(middle, 0)
os.write(1, b"up\\n")
time.sleep(600)
"""
    )
    assert [await child.line(), await child.line()] == ["up", "up"]
    child.process.terminate()
    assert [await child.line(), await child.line()] == ["bye", "bye"]
    assert (await child.status()).code == 5


@on_bench
async def test_orphans_can_be_ended_without_the_child(bench: Bench) -> None:
    """Neither the child nor what still has its parent is touched, also when they share a group."""
    child = await bench.script(
        """
import os, time
if not os.fork():
    time.sleep(600)
for own_session in (True, False):
    if not os.fork():
        if own_session:
            os.setsid()
        if not os.fork():
            os.write(1, b"up\\n")
            time.sleep(600)
        os._exit(0)
    os.wait()
os.write(1, b"up\\n")
os.read(3, 1)
os._exit(9)
"""
    )
    for _ in range(3):
        assert await child.line() == "up"
    assert len(bench.found()) == 4
    child.process.end_orphans()
    wait_until(lambda: len(bench.found()) <= 2)
    await asyncio.sleep(0.05)
    states = {status_field(pid, "State")[0] for pid in bench.found()}
    assert (len(bench.found()), states) == (2, {"S"})
    child.control.sendall(b"x")
    assert await child.status() == ExitStatus(code=9, left=1)


def test_orders_after_the_end_are_harmless(caplog: pytest.LogCaptureFixture) -> None:
    @on_bench
    async def run(bench: Bench) -> None:
        child = await bench.shell("exit 0")
        await child.status()
        for _ in range(10):
            child.process.kill()
            child.process.terminate()
        assert await child.status() == ExitStatus(code=0)
        assert await (await bench.shell("exit 4")).status() == ExitStatus(code=4)

    run()
    assert caplog.messages == []


@on_bench
async def test_giving_up_the_wait_for_the_end_does_not_lose_it(bench: Bench) -> None:
    child = await bench.shell("echo up; exec sleep 600")
    await child.line()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(child.process.ended, 0.01)
    child.process.kill()
    assert (await child.status()).signal == KILLED


@on_bench
async def test_a_name_that_looks_like_the_end_of_the_name_hides_nobody(bench: Bench) -> None:
    name = 'open("/proc/self/comm", "w").write(") Z 1 1 (")\n'
    child = await bench.script(name + RUNAWAY)
    assert await child.line() == "up"
    assert (await child.status()).left == 1
    assert bench.found() == []


@on_bench
async def test_a_fork_bomb_is_ended(bench: Bench) -> None:
    child = await bench.script(
        """
import os, time
for _ in range(7):
    os.fork()
print("up", flush=True)
while True:
    time.sleep(0.01)
    if not os.fork():
        os._exit(0)
    os.waitpid(-1, os.WNOHANG)
"""
    )
    for _ in range(2**7):
        assert await child.line() == "up"
    child.process.kill()
    status = await child.status()
    assert status.left >= 2**7 - 1
    assert status.left_alive == 0
    assert bench.found() == []


@on_bench
async def test_processes_that_never_stay_the_same_are_caught(bench: Bench) -> None:
    child = await bench.script(
        """
import os
for _ in range(20):
    if not os.fork():
        while True:
            if os.fork():
                os._exit(0)
for _ in range(20):
    os.wait()
os._exit(3)
"""
    )
    status = await child.status()
    assert (status.code, status.left_alive) == (3, 0)
    assert bench.found() == []


@on_bench
async def test_nobody_sees_another_being_killed(bench: Bench) -> None:
    """Who supervises others would start them again."""
    child = await bench.script(
        """
import os, select
pids = [os.getpid()]
for _ in range(40):
    pid = os.fork()
    if not pid:
        poll = select.poll()
        for other in pids:
            poll.register(os.pidfd_open(other), select.POLLIN)
        os.write(1, b"up\\n")
        poll.poll()
        os.write(1, b"seen\\n")
        os._exit(0)
    pids.append(pid)
os.wait()
"""
    )
    for _ in range(40):
        assert await child.line() == "up"
    child.process.kill()
    assert await child.rest() == b""
    assert await child.status() == ExitStatus(signal=KILLED, left=40)


# What follows ends the worker, the keeper or a minder.

WORKER = """
import asyncio, os, signal, sys
from pathlib import Path
from flowmesh_core.places.keeping import Keeper

async def main(marker, *argv):
    keeper = Keeper(patience_s=0.2)
    null = os.open(os.devnull, os.O_RDWR)
    minders = []
    for _ in range(2):
        child = await keeper.spawn(
            [*argv, marker], env={}, cwd=Path("/"), control=null, stdout=1, stderr=2
        )
        minders.append(child.minder_pid)
    line = " ".join(map(str, ["keeper", keeper.pid, *minders]))
    os.write(1, line.encode() + bytes([10]))  # at once: the children write there too
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


@attrs.define
class Worker:
    """A worker of its own with two children, whose descendants have its marker too."""

    process: subprocess.Popen[str]
    marker: str
    keeper: int
    minders: list[int]


@pytest.fixture
def worker() -> Iterator[Worker]:
    marker = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, marker, *PYTHON, RUNAWAY_AND_STAY],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            lines = sorted(process.stdout.readline().split() for _ in range(3))
            (_, keeper, *minders), *ups = lines
            assert ups == [["up"], ["up"]]
            yield Worker(process, marker, int(keeper), [int(pid) for pid in minders])
        finally:
            process.kill()


def test_nothing_outlives_a_worker_that_was_killed(worker: Worker) -> None:
    assert len(find(worker.marker)) == 5  # the worker, and two for each child
    worker.process.kill()
    wait_until(lambda: find(worker.marker) == [])
    wait_until(lambda: worker.keeper not in sessions())


def test_nothing_outlives_a_killed_worker_even_when_a_minder_does_not_run(worker: Worker) -> None:
    os.kill(worker.minders[0], signal.SIGSTOP)
    worker.process.kill()
    wait_until(lambda: find(worker.marker) == [])
    wait_until(lambda: worker.keeper not in sessions())


@on_bench
async def test_a_killed_keeper_takes_its_children_along_and_is_replaced(bench: Bench) -> None:
    child = await bench.script(RUNAWAY_AND_STAY)
    await child.line()
    first = bench.keeper.pid
    assert first
    os.kill(first, signal.SIGKILL)
    next_child = await bench.shell("echo up; read line <&3")
    assert await child.status() == ExitStatus(signal=KILLED, left=1)
    assert bench.found() == [next_child.process.pid]
    assert bench.keeper.pid not in {first, None}
    assert await next_child.line() == "up"


@on_bench
async def test_nothing_is_left_of_a_killed_minder_and_the_others_live_on(bench: Bench) -> None:
    child = await bench.script(RUNAWAY_AND_STAY)
    other = await bench.shell("echo up; read line <&3; exit $line")
    assert [await child.line(), await other.line()] == ["up", "up"]
    os.kill(child.process.minder_pid, signal.SIGKILL)
    assert await child.status() == ExitStatus(signal=KILLED)
    assert bench.found() == [other.process.pid]
    other.control.sendall(b"6\n")
    assert await other.status() == ExitStatus(code=6)


@on_bench
async def test_a_child_ends_with_its_minder_also_when_the_keeper_cannot_help(bench: Bench) -> None:
    child = await bench.shell("echo up; read line <&3")
    assert await child.line() == "up"
    keeper = bench.keeper.pid
    assert keeper
    os.kill(keeper, signal.SIGSTOP)
    os.kill(child.process.minder_pid, signal.SIGKILL)
    wait_until(lambda: bench.found() == [])
    os.kill(keeper, signal.SIGCONT)
    assert await child.status() == ExitStatus(signal=KILLED)


@on_bench
async def test_signals_to_the_workers_terminal_end_neither_keeper_nor_minder(bench: Bench) -> None:
    child = await bench.shell("read line <&3; exit $line")
    keeper = bench.keeper.pid
    assert keeper
    for pid in (keeper, child.process.minder_pid):
        assert os.getsid(pid) == keeper
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    child.control.sendall(b"8\n")
    assert await child.status() == ExitStatus(code=8)
    assert bench.keeper.pid == keeper


def test_close_ends_everything_and_may_come_twice() -> None:
    async def main() -> None:
        async with new_bench() as bench:
            children = [await bench.script(RUNAWAY_AND_STAY) for _ in range(2)]
            for child in children:
                await child.line()
            keeper = bench.keeper.pid
            await bench.keeper.close()
            assert bench.found() == []
            assert not Path(f"/proc/{keeper}").exists()
            assert bench.keeper.pid is None
            for child in children:
                assert child.process.ended.result() == ExitStatus(signal=KILLED, left=1)
            await bench.keeper.close()
            with pytest.raises(CrashError, match="the keeper is closed"):
                await bench.shell("exit 0")

    asyncio.run(main())


def test_a_keeper_that_started_nothing_can_be_closed() -> None:
    async def main() -> None:
        keeper = Keeper()
        assert keeper.pid is None
        await keeper.close()
        assert keeper.pid is None

    asyncio.run(main())


# How a child finds itself.


@on_bench
async def test_a_child_has_no_input(bench: Bench) -> None:
    child = await bench.spawn("/bin/cat")
    assert await child.rest() == b""
    assert await child.status() == ExitStatus(code=0)


@on_bench
async def test_a_child_has_four_descriptors_and_talks_over_the_fourth(bench: Bench) -> None:
    await bench.shell("exec sleep 600")  # another child's descriptors are not inherited
    child = await bench.shell("read line <&3; echo $line >&3; echo up; exec sleep 600")
    child.control.sendall(b"hello\n")
    assert await child.line() == "up"
    answer = await asyncio.to_thread(child.control.recv, 100)
    assert answer == b"hello\n"
    for _ in range(200):  # the shell may just be loading the program that takes its place
        if (found := descriptors(child.process.pid)) == ["0", "1", "2", "3"]:
            break
        await asyncio.sleep(0.02)
    assert found == ["0", "1", "2", "3"]


@on_bench
async def test_output_ends_when_the_child_closes_it(bench: Bench) -> None:
    child = await bench.shell("echo last; exec sleep 600 >&- 2>&-")
    assert await child.rest() == b"last\n"
    assert not child.process.ended.done()


@on_bench
async def test_signals_are_as_a_program_expects_them(bench: Bench) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        child = await bench.spawn("/bin/cat", "/proc/self/status")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, before)
    fields = dict(line.split(":\t") for line in (await child.rest()).decode().splitlines())
    own = 0b11 << 31  # signals 32 and 33 belong to the C library
    assert not any(int(fields[name], 16) & ~own for name in ("SigBlk", "SigIgn", "SigCgt"))


@on_bench
async def test_a_child_leads_its_own_session_in_its_folder(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        child = await bench.spawn("/bin/sleep", "600", cwd=Path(folder))
        pid = child.process.pid
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert Path(f"/proc/{pid}/cwd").readlink() == Path(folder).resolve()
        assert int(status_field(pid, "PPid")) == child.process.minder_pid


@on_bench
async def test_memory_pressure_hits_the_child_before_the_worker(bench: Bench) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    child = await bench.spawn("/bin/cat", "/proc/self/oom_score_adj")
    assert int(await child.rest()) == min(own + 500, 1000)


@on_bench
async def test_the_environment_is_exactly_what_was_given(bench: Bench) -> None:
    child = await bench.spawn("/usr/bin/env", env={"A": "one\ttwo", "B": "\udcff=ü"})
    assert await child.rest() == b"A=one\ttwo\nB=\xff=\xc3\xbc\n"


@on_bench
async def test_a_large_environment_arrives_whole(bench: Bench) -> None:
    env = {f"VARIABLE_{n}": "x" * 30_000 for n in range(10)}
    child = await bench.spawn("/usr/bin/env", env=env)
    lines = (await child.rest()).decode().splitlines()
    assert dict(line.split("=") for line in lines) == env


@on_bench
async def test_twenty_children_start_at_once_and_are_not_mixed_up(bench: Bench) -> None:
    children = await asyncio.gather(
        *(bench.shell(f"echo {n}; read line <&3; exit $line") for n in range(20))
    )
    assert [await child.line() for child in children] == [str(n) for n in range(20)]
    for n, child in enumerate(children):
        child.control.sendall(b"%d\n" % n)
    ended = await asyncio.gather(*(child.status() for child in children))
    assert ended == [ExitStatus(code=n) for n in range(20)]
    assert len({child.process.pid for child in children}) == 20


# What cannot be started, and what cannot be ended.


@pytest.mark.parametrize(
    ("argv", "env", "cwd", "message"),
    [
        (["/no/such"], {}, "/", r"cannot start '/no/such': .*No such file.*'/no/such'"),
        (["/bin/true"], {}, "/no/folder", r"cannot start '/bin/true': .*No such file.*/no/folder"),
        (["/etc/passwd"], {}, "/", r"cannot start '/etc/passwd': .*Permission denied"),
        (["/bin/true"], {"A=B": "1"}, "/", r"cannot start '/bin/true': illegal environment"),
        (["/bin/true", "x" * 200_000], {}, "/", r"'/bin/true': .*Argument list too long"),
    ],
)
def test_what_cannot_be_started_says_why(
    argv: list[str], env: dict[str, str], cwd: str, message: str
) -> None:
    @on_bench
    async def run(bench: Bench) -> None:
        with pytest.raises(CrashError, match=message):
            await bench.spawn(*argv, env=env, cwd=Path(cwd))
        keeper = bench.keeper.pid
        assert await (await bench.shell("exit 0")).status() == ExitStatus(code=0)
        assert bench.keeper.pid == keeper

    run()


def test_a_keeper_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with new_bench() as bench:
            monkeypatch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(CrashError, match="the keeper ends before it answers"):
                await bench.shell("exit 0")
            monkeypatch.setattr(sys, "executable", "/no/such")
            with pytest.raises(CrashError, match=r"cannot reach the keeper: .*'/no/such'"):
                await bench.shell("exit 0")

    asyncio.run(main())


@on_bench
async def test_too_many_open_files_in_the_keeper_spare_the_others(bench: Bench) -> None:
    child = await bench.shell("read line <&3; exit $line")
    keeper = bench.keeper.pid
    assert keeper
    limit = open_files(keeper) + 3
    resource.prlimit(keeper, resource.RLIMIT_NOFILE, (limit, limit))
    before = open_files(keeper)
    with pytest.raises(CrashError, match=r"the keeper cannot start a process: .*Too many open"):
        await bench.shell("exit 0")
    child.control.sendall(b"7\n")
    assert await child.status() == ExitStatus(code=7)
    wait_until(lambda: open_files(keeper) < before)  # the refused request's are closed


@on_bench
async def test_a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    await (await bench.shell("exit 0")).status()
    keeper = bench.keeper.pid
    assert keeper
    os.kill(keeper, signal.SIGSTOP)  # it takes the request later
    task = asyncio.create_task(bench.script(RUNAWAY_AND_STAY))
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    os.kill(keeper, signal.SIGCONT)
    assert await (await bench.shell("exit 0")).status() == ExitStatus(code=0)  # served after it
    wait_until(lambda: children_of(keeper) == 0)
    assert bench.found() == []
    assert bench.keeper.pid == keeper


# Runs as a user who may not signal what the child's setuid program became.
UNPRIVILEGED = """
import asyncio, os, socket, sys
from pathlib import Path
from flowmesh_core.places.keeping import Keeper

async def main(program, marker):
    keeper = Keeper(patience_s=0.3)
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    as_root = f"{program} --reuid 0 /bin/sh -c 'echo up; read line <&3' {marker}"
    child = await keeper.spawn(
        ["/bin/sh", "-c", as_root + " & read line <&3"],
        env={}, cwd=Path("/"), control=theirs.fileno(), stdout=writing, stderr=2,
    )
    theirs.close()
    os.read(reading, 3)
    child.kill()
    status = await child.ended
    print(status.signal, status.left, status.left_alive)
    await keeper.close()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
def test_what_may_not_be_killed_is_given_up_and_counted() -> None:
    marker = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = shutil.copy(shutil.which("setpriv") or "", folder)
        Path(program).chmod(0o4755)
        read_all = "+dac_override,+dac_read_search"  # wherever the interpreter lies
        setpriv = ["setpriv", "--reuid", "65534", "--clear-groups", "--inh-caps", read_all]
        setpriv += ["--ambient-caps", read_all]
        done = subprocess.run(
            [*setpriv, sys.executable, "-c", UNPRIVILEGED, program, marker],
            stdout=subprocess.PIPE,
            text=True,
            timeout=WAIT_S,
            check=True,
        )
    assert done.stdout.split() == [KILLED, "0", "1"]
    wait_until(lambda: find(marker) == [])  # it ended by itself, with its control socket


# What it costs.


@on_bench
async def test_finished_children_leave_no_descriptors_and_no_zombies(bench: Bench) -> None:
    await (await bench.shell("exit 0")).status()
    keeper = bench.keeper.pid
    assert keeper
    wait_until(lambda: children_of(keeper) == 0)
    before = open_files(keeper), open_files(os.getpid())
    for n in range(10):
        child = await bench.shell(f"exit {n}")
        assert await child.status() == ExitStatus(code=n)
        child.control.close()
        child.output.close()
    with pytest.raises(CrashError, match="No such file"):
        await bench.spawn("/no/such")
    bench.stack.close()
    wait_until(lambda: children_of(keeper) == 0)
    wait_until(lambda: open_files(keeper) == before[0])
    await asyncio.sleep(0)
    assert open_files(os.getpid()) <= before[1]


def test_the_keeper_loads_little_and_nothing_of_the_project() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_WR)  # as if the worker were gone already
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-X", "importtime", str(KEEPER), "1"],
            stdin=theirs.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            timeout=WAIT_S,
            check=True,
        )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"json", "ctypes", "socket"} <= loaded
    heavy = {"asyncio", "attr", "flowmesh_core", "logging", "site", "subprocess", "threading"}
    assert loaded.isdisjoint({*heavy, "pathlib", "typing"})
