from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from flowmesh_agent import sandbox as module
from flowmesh_agent.sandbox import Finished, Sandbox, Strength, probe
from flowmesh_agent.settings import AgentSettings
from jails import HOLDS, alive, needs_jail

from flowmesh_core import ExecutionError, ExecutorUnavailableError
from flowmesh_core.testing import wait_for

MARKERS = itertools.count(int(time.time()) % 10_000)
Run = Callable[..., Finished]


@pytest.fixture(params=HOLDS)
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    strength = attrs.evolve(probe(), namespaces=request.param == "namespaces")
    monkeypatch.setattr(module, "probe", lambda: strength)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def run(folder: Path, held: None) -> Run:
    """Run Python code in the sandbox."""

    def do(code: str, *, seconds: float = 20, internet: bool = False, **fields: Any) -> Finished:
        return asyncio.run(
            Sandbox(**fields).run(
                [sys.executable, "-"],
                stdin=code.encode(),
                seconds=seconds,
                folder=folder,
                network=internet,
            )
        )

    return do


@pytest.fixture
def marker() -> Iterator[str]:
    text = f"2000.{os.getpid()}{next(MARKERS)}"
    yield text
    for pid in alive(text):
        os.kill(pid, signal.SIGKILL)


@needs_jail
def test_a_program_says_what_it_has_to_say(run: Run, folder: Path) -> None:
    code = "import os, sys; print(os.getcwd()); print(1 / 3, file=sys.stderr); sys.exit(3)"
    finished = run(code)
    assert attrs.asdict(finished) | {"seconds": 0} == {
        "exit": 3,
        "signal": "",
        "stopped": "",
        "stdout": f"{folder}\n",
        "stderr": "0.3333333333333333\n",
        "seconds": 0,
    }
    assert 0 < finished.seconds < 20


@needs_jail
def test_it_works_with_what_is_installed_and_what_it_wrote(run: Run, folder: Path) -> None:
    (folder / "mine.py").write_text("def double(n): return 2 * n")
    code = """
import asyncio, json, shutil, sqlite3, subprocess, tempfile, threading
import attrs, mine
from concurrent.futures import ThreadPoolExecutor
with tempfile.NamedTemporaryFile() as file:
    pass
shutil.copy("mine.py", "copy.py")
base = sqlite3.connect("a.db"); base.execute("create table t (n)"); base.close()
async def main():
    await (await asyncio.create_subprocess_exec("true")).wait()
asyncio.run(main())
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(mine.double, range(3))) == [0, 2, 4]
print(subprocess.run("echo a | tr a b", shell=True, capture_output=True, text=True).stdout)
"""
    finished = run(code)
    assert (finished.stdout, finished.stderr) == ("b\n\n", "")
    assert {path.name for path in folder.iterdir()} == {"mine.py", "copy.py", "a.db", ".tmp"}


@needs_jail
def test_it_finds_a_clean_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_LLM_API_KEY", "sk-canary")
    found = json.loads(run("import json, os; print(json.dumps(dict(os.environ)))").stdout)
    known = {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "LC_CTYPE"}
    assert {name for name in found if not name.startswith("PYTHON")} <= known


# Each prints what it got; where the sandbox holds, it raises instead.
ESCAPES = {
    "read a file": "open({secret!r}).read()",
    "read the passwords": "open('/etc/passwd').read()",
    "list the root": "os.listdir('/')",
    "list the folder above": "os.listdir('..')",
    "read the worker's environment": "open('/proc/{parent}/environ').read()",
    "read its own past": "open('/proc/self/cmdline').read()",
    "write beside its folder": "open({outside!r}, 'w')",
    "write into the system": "open('/usr/share/x', 'w')",
    "remove a file": "os.remove({secret!r})",
    "move a file in": "os.rename({secret!r}, 'mine')",
    "move a file over it": "(open('mine', 'w'), os.rename('mine', {secret!r}))",
    "link a file in": "os.link({secret!r}, 'mine')",
    "link to a file": "os.symlink({secret!r}, 'mine')",
    "make a device": "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    "truncate": "os.truncate({secret!r}, 0)",
    "set an attribute": "os.setxattr({secret!r}, 'user.x', b'1')",
    "signal the worker": "os.kill({parent}, 0)",
    "starve the worker": "resource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "slow the worker": "os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
    "trace": "call(101, 117, 16, {parent})",
    "reach the internet": "socket.socket()",
    "reach local services": "socket.socket(socket.AF_UNIX)",
    "send by name": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "share memory": "call(29, 194, 0, 4096, 0o1600)",
    "memory that no limit counts": "os.memfd_create('x')",
    "watch a folder": "call(294, 26, 0)",
    "own a namespace": "call(272, 97, 0x10000000)",
    "mount": "call(165, 40, b'none', b'.', b'tmpfs', 0, 0)",
    "change the root": "os.chroot('.')",
    "queue for the kernel": "call(425, 425, 1, 0)",
    "make what cannot be removed": "os.mkdir('closed', 0)",
}
TRY = """
import ctypes, os, platform, resource, socket
def call(x86, arm, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(arm if platform.machine() == "aarch64" else x86, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
try:
    print("got", {order})
except (OSError, ValueError) as exc:
    print("held", type(exc).__name__)
"""


