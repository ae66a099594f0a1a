from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pynvml
import pytest

from flowmesh_core.places.memory import (
    MemoryWatch,
    available_memory_bytes,
    count_oom_kills,
    gpu_memory_bytes,
    tree_memory_bytes,
    tree_pids,
)
from flowmesh_core.telemetry.probes import GpuReader, usable_memory_bytes

MIB = 1 << 20
Start = Callable[..., "subprocess.Popen[str]"]

# Holds that many MiB, and from then on as many as each line says that it is told.
HOLD = """
import sys
held = bytearray(b"x") * ({} << 20)
print("ready", flush=True)
for line in sys.stdin:
    del held
    held = bytearray(b"x") * (int(line) << 20)
    print("done", flush=True)
"""
# Five processes that share 64 MiB.
SHARE = """
import gc, os, sys
held = bytearray(b"x") * (64 << 20)
gc.freeze()
ends, begins = os.pipe()
for _ in range(4):
    if not os.fork():
        os.close(begins)
        os.read(ends, 1)
        os._exit(0)
print("ready", flush=True)
sys.stdin.read()
"""
# A child with a child, below a program whose name reads like the end of a name.
FAMILY = """
import subprocess, sys
name = "odd) name ("
child = [sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"]
parent = "import subprocess, sys; sys.exit(subprocess.call(" + repr(child) + "))"
open("/proc/self/comm", "w").write(name)
subprocess.call([sys.executable, "-c", parent])
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program and waits until it is ready; all end with the test."""
    processes = []

    def run(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in processes:
        end(process)


@pytest.fixture
def memory() -> Iterator[MemoryWatch]:
    watching = MemoryWatch(interval_s=0.01)
    yield watching
    watching.close()


def end(process: subprocess.Popen[str]) -> None:
    """Close its input, by which all its kin end as well, and kill what is left of it."""
    with process:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5)
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], size_mib: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{size_mib}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.005)


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def nobody(used_bytes: int) -> None:
    pytest.fail(f"reported {used_bytes}")


# Trees of processes.


def test_a_tree_holds_all_descendants_whatever_their_names(start: Start) -> None:
    root = start(FAMILY)
    kin = {process.pid for process in psutil.Process(root.pid).children(recursive=True)}
    assert len(kin) == 2
    assert tree_pids(root.pid) == {root.pid} | kin
    assert os.getpid() in tree_pids(os.getpid()) > tree_pids(root.pid)


def test_of_a_process_that_has_ended_nothing_is_left(start: Start) -> None:
    root = start(HOLD.format(1))
    end(root)
    assert tree_pids(root.pid) == set()
    assert tree_memory_bytes(root.pid) == tree_memory_bytes(root.pid, exact=True) == 0


def test_memory_is_what_the_kernel_counts(start: Start) -> None:
    root = start(HOLD.format(64))
    known = psutil.Process(root.pid)
    assert tree_memory_bytes(root.pid) > 64 * MIB
    assert tree_memory_bytes(root.pid) == pytest.approx(known.memory_info().rss, abs=MIB)
    exact_bytes = known.memory_full_info().pss
    assert tree_memory_bytes(root.pid, exact=True) == pytest.approx(exact_bytes, abs=MIB)


def test_shared_pages_count_once_when_exact(start: Start) -> None:
    root = start(SHARE)
    wait_until(lambda: len(tree_pids(root.pid)) == 5)
    assert tree_memory_bytes(root.pid) > 5 * 64 * MIB
    assert 64 * MIB < tree_memory_bytes(root.pid, exact=True) < 2 * 64 * MIB


# What is left on this machine.


