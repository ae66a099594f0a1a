"""How much memory the executors' processes use, and how much the machine still has.

Source: proc(5), cgroups(7), and the kernel's memory-controller documents of both versions.
"""

from __future__ import annotations

import mmap
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from flowmesh_core.telemetry.probes import GpuReader, control_groups, read_number, read_text

__all__ = [
    "MemoryWatch",
    "Watch",
    "available_memory_bytes",
    "count_oom_kills",
    "gpu_memory_bytes",
    "tree_memory_bytes",
    "tree_pids",
]

_ROOT = Path("/")
_PROC = Path("/proc")
# What is measured rests 200 times as long as it took: three kinds make 1.5 % of a core.
_REST = 200
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def tree_pids(root_pid: int) -> set[int]:
    """Return the process and all its living descendants; empty when it is gone.

    Whom another process has adopted since its parent ended is not among them.
    """
    return _tree(root_pid, _process_table())


def tree_memory_bytes(root_pid: int, *, exact: bool = False) -> int:
    """Return the physical memory of a process and its descendants, 0 when they are gone.

    Args:
        root_pid: The process at the top.
        exact: Count pages once however many processes share them. The kernel then walks all
            pages, about a second for 100 GiB; otherwise each process counts them anew.
    """
    return _memory_bytes(tree_pids(root_pid), exact=exact)


def available_memory_bytes(root: Path = _ROOT) -> int | None:
    """Return what may still be allocated here; None where nothing can be read.

    It is the least of what the machine has and of what each control group has left. File pages
    that nobody used lately do not count as used, since the kernel drops them first.
    """
    machine_kib = _field(root / "proc/meminfo", "MemAvailable:")
    sizes = [None if machine_kib is None else machine_kib * 1024]
    sizes += map(_left_bytes, control_groups(root, "memory"))
    return min((size for size in sizes if size is not None), default=None)


def count_oom_kills(root: Path = _ROOT) -> int | None:
    """Return how many processes of this control group the kernel has killed for want of memory.

    Only the innermost group counts: in version 2 those above it also count their other members'.
    """
    groups = control_groups(root, "memory")
    files = (group / name for group in groups for name in ("memory.events", "memory.oom_control"))
    return next((kills for file in files if (kills := _field(file, "oom_kill")) is not None), None)


def gpu_memory_bytes(pids: Collection[int], reader: GpuReader) -> dict[int, int]:
    """Return the bytes that these processes hold together, by number of the physical GPU."""
    used: dict[int, int] = {}
    for (index, pid), size in reader.process_memory().items():
        if pid in pids:
            used[index] = used.get(index, 0) + size
    return used


class _Ration:
    """Makes a measurement rarer the more processor time it takes.

    Attributes:
        rest_s: How long to wait before the next.
    """

    def __init__(self) -> None:
        self.rest_s = 0.0
        self._due_s = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._due_s

    @contextmanager
    def spend(self, sharers: int = 1) -> Iterator[None]:
        started_s = time.thread_time()
        yield
        self.rest_s = (time.thread_time() - started_s) * _REST * sharers
        self._due_s = time.monotonic() + self.rest_s


@attrs.define(eq=False, kw_only=True)
class Watch:
    """The memory of one tree of processes; it stays readable after the end.

    Attributes:
        last_bytes: The latest sum, in which shared pages count once for each process; exact once
            the limit was exceeded; 0 before the first.
        peak_bytes: The largest such sum.
        limit_bytes: What the tree may use, or None.
        exceeded: Whether it used more, and was reported.
    """

    root_pid: int
    limit_bytes: int | None
    last_bytes: int = 0
    peak_bytes: int = 0
    exceeded: bool = False
    _on_exceeded: Callable[[int], None]
    _forget: Callable[[Watch], bool]
    _pids: set[int]
    _ration: _Ration = attrs.field(factory=_Ration)

    def stop(self) -> None:
        """End it: ``on_exceeded`` is not called any more, or has been. May come twice."""
        self._forget(self)

    def find(self, table: Mapping[int, Collection[int]]) -> None:
        """Look for the tree's processes; without its root there is nothing left to watch."""
        self._pids = _tree(self.root_pid, table)
        if not self._pids:
            self._forget(self)

    def look(self) -> None:
        """Take the sum; one of 0 bytes means that all have ended, and is left out."""
        if size := _memory_bytes(self._pids):
            self._note(size)

    def judge(self, sharers: int) -> None:
        """Report the tree when it uses too much, counted exactly."""
        limit = self.limit_bytes
        if limit is None or self.last_bytes <= limit or not self._ration.is_due():
            return
        with self._ration.spend(sharers):
            size = _memory_bytes(self._pids, exact=True)
        if size > limit and self._forget(self):
            self._note(size)
            self.exceeded = True
            self._on_exceeded(size)

    def _note(self, size: int) -> None:
        self.last_bytes = size
        self.peak_bytes = max(self.peak_bytes, size)