@needs_jail
@pytest.mark.parametrize("name", ESCAPES)
def test_it_cannot(run: Run, tmp_path: Path, name: str) -> None:
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("canary")
    names = {"secret": str(secret), "outside": str(outside), "parent": os.getpid()}
    finished = run(TRY.replace("{order}", ESCAPES[name].format(**names)))
    assert finished.stdout.startswith("held "), finished
    assert secret.read_text() == "canary"
    assert not outside.exists()


@needs_jail
def test_modes_owners_and_times_of_files_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("x")
    os.utime(canary, (1, 1))
    before = canary.stat()
    code = "import os; p = {!r}; os.chmod(p, 0); os.chown(p, 1, 1); os.utime(p); print('done')"
    assert run(code.format(str(canary))).stdout == "done\n"
    after = canary.stat()
    for name in ("st_mode", "st_uid", "st_gid", "st_mtime", "st_atime"):
        assert getattr(after, name) == getattr(before, name)


@needs_jail
def test_links_that_are_there_lead_nowhere(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary")
    (folder / "link").symlink_to(tmp_path / "secret")
    finished = run("print(open('link').read())")
    assert "PermissionError" in finished.stderr
    assert finished.stdout == ""


@needs_jail
def test_folders_of_the_operator_can_be_read_and_not_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("rows")
    code = "print(open('../data/a').read()); open('../data/a', 'w')"
    assert run(code).stdout == ""
    finished = run(code, read=(tmp_path / "data",))
    assert finished.stdout == "rows\n"
    assert "PermissionError" in finished.stderr
    assert (tmp_path / "data" / "a").read_text() == "rows"


@needs_jail
def test_a_network_takes_the_operator_and_the_document(run: Run) -> None:
    code = "import socket; socket.socket(); print('open'); socket.socket(socket.AF_UNIX)"
    assert run(code, network=True).stdout == ""
    with pytest.raises(ExecutionError, match="no network here: FLOWMESH_AGENT_SANDBOX_NETWORK"):
        run(code, internet=True)
    finished = run(code, network=True, internet=True)
    assert finished.stdout == "open\n"
    assert "PermissionError" in finished.stderr


LIMITS = {
    "time": ("while True: pass", {"seconds": 0.3}, ("SIGKILL", "time")),
    "processor": ("while True: pass", {"cpu_s": 1}, ("SIGXCPU", "")),
    "processes": (
        "import os, time\nfor _ in range(9): os.fork()\ntime.sleep(30)",
        {"processes": 20},
        ("SIGKILL", "processes"),
    ),
    "daemons": (
        "import subprocess, time\nfor _ in range(99):\n"
        "    subprocess.Popen(['sleep', '9'], start_new_session=True)\ntime.sleep(30)",
        {"processes": 20},
        ("SIGKILL", "processes"),
    ),
    "memory of all": (
        "import os, time\nfor _ in range(3): os.fork()\nx = b'1' * (100 << 20); time.sleep(30)",
        {"memory_bytes": 400 << 20},
        ("SIGKILL", "memory"),
    ),
    "disk": (
        "import time\nfor i in range(20): open(f'{i}', 'wb').write(b'1' * 60_000)\ntime.sleep(30)",
        {"file_bytes": 64 << 10},
        ("SIGKILL", "disk"),
    ),
    "number of files": (
        "import time\nfor i in range(301): open(f'{i}', 'wb')\ntime.sleep(30)",
        {},
        ("SIGKILL", "disk"),
    ),
}


@needs_jail
@pytest.mark.parametrize("name", LIMITS)
def test_limits_end_everything_and_say_which_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code, fields, expected = LIMITS[name]
    monkeypatch.setattr(module, "_ENTRIES", 300)
    finished = run(code, **fields)
    assert (finished.signal, finished.stopped) == expected
    assert finished.exit is None


@needs_jail
@pytest.mark.parametrize(
    ("code", "fields", "error"),
    [
        ("x = bytearray(2 << 30)", {}, "MemoryError"),
        ("open('big', 'wb').write(b'1' * 70_000)", {"file_bytes": 64 << 10}, "File too large"),
        ("files = [open('/dev/null') for _ in range(2000)]", {}, "Too many open files"),
    ],
)
def test_other_limits_are_errors_in_the_program(
    run: Run, code: str, fields: dict[str, int], error: str
) -> None:
    finished = run(code, **fields)
    assert finished.exit == 1
    assert error in finished.stderr


@needs_jail
def test_a_program_waits_for_the_worker_and_its_minder_for_nobody(run: Run) -> None:
    code = "import os; print(*(os.getpriority(os.PRIO_PROCESS, n) for n in (0, os.getppid())))"
    own, minder = map(int, run(code).stdout.split())
    usual = os.nice(0)
    assert own == min(19, usual + 10)
    assert minder == (-20 if os.geteuid() == 0 else usual)


@needs_jail
def test_of_a_fork_bomb_nothing_is_left(run: Run, marker: str) -> None:
    # A thousand that stay for twenty seconds, and never more, whoever is killed on the way.
    seconds = marker.replace("2000", "20")
    sleep = f"sleep {seconds}"
    again = "b $(($1-1)) | b $(($1-1)) &"
    bomb = f"b() {{ if [ $1 -gt 0 ]; then {again} else {sleep}; fi; }}; b 9; {sleep}"
    code = f"import os; os.execv('/bin/sh', ['sh', '-c', '{bomb}'])"
    finished = run(code)
    assert (finished.signal, finished.stopped) == ("SIGKILL", "processes")
    assert alive(seconds) == []


@needs_jail
def test_few_processes_start_before_it_is_seen_that_they_are_too_many(
    run: Run, folder: Path, marker: str
) -> None:
    # Six hundred, one after the other, where nothing ends them: about 90 as a rule.
    seconds = marker.replace("2000", "20")
    code = f"""
import subprocess, time
with open("born", "wb", 0) as born:
    for _ in range(600):
        subprocess.Popen(["sleep", "{seconds}"])
        born.write(b".")
time.sleep(20)
"""
    finished = run(code, processes=64)
    assert (finished.signal, finished.stopped) == ("SIGKILL", "processes")
    # The 65th of all is the 64th sleeper, of which the program may not have written yet.
    assert 63 <= (folder / "born").stat().st_size < 300
    assert alive(seconds) == []


@needs_jail
def test_of_long_output_the_middle_is_left_out(run: Run) -> None:
    finished = run("print('first' + 'a' * 30_000_000 + 'last')")
    assert finished.stdout.startswith("firsta")
    assert finished.stdout.endswith("alast\n")
    assert f"\n[{30_000_010 - 262_144} bytes left out]\n" in finished.stdout
    assert len(finished.stdout) < 263_000


@needs_jail
def test_input_that_nobody_reads_holds_nothing_up(folder: Path, held: None) -> None:
    running = Sandbox().run(["true"], stdin=b"x" * 10_000_000, seconds=20, folder=folder)
    assert asyncio.run(running).exit == 0


@needs_jail
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["no-such-program"], "cannot start 'no-such-program'.*No such file"),
        (["/bin/sh", "-c", "echo \0"], "cannot start '/bin/sh'.*null byte"),
        (["/bin/sh", "-c", "\ud800"], "cannot start '/bin/sh'.*surrogates"),
        (["/bin/sh", "-c", "x" * 200_000], "cannot start '/bin/sh'.*too long"),
    ],
)
def test_what_cannot_be_started_says_why(
    folder: Path, held: None, argv: list[str], problem: str
) -> None:
    with pytest.raises(ExecutionError, match=problem):
        asyncio.run(Sandbox().run(argv, seconds=20, folder=folder))


