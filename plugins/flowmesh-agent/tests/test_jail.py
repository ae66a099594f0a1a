from __future__ import annotations

import errno
import itertools
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flowmesh_agent
import pytest
from flowmesh_agent.syscalls import MACHINES, build_filter
from jails import HOLDS, alive, needs_jail

from flowmesh_core.testing import wait_for

pytestmark = needs_jail

JAIL = Path(flowmesh_agent.__file__).with_name("jail.py")
FILTER = build_filter(platform.machine(), network=False)
MARKERS = itertools.count(int(time.time()) % 10_000)
# Leaves its session and its parent, and is deaf to SIGTERM.
DAEMON = "(trap '' TERM; setsid sh -c \"trap '' TERM; sleep {marker}; :\" &) &"

Jail = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=HOLDS)
def hold(request: pytest.FixtureRequest) -> str:
    return f"namespaces={request.param == 'namespaces':d}"


@pytest.fixture
def marker() -> Iterator[str]:
    """A number of seconds that no other process sleeps for."""
    text = f"1000.{os.getpid()}{next(MARKERS)}"
    yield text
    for pid in alive(text):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def jail() -> Iterator[Jail]:
    """Start a shell in a jail that only the given rules describe; its stdin is its leash."""
    started: list[subprocess.Popen[str]] = []

    def start(command: str, *rules: str, argv: tuple[str, ...] = (), **options: object) -> object:
        words = [sys.executable, "-I", "-S", str(JAIL), *rules, "leash=0", "--"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(
            subprocess.Popen(
                [*words, *(argv or ("/bin/sh", "-c", command))],
                **{"text": True, "start_new_session": True, **pipes, **options},
            )
        )
        return started[-1]

    yield start  # type: ignore[misc]
    for process in started:
        with process:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    assert process.stdout is not None
    assert process.stderr is not None
    return process.wait(20), process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -SEGV $$", 128 + 11)])
def test_the_minder_ends_as_a_shell_would_say_the_program_did(
    jail: Jail, hold: str, command: str, code: int
) -> None:
    assert finish(jail(f"echo told; {command}", hold)) == (code, "told\n", "")


def test_a_program_that_is_not_there_is_named(jail: Jail, hold: str) -> None:
    code, told, error = finish(jail("", hold, argv=("/no/such/program",)))
    assert (code, told) == (127, "")
    assert error == "error cannot start '/no/such/program': [Errno 2] No such file or directory\n"


def test_a_daemon_ends_with_the_program(jail: Jail, hold: str, marker: str) -> None:
    process = jail(f"{DAEMON.format(marker=marker)} read line; echo $line", hold)
    wait_for(lambda: alive(f"sleep\0{marker}"))
    assert process.stdin is not None
    process.stdin.write("over\n")
    process.stdin.flush()
    assert finish(process) == (0, "over\n", "")
    assert alive(marker) == []


def test_signals_of_the_minder_reach_no_bystander(jail: Jail, hold: str, marker: str) -> None:
    with subprocess.Popen(["sleep", f"9{marker}"]) as bystander:
        assert finish(jail(f"sleep {marker} & exit 0", hold))[0] == 0
        assert bystander.poll() is None
        assert alive(f"sleep\0{marker}") == []
        bystander.kill()


def test_the_end_of_the_leash_ends_everything(jail: Jail, hold: str, marker: str) -> None:
    process = jail(f"{DAEMON.format(marker=marker)} trap '' TERM; sleep 7{marker}; :", hold)
    wait_for(lambda: alive(f"sleep\0{marker}") and alive(f"7{marker}"))
    assert process.stdin is not None
    process.stdin.close()
    assert finish(process)[0] == 128 + signal.SIGKILL
    assert alive(marker) == []


def test_a_server_has_time_to_end_by_itself_when_its_input_has_ended(jail: Jail, hold: str) -> None:
    process = jail("cat; sleep 0.2; echo said goodbye; exit 3", hold, "grace=10")
    assert process.stdin is not None
    process.stdin.close()
    assert finish(process) == (3, "said goodbye\n", "")


def test_a_server_that_does_not_end_is_ended_after_its_grace(
    jail: Jail, hold: str, marker: str
) -> None:
    process = jail(f"sleep {marker}", hold, "grace=0.3")
    wait_for(lambda: alive(f"sleep\0{marker}"))
    assert process.stdin is not None
    began = time.monotonic()
    process.stdin.close()
    assert finish(process)[0] == 128 + signal.SIGKILL
    assert 0.3 <= time.monotonic() - began < 5
    assert alive(marker) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_minder_ends_everything_at_once(
    jail: Jail, hold: str, marker: str, number: signal.Signals
) -> None:
    process = jail(f"{DAEMON.format(marker=marker)} trap '' TERM; cat", hold, "grace=100")
    wait_for(lambda: alive(f"sleep\0{marker}"))
    process.send_signal(number)
    finish(process)
    wait_for(lambda: not alive(marker), 2)


@pytest.mark.skipif("namespaces" not in HOLDS, reason="no namespaces for users here")
def test_not_even_a_killed_minder_leaves_anybody_in_its_namespace(jail: Jail, marker: str) -> None:
    process = jail(f"{DAEMON.format(marker=marker)} cat", "namespaces=1")
    wait_for(lambda: alive(f"sleep\0{marker}"))
    process.kill()
    finish(process)
    wait_for(lambda: not alive(marker), 2)


def test_time_is_limited(jail: Jail, hold: str, marker: str) -> None:
    assert finish(jail(f"sleep {marker} & wait", hold, "seconds=0.2"))[0] == 128 + signal.SIGKILL
    assert alive(marker) == []


def test_descriptors_of_whoever_starts_it_stay_outside(jail: Jail, hold: str) -> None:
    with Path(__file__).open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        process = jail("ls /proc/self/fd", hold, pass_fds=(file.fileno(),))
        assert finish(process)[1].split() == ["0", "1", "2", "3"]  # 3 is the folder that it lists


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to lose")
def test_a_program_of_root_has_no_privileges(jail: Jail, hold: str) -> None:
    _, told, _ = finish(jail("grep -E 'Cap(Prm|Eff|Amb)|NoNewPrivs' /proc/self/status", hold))
    assert told.split() == [
        *("CapPrm:", "0" * 16, "CapEff:", "0" * 16, "CapAmb:", "0" * 16, "NoNewPrivs:", "1")
    ]


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        (
            ("landlock=0", "namespaces=0", f"filter={FILTER.hex()}"),
            "Landlock (version 3 or later), Landlock (version 6 or later) or PID namespaces",
        ),
        (
            ("landlock=5", "namespaces=0", f"filter={FILTER.hex()}"),
            "Landlock (version 6 or later) or PID namespaces",
        ),
        (("namespaces=0",), "seccomp"),
    ],
)
def test_a_strict_jail_does_not_begin_on_a_kernel_that_lacks_something(
    jail: Jail, tmp_path: Path, rules: tuple[str, ...], missing: str
) -> None:
    process = jail("echo began", "strict=1", f"write={tmp_path}", "read=/", *rules)
    assert finish(process) == (
        127,
        "",
        f"error cannot start '/bin/sh': this kernel lacks {missing}\n",
    )