def test_this_machine_has_memory_left() -> None:
    left, usable = available_memory_bytes(), usable_memory_bytes()
    assert left is not None
    assert usable is not None
    assert 0 < left <= usable
    kills = count_oom_kills()
    assert kills is None or kills >= 0


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
V2 = {
    **MACHINE,
    "proc/self/cgroup": "0::/pod/worker\n",
    "sys/fs/cgroup/pod/memory.max": "5000000\n",
    "sys/fs/cgroup/pod/memory.current": "4000000\n",
    "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 1500000\nactive_file 7\n",
    "sys/fs/cgroup/pod/memory.events": "oom 9\noom_kill 8\noom_group_kill 0\n",
    "sys/fs/cgroup/pod/worker/memory.max": "max\n",
    "sys/fs/cgroup/pod/worker/memory.current": "3900000\n",
    "sys/fs/cgroup/pod/worker/memory.events": "low 0\nmax 6\noom 4\noom_kill 3\n",
}
V1 = {
    **MACHINE,
    "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu:/docker/1f\n0::/\n",
    "sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes": "5000000\n",
    "sys/fs/cgroup/memory/docker/1f/memory.usage_in_bytes": "4000000\n",
    "sys/fs/cgroup/memory/docker/1f/memory.stat": "inactive_file 5\ntotal_inactive_file 1500000\n",
    "sys/fs/cgroup/memory/docker/1f/memory.oom_control": "oom_kill_disable 0\noom_kill 3\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000000\n",
    "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 8\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_control_groups_limit_what_is_left_and_count_kills(
    tmp_path: Path, files: dict[str, str]
) -> None:
    root = write_tree(tmp_path, files)
    assert available_memory_bytes(root) == 2500000
    assert count_oom_kills(root) == 3


def test_the_machine_may_have_less_left_than_the_group(tmp_path: Path) -> None:
    assert (
        available_memory_bytes(
            write_tree(tmp_path, V2 | {"proc/meminfo": "MemAvailable: 2000 kB\n"})
        )
        == 2048000
    )


def test_a_container_that_sees_its_own_group_only_counts_there(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/outer/path\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
        },
    )
    assert available_memory_bytes(root) == 0
    assert count_oom_kills(root) == 2