@needs_jail
def test_what_a_program_does_to_its_scratch_folder_does_not_stop_the_next(run: Run) -> None:
    assert run("import os; os.rmdir('.tmp'); open('.tmp', 'w')").exit == 0
    assert run("print('fine')").stdout == "fine\n"


@needs_jail
def test_cancelling_ends_everything_before_it_raises(folder: Path, held: None, marker: str) -> None:
    command = f"trap '' TERM; setsid sh -c \"trap '' TERM; sleep {marker}; :\" & wait"

    async def main() -> float:
        running = asyncio.create_task(
            Sandbox().run(["sh", "-c", command], seconds=60, folder=folder)
        )
        await asyncio.to_thread(wait_for, lambda: alive(f"sleep\0{marker}"))
        running.cancel()
        began = time.monotonic()
        await asyncio.wait([running])
        assert running.cancelled()
        assert alive(marker) == []
        return time.monotonic() - began

    assert asyncio.run(main()) < 1.0  # 5 ms as a rule


@needs_jail
def test_cancelling_at_any_moment_of_the_start_leaves_nothing(
    folder: Path, held: None, marker: str
) -> None:
    async def main() -> None:
        for pause_s in (0, 0.001, 0.005, 0.01, 0.02, 0.03, 0.05):
            running = asyncio.create_task(
                Sandbox().run(["sleep", marker], seconds=60, folder=folder)
            )
            await asyncio.sleep(pause_s)
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled()
            assert alive(marker) == []

    asyncio.run(main())