@pytest.mark.skipif("namespaces" not in HOLDS, reason="no namespaces for users here")
@pytest.mark.parametrize("version", [3, 4, 5])
def test_namespaces_stand_in_for_what_older_kernels_lack(
    jail: Jail, tmp_path: Path, version: int
) -> None:
    rules = ("strict=1", "namespaces=1", f"landlock={version}", f"filter={FILTER.hex()}")
    places = ("read=/usr", "read=/bin", "read=/lib", "read=/lib64", "read=/etc/ld.so.cache")
    command = f"kill -0 {os.getpid()}; cat {__file__}; cat /etc/passwd; echo x > {tmp_path}/x"
    code, told, errors = finish(jail(command, *rules, *places, f"write={tmp_path}"))
    assert (code, told) == (0, "")
    assert "No such process" in errors
    assert errors.count("Permission denied") == 2
    assert (tmp_path / "x").read_text() == "x\n"


def test_a_weak_jail_without_anything_still_ends_daemons(jail: Jail, marker: str) -> None:
    daemon = DAEMON.format(marker=marker)
    process = jail(f"{daemon} read line", "landlock=0", "namespaces=0", "processes=20")
    wait_for(lambda: alive(f"sleep\0{marker}"))
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert finish(process)[0] == 0
    assert alive(marker) == []