class MemoryWatch:
    """Watches trees of processes from one thread, which takes at most 2 % of a core.

    The thread starts with the first watch and sleeps while there is none. On a machine with
    thousands of processes new descendants are found later than known ones are measured.

    Args:
        interval_s: Seconds between two samples, or more where they are costly.
    """

    def __init__(self, *, interval_s: float = 0.2) -> None:
        self._interval_s = interval_s
        self._watches: set[Watch] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._finding = _Ration()
        self._looking = _Ration()

    def watch(
        self, root_pid: int, limit_bytes: int | None, on_exceeded: Callable[[int], None]
    ) -> Watch:
        """Begin to watch a process with its descendants.

        Args:
            root_pid: The process at the top; the watch ends with it.
            limit_bytes: What all may use together, or None to keep figures only.
            on_exceeded: Is given the bytes in use when they are more than the limit, once. Called
                from the watching thread, it must neither block nor raise nor close this object.
        """
        watch = Watch(
            root_pid=root_pid,
            limit_bytes=limit_bytes,
            on_exceeded=on_exceeded,
            forget=self._forget,
            pids={root_pid},
        )
        with self._changed:
            self._watches.add(watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
                self._thread.start()
            self._changed.notify()
        return watch

    def close(self) -> None:
        """End every watch, then the thread; may come twice. Nothing is watched afterwards."""
        with self._changed:
            self._closed = True
            self._watches.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _forget(self, watch: Watch) -> bool:
        """Drop a watch; only one caller gets True, so a report and a stop exclude each other."""
        with self._changed:
            known = watch in self._watches
            self._watches.discard(watch)
            return known

    def _run(self) -> None:
        while watches := self._wait():
            if self._finding.is_due():
                with self._finding.spend():
                    table = _process_table()
                    for watch in watches:
                        watch.find(table)
            with self._looking.spend():
                for watch in watches:
                    watch.look()
            for watch in watches:
                watch.judge(len(watches))

    def _wait(self) -> list[Watch]:
        """Wait until a sample is due and something is watched; empty once this is closed."""
        pause_s = max(self._interval_s, self._looking.rest_s)
        with self._changed:
            self._changed.wait_for(lambda: self._closed, pause_s)
            self._changed.wait_for(lambda: self._closed or self._watches)
            return [] if self._closed else list(self._watches)


def _process_table() -> dict[int, list[int]]:
    """Return the children of every process."""
    table: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdecimal() and (stat := _read(folder / "stat")):
            # The program's name stands in brackets, and may itself hold brackets and spaces.
            parent = stat.rpartition(b")")[2].split()[1]
            table.setdefault(int(folder.name), [])
            table.setdefault(int(parent), []).append(int(folder.name))
    return table


def _tree(root_pid: int, table: Mapping[int, Collection[int]]) -> set[int]:
    found = {root_pid} & table.keys()
    waiting = list(found)
    while waiting:
        children = set(table[waiting.pop()]) - found
        found |= children
        waiting += children
    return found


def _memory_bytes(pids: Iterable[int], *, exact: bool = False) -> int:
    return sum(map(_unshared_bytes if exact else _resident_bytes, pids))


def _resident_bytes(pid: int) -> int:
    pages = _read(_PROC / str(pid) / "statm").split()
    return int(pages[1]) * mmap.PAGESIZE if pages else 0


def _unshared_bytes(pid: int) -> int:
    """Return the process's part of what it shares, and all of the rest."""
    kib = _field(_PROC / str(pid) / "smaps_rollup", "Pss:")
    return _resident_bytes(pid) if kib is None else kib * 1024


def _left_bytes(group: Path) -> int | None:
    """Return what a control group may still use, None where it has no limit."""
    for limit_file, usage_file, idle in _GROUP_FILES:
        limit = read_number(group / limit_file)
        if limit is not None:
            usage = read_number(group / usage_file) or 0
            return max(0, limit - usage + (_field(group / "memory.stat", idle) or 0))
    return None


def _field(path: Path, name: str) -> int | None:
    """Return the number behind a name at the beginning of a line."""
    found = re.search(rf"^{name}\s+(\d+)", read_text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _read(path: Path) -> bytes:
    """Return the file's content, empty for a process that has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