@needs_jail
def test_many_run_at_once_and_know_nothing_of_each_other(folder: Path, held: None) -> None:
    async def main() -> list[Finished]:
        runs = [
            Sandbox().run(["sh", "-c", f"sleep 0.1; echo {i}"], seconds=20, folder=folder)
            for i in range(8)
        ]
        return await asyncio.gather(*runs)

    assert [finished.stdout for finished in asyncio.run(main())] == [f"{i}\n" for i in range(8)]


@needs_jail
def test_no_descriptor_stays_behind(run: Run, folder: Path) -> None:
    run("")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        run("")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@needs_jail
def test_a_minder_that_was_killed_is_an_error_and_holds_nothing_up(
    folder: Path, held: None, marker: str
) -> None:
    command = f"sleep {marker} & wait"  # outside of a namespace it lives on, and holds the pipes

    async def main() -> None:
        running = asyncio.create_task(
            Sandbox().run(["sh", "-c", command], seconds=60, folder=folder)
        )
        minders = await asyncio.to_thread(wait_for, lambda: alive(f"--\0sh\0-c\0{command}"))
        await asyncio.to_thread(wait_for, lambda: alive(f"sleep\0{marker}"))
        for pid in minders:
            os.kill(pid, signal.SIGKILL)
        await running

    began = time.monotonic()
    with pytest.raises(ExecutionError, match="sandbox: its minder was killed"):
        asyncio.run(main())
    assert time.monotonic() - began < 10


@needs_jail
def test_a_wrapped_server_talks_and_is_held(folder: Path, held: None, marker: str) -> None:
    server = f"sleep {marker} & while read line; do echo got $line; cat /etc/passwd; done; exit 5"
    argv = Sandbox().wrap(["sh", "-c", server], folder=folder)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got hello\n"
        process.stdin.close()
        assert process.wait(10) == 5
        assert process.stdout.read() == b""
        assert b"Permission denied" in process.stderr.read()
    assert alive(marker) == []


@needs_jail
def test_a_wrapped_server_with_open_files_is_still_minded(
    folder: Path, held: None, marker: str
) -> None:
    server = f"setsid sleep {marker} & head -c 4 /etc/passwd; cat"
    argv = Sandbox().wrap(["sh", "-c", server], folder=folder, files_open=True)
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen(argv, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.read(4) == b"root"
        wait_for(lambda: alive(f"sleep\0{marker}"))
        process.terminate()
        process.wait(10)
    wait_for(lambda: not alive(marker), 2)


@pytest.mark.parametrize("level", ["weak", "none"])
def test_a_strict_sandbox_runs_nothing_where_it_cannot_hold_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path, level: Any
) -> None:
    lacking = Strength(level=level, problem="this kernel lacks seccomp")
    monkeypatch.setattr(module, "probe", lambda: lacking)
    message = "cannot be jailed on this worker: this kernel lacks seccomp; FLOWMESH_AGENT_SANDBOX"
    with pytest.raises(ExecutorUnavailableError, match=message):
        asyncio.run(Sandbox().run(["touch", "ran"], seconds=5, folder=folder))
    with pytest.raises(ExecutorUnavailableError, match=message):
        Sandbox().wrap(["touch", "ran"], folder=folder)
    assert not (folder / "ran").exists()


def test_a_weak_sandbox_runs_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    lacking = Strength(level="weak", problem="this kernel lacks seccomp")
    monkeypatch.setattr(module, "probe", lambda: lacking)
    sandbox = Sandbox.from_settings(AgentSettings(sandbox="weak"))
    assert sandbox.check() == "this kernel lacks seccomp"
    finished = asyncio.run(sandbox.run(["touch", "ran"], seconds=20, folder=folder))
    assert (finished.exit, (folder / "ran").exists()) == (0, True)


@needs_jail
def test_a_machine_without_landlock_is_known_as_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    words = module._words
    monkeypatch.setattr(module, "_words", lambda rules: [*words(rules), "landlock=0"])
    found = probe.__wrapped__()
    assert (found.level, found.landlock, found.seccomp) == ("weak", 0, True)
    assert found.problem.startswith("cannot start '/bin/true': this kernel lacks Landlock")


def test_settings_of_the_operator_make_the_sandbox(tmp_path: Path) -> None:
    settings = AgentSettings(
        sandbox="strict",
        sandbox_read=(tmp_path,),
        sandbox_network=True,
        memory_bytes=1,
        cpu_s=2,
        files_max_bytes=3,
        processes=4,
    )
    assert Sandbox.from_settings(settings) == Sandbox(
        strict=True,
        read=(tmp_path,),
        network=True,
        memory_bytes=1,
        cpu_s=2,
        file_bytes=3,
        processes=4,
    )