def test_a_machine_that_says_nothing_has_no_figures(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    assert count_oom_kills(tmp_path) is None


class FakeNvml(ModuleType):
    """Two GPUs; process 7 is on both, and each has one of its own."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetHandleByIndex = int
        self.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
            SimpleNamespace(pid=7, usedGpuMemory=100),
            SimpleNamespace(pid=10 + handle, usedGpuMemory=20),
        ]
        self.nvmlDeviceGetGraphicsRunningProcesses = lambda _: list[SimpleNamespace]()


def test_gpu_memory_is_that_of_the_named_processes_by_gpu() -> None:
    reader = GpuReader(nvml=FakeNvml())
    assert gpu_memory_bytes({7, 11}, reader) == {0: 100, 1: 120}
    assert gpu_memory_bytes({10}, reader) == {0: 20}
    assert gpu_memory_bytes({99}, reader) == {}


# Watching.


def test_a_watch_knows_the_last_and_the_largest_figure(start: Start, memory: MemoryWatch) -> None:
    process = start(HOLD.format(8))
    watch = memory.watch(process.pid, None, nobody)
    wait_until(lambda: 8 * MIB < watch.last_bytes < 64 * MIB)
    tell(process, 64)
    wait_until(lambda: watch.last_bytes > 64 * MIB)
    tell(process, 8)
    wait_until(lambda: watch.last_bytes < 64 * MIB)
    assert 64 * MIB < watch.peak_bytes < 96 * MIB
    assert not watch.exceeded


def test_each_tree_is_watched_for_itself(start: Start, memory: MemoryWatch) -> None:
    process, kin = start(HOLD.format(64)), start(FAMILY)
    watch, other = memory.watch(process.pid, None, nobody), memory.watch(kin.pid, None, nobody)
    alone = psutil.Process(kin.pid).memory_info().rss
    wait_until(lambda: watch.last_bytes and other.last_bytes > 2 * alone)
    assert other.last_bytes < 64 * MIB < watch.last_bytes


def test_of_a_process_that_was_killed_the_last_figure_stays(
    start: Start, memory: MemoryWatch
) -> None:
    process = start(HOLD.format(64))
    watch = memory.watch(process.pid, None, nobody)
    wait_until(lambda: watch.last_bytes)
    process.kill()
    time.sleep(0.05)
    end(process)
    wait_until(lambda: not memory._watches)
    assert watch.last_bytes > 64 * MIB


def test_descendants_that_come_later_are_found(start: Start, memory: MemoryWatch) -> None:
    watch = memory.watch(os.getpid(), None, nobody)
    wait_until(lambda: watch.last_bytes)
    before = watch.last_bytes
    start(HOLD.format(64))
    wait_until(lambda: watch.last_bytes > before + 64 * MIB)


def test_who_exceeds_its_limit_is_reported_once(start: Start, memory: MemoryWatch) -> None:
    process = start(HOLD.format(8))
    reports: list[int] = []
    watch = memory.watch(process.pid, 48 * MIB, reports.append)
    wait_until(lambda: watch.last_bytes)
    assert not watch.exceeded
    tell(process, 64)
    wait_until(lambda: reports)
    tell(process, 80)
    time.sleep(0.1)
    assert watch.exceeded
    assert reports == [watch.last_bytes]
    assert 48 * MIB < watch.last_bytes <= watch.peak_bytes < 80 * MIB


def test_a_limit_may_change_while_it_is_watched(start: Start, memory: MemoryWatch) -> None:
    reports: list[int] = []
    watch = memory.watch(start(HOLD.format(32)).pid, None, reports.append)
    wait_until(lambda: watch.last_bytes)
    watch.limit_bytes = 8 * MIB
    wait_until(lambda: reports)


def test_processes_that_share_their_pages_do_not_exceed(start: Start, memory: MemoryWatch) -> None:
    root = start(SHARE)
    watch = memory.watch(root.pid, 192 * MIB, nobody)
    wait_until(lambda: watch.last_bytes > 300 * MIB)
    time.sleep(0.1)
    assert not watch.exceeded
    reports: list[int] = []
    memory.watch(root.pid, 48 * MIB, reports.append)
    wait_until(lambda: reports)
    assert 64 * MIB < reports[0] < 128 * MIB


def test_a_stopped_watch_reports_nothing_and_the_others_go_on(
    start: Start, memory: MemoryWatch
) -> None:
    process = start(HOLD.format(8))
    reports: list[int] = []
    stopped = memory.watch(process.pid, 48 * MIB, nobody)
    memory.watch(process.pid, 48 * MIB, reports.append)
    wait_until(lambda: stopped.last_bytes)
    stopped.stop()
    stopped.stop()
    tell(process, 64)
    wait_until(lambda: reports)
    assert not stopped.exceeded
    assert stopped.last_bytes < 48 * MIB


def test_a_watch_that_was_stopped_meanwhile_makes_no_report(start: Start) -> None:
    memory = MemoryWatch(interval_s=30)
    watch = memory.watch(start(HOLD.format(16)).pid, MIB, nobody)
    watch.stop()
    watch.look()
    watch.judge(1)
    memory.close()
    assert watch.last_bytes > MIB
    assert not watch.exceeded


def test_a_watch_begins_after_a_time_without_any(memory: MemoryWatch) -> None:
    first = memory.watch(os.getpid(), None, nobody)
    wait_until(lambda: first.last_bytes)
    first.stop()
    time.sleep(0.05)
    second = memory.watch(os.getpid(), None, nobody)
    wait_until(lambda: second.last_bytes)


def test_a_watch_may_be_stopped_from_its_own_report(start: Start, memory: MemoryWatch) -> None:
    stopped = threading.Event()

    def stop(_: int) -> None:
        watch.stop()
        stopped.set()

    watch = memory.watch(start(HOLD.format(16)).pid, None, stop)
    watch.limit_bytes = MIB
    assert stopped.wait(20)


def test_the_thread_lives_from_the_first_watch_to_the_end() -> None:
    before = threading.active_count()
    memory = MemoryWatch(interval_s=30)
    assert threading.active_count() == before
    for _ in range(2):
        memory.watch(os.getpid(), 1, nobody)
        assert threading.active_count() == before + 1
    began_s = time.monotonic()
    memory.close()
    memory.close()
    assert time.monotonic() - began_s < 10
    assert threading.active_count() == before


def test_closed_before_its_first_watch_it_is_closed() -> None:
    MemoryWatch().close()


@pytest.mark.parametrize(("program", "watches"), [(HOLD.format(1), 1), (SHARE, 16)])
def test_watching_takes_little_time_however_often_it_is_asked_for(
    start: Start, program: str, watches: int
) -> None:
    memory = MemoryWatch(interval_s=0.0)
    root = start(program)
    all_of_them = [memory.watch(root.pid, 192 * MIB, nobody) for _ in range(watches)]
    wait_until(lambda: all(watch.last_bytes for watch in all_of_them))
    time.sleep(0.5)  # the first exact figure of each comes at once
    spent_s, began_s = time.process_time(), time.monotonic()
    time.sleep(1)
    share = (time.process_time() - spent_s) / (time.monotonic() - began_s)
    memory.close()
    assert share < 0.25, "without its ration it takes a whole core"