# The kernel's machine for these filters, as far as they use it.
def decide(program: bytes, number: int, *arguments: int, audit: int) -> int:
    words = [number, audit, 0, 0]
    for argument in [*arguments, *[0] * (6 - len(arguments))]:
        words += [argument & 0xFFFFFFFF, argument >> 32]
    code = list(struct.iter_unpack("HBBI", program))
    at, value = 0, 0
    tests = {
        0x15: lambda operand: value == operand,
        0x25: lambda operand: value > operand,
        0x45: lambda operand: bool(value & operand),
    }
    while True:
        operation, when_true, when_false, operand = code[at]
        at += 1
        if operation == 0x06:
            return int(operand)
        if operation == 0x20:
            value = words[operand // 4]
        elif operation == 0x54:
            value &= operand
        else:
            at += when_true if tests[operation](operand) else when_false


ALLOWED, REFUSED, PRETENDED, UNKNOWN = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000, 0x50000 | 38
CALLS = {  # on x86_64, on aarch64, arguments, without and with a network
    "read": (0, 63, (), ALLOWED, ALLOWED),
    "openat": (257, 56, (), ALLOWED, ALLOWED),
    "ptrace": (101, 117, (), REFUSED, REFUSED),
    "mount": (165, 40, (), REFUSED, REFUSED),
    "fchmod": (91, 52, (), PRETENDED, PRETENDED),
    "file_setattr": (469, 469, (), UNKNOWN, UNKNOWN),
    "mseal": (462, 462, (), ALLOWED, ALLOWED),
    "clone3": (435, 435, (), UNKNOWN, UNKNOWN),
    "fork": (56, 220, (17,), ALLOWED, ALLOWED),
    "clone of a user namespace": (56, 220, (0x10000011,), REFUSED, REFUSED),
    "own limits": (302, 261, (0,), ALLOWED, ALLOWED),
    "limits of others": (302, 261, (1,), REFUSED, REFUSED),
    "stream pair": (53, 199, (1, 1 | 0o2000000), ALLOWED, ALLOWED),
    "datagram pair": (53, 199, (1, 2), REFUSED, REFUSED),
    "raw pair": (53, 199, (1, 3), REFUSED, REFUSED),
    "unix socket": (41, 198, (1, 1), REFUSED, REFUSED),
    "internet socket": (41, 198, (2, 1), REFUSED, ALLOWED),
    "IPv6 socket": (41, 198, (10, 1), REFUSED, ALLOWED),
    "raw packets": (41, 198, (17, 3), REFUSED, REFUSED),
    "connect": (42, 203, (), REFUSED, ALLOWED),
    "plain folder": (258, 34, (0, 0, 0o777), ALLOWED, ALLOWED),
    "closed folder": (258, 34, (0, 0, 0o300), REFUSED, REFUSED),
    "umask 022": (95, 166, (0o022,), ALLOWED, ALLOWED),
    "umask 0400": (95, 166, (0o400,), REFUSED, REFUSED),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("call", CALLS)
def test_the_filter_decides_calls_alike_on_all_machines(machine: str, call: str) -> None:
    audit, column = MACHINES[machine]
    *numbers, arguments, alone, with_network = CALLS[call]
    for network, expected in ((False, alone), (True, with_network)):
        program = build_filter(machine, network=network)
        assert decide(program, numbers[column], *arguments, audit=audit) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_other_machines_kill_and_those_of_x32_do_not_exist(machine: str) -> None:
    program = build_filter(machine, network=True)
    assert decide(program, 0, audit=0x40000003) == 0x80000000
    assert decide(program, 0x40000000, audit=MACHINES[machine][0]) == UNKNOWN
