"""Power and energy of the machine, read beside the work by a thread of its own.

Who asks gets the last complete sample and never waits, however long a driver call hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import attrs

from flowmesh_core.telemetry.probes import GpuReader

__all__ = ["PowerSampler"]

_JOULES_PER_KWH = 3_600_000


class RaplReader:
    """Reads what the processor packages have used since the previous reading.

    Only packages count: cores and memory are parts of them, and ``psys`` contains them. A counter
    that cannot be read (most systems reserve it to root) is absent.
    Source: Linux ``Documentation/power/powercap/powercap.rst``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._last_uj: dict[Path, int] = {}

    def used_joules(self) -> float | None:
        """Return the joules since the last call, None if no package was read both times."""
        now_uj = self._counters()
        used = [
            self._difference(package, self._last_uj[package], counter)
            for package, counter in now_uj.items()
            if package in self._last_uj
        ]
        self._last_uj = now_uj
        known = [used_uj for used_uj in used if used_uj is not None]
        return sum(known) / 1e6 if known else None

    def _counters(self) -> dict[Path, int]:
        packages = [
            domain
            for domain in self._root.glob("intel-rapl:*")
            if _read(domain / "name").startswith("package")
        ]
        texts = {package: _read(package / "energy_uj") for package in packages}
        return {package: int(text) for package, text in texts.items() if text.isdecimal()}

    def _difference(self, package: Path, before: int, now: int) -> int | None:
        if now >= before:
            return now - before
        reach = _read(package / "max_energy_range_uj")  # the counter has wrapped
        return now - before + int(reach) if reach.isdecimal() else None


@attrs.frozen(kw_only=True)
class _Series:
    """What one sensor has shown: mean of its samples and energy over time."""

    count: int = 0
    sum_w: float = 0.0
    energy_j: float | None = None

    def add(self, power_w: float | None, used_j: float | None) -> _Series:
        """Take one sample and the energy since the one before; either may be missing."""
        return _Series(
            count=self.count + (power_w is not None),
            sum_w=self.sum_w + (power_w or 0.0),
            energy_j=_total((self.energy_j, used_j)),
        )

    @property
    def mean_w(self) -> float | None:
        return self.sum_w / self.count if self.count else None

    @property
    def energy_kwh(self) -> float | None:
        return None if self.energy_j is None else self.energy_j / _JOULES_PER_KWH


@attrs.frozen(kw_only=True)
class _Snapshot:
    """Everything measured up to one moment; replaced as a whole, so that readers need no lock."""

    timestamp: str
    at_s: float | None = None
    cpu_w: float | None = None
    gpu_w: Mapping[int, float | None] = attrs.field(factory=dict)
    cpu: _Series = _Series()
    gpu: _Series = _Series()
    per_gpu: Mapping[int, _Series] = attrs.field(factory=dict)


class PowerSampler:
    """Samples RAPL and NVML until it is stopped; once stopped, it stays so.

    Args:
        interval_s: Pause between two samples.
        gpu: Where GPU power comes from; None leaves it out. Only the sampler's thread calls it.
        rapl_root: Folder with the kernel's power capping domains.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        interval_s: float = 5.0,
        gpu: GpuReader | None = None,
        rapl_root: Path = Path("/sys/class/powercap"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = interval_s
        self._gpu = gpu
        self._gpu_indexes: list[int] | None = None
        self._rapl = RaplReader(rapl_root)
        self._clock = clock
        self._created_s = clock()
        self._snapshot = _Snapshot(timestamp=_utc_now())
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample, the first time at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flowmesh-power", daemon=True)
            self._thread.start()

    def stop(self, *, timeout_s: float = 1.0) -> None:
        """End sampling; a reading that hangs is left to its daemon thread after ``timeout_s``."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def sample(self) -> None:
        """Take one sample now; once started, only the sampler's own thread may."""
        last, now_s = self._snapshot, self._clock()
        used_j = self._rapl.used_joules()
        gpu_w = self._read_gpus()
        elapsed_s = 0.0 if last.at_s is None else now_s - last.at_s
        cpu_w = used_j / elapsed_s if used_j is not None and elapsed_s > 0 else None
        gpu_j = {
            index: _energy_j(last.gpu_w.get(index), w, elapsed_s) for index, w in gpu_w.items()
        }
        self._snapshot = _Snapshot(
            timestamp=_utc_now(),
            at_s=now_s,
            cpu_w=cpu_w,
            gpu_w=gpu_w,
            cpu=last.cpu.add(cpu_w, used_j),
            gpu=last.gpu.add(_total(gpu_w.values()), _total(gpu_j.values())),
            per_gpu={
                index: last.per_gpu.get(index, _Series()).add(power_w, gpu_j[index])
                for index, power_w in gpu_w.items()
            },
        )

    def latest(self) -> dict[str, object]:
        """Return the last sample as the wire's ``power``; its timestamp tells how old it is."""
        snapshot = self._snapshot
        return {
            "timestamp": snapshot.timestamp,
            "cpu_watts": snapshot.cpu_w,
            "gpu_watts": {
                "total": _total(snapshot.gpu_w.values()),
                "per_gpu": [
                    {"index": index, "power_w": power_w}
                    for index, power_w in snapshot.gpu_w.items()
                ],
            },
        }

    def summary(self) -> dict[str, object]:
        """Return the wire's ``power_summary``; what was never measured is null, not zero."""
        snapshot = self._snapshot
        cpu, gpu = snapshot.cpu, snapshot.gpu
        return {
            "uptime_sec": self._clock() - self._created_s,
            "avg_cpu_watts": cpu.mean_w,
            "avg_gpu_watts": gpu.mean_w,
            "per_gpu_avg_watts": {
                str(index): series.mean_w
                for index, series in snapshot.per_gpu.items()
                if series.mean_w is not None
            },
            "estimated_energy_kwh": _total((cpu.energy_kwh, gpu.energy_kwh)),
            "estimated_energy_breakdown": {"cpu_kwh": cpu.energy_kwh, "gpu_kwh": gpu.energy_kwh},
            "samples": {"cpu": cpu.count, "gpu": gpu.count},
        }

    def _run(self) -> None:
        self.sample()
        while not self._stopping.wait(self._interval_s):
            self.sample()

    def _read_gpus(self) -> dict[int, float | None]:
        """Return watts by GPU; MIG instances share the reading of their GPU."""
        if self._gpu is None:
            return {}
        if self._gpu_indexes is None:
            self._gpu_indexes = sorted({gpu.index for gpu in self._gpu.list_gpus()})
        return {index: self._gpu.power_w(index) for index in self._gpu_indexes}


def _energy_j(before_w: float | None, now_w: float | None, elapsed_s: float) -> float | None:
    """Integrate between two samples by the trapezoidal rule; None where one of them is missing."""
    if before_w is None or now_w is None:
        return None
    return (before_w + now_w) / 2 * elapsed_s


def _total(values: Iterable[float | None]) -> float | None:
    """Add what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _read(path: Path) -> str:
    """Return the file's text without its line end, empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
