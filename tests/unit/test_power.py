from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml
import pytest

from flowmesh_core.telemetry.power import PowerSampler
from flowmesh_core.telemetry.probes import GpuReader
from flowmesh_core.testing import wait_for

JOULES_PER_KWH = 3_600_000
NO_POWER: dict[str, Any] = {"cpu_watts": None, "gpu_watts": {"total": None, "per_gpu": []}}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Rapl:
    """A powercap folder as the kernel lays it out, with counters that a test moves."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def set(self, domain: str, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> None:
        folder = self.root / domain
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


class FakeNvml(ModuleType):
    """GPUs whose watts a test sets, None for unreadable; readings wait for ``may_return``."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *watts: float | None) -> None:
        super().__init__("pynvml")
        self.watts = list(watts)
        self.reading = threading.Event()
        self.may_return = threading.Event()
        self.may_return.set()
        self.nvmlInit = lambda: None
        self.nvmlDeviceGetCount = lambda: len(self.watts)
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetName = lambda handle: "GPU"
        self.nvmlDeviceGetUUID = lambda handle: f"GPU-{handle}"
        self.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=1)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802 - NVML's name
        self.reading.set()
        self.may_return.wait()
        watts = self.watts[handle]
        if watts is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(watts * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rapl(tmp_path: Path) -> Rapl:
    return Rapl(tmp_path / "powercap")


@pytest.fixture
def sampler(rapl: Rapl, clock: Clock) -> PowerSampler:
    return PowerSampler(rapl_root=rapl.root, clock=clock)


@pytest.fixture
def hanging() -> Iterator[FakeNvml]:
    nvml = FakeNvml(100.0)
    nvml.may_return.clear()
    yield nvml
    nvml.may_return.set()


def latest(sampler: PowerSampler) -> dict[str, Any]:
    power: dict[str, Any] = sampler.latest()
    assert list(power) == ["timestamp", "cpu_watts", "gpu_watts"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(power.pop("timestamp"))
    assert timedelta(0) <= age < timedelta(minutes=5)
    return power


def summary(sampler: PowerSampler) -> dict[str, Any]:
    return dict(sampler.summary())


def test_nothing_measured_is_null_and_never_zero(sampler: PowerSampler, clock: Clock) -> None:
    assert latest(sampler) == NO_POWER
    sampler.sample()
    clock.now_s += 60
    sampler.sample()
    assert latest(sampler) == NO_POWER
    assert summary(sampler) == {
        "uptime_sec": 60.0,
        "avg_cpu_watts": None,
        "avg_gpu_watts": None,
        "per_gpu_avg_watts": {},
        "estimated_energy_kwh": None,
        "estimated_energy_breakdown": {"cpu_kwh": None, "gpu_kwh": None},
        "samples": {"cpu": 0, "gpu": 0},
    }


def test_cpu_power_adds_packages_and_nothing_that_they_contain(
    sampler: PowerSampler, rapl: Rapl, clock: Clock
) -> None:
    for second, energy_uj in enumerate((5_000_000, 905_000_000)):
        rapl.set("intel-rapl:0", "package-0", energy_uj)
        rapl.set("intel-rapl:1", "package-1", 2 * energy_uj)
        rapl.set("intel-rapl:0:0", "core", 7 * energy_uj)
        rapl.set("intel-rapl:2", "psys", 11 * energy_uj)
        clock.now_s += 10 * second
        sampler.sample()
    assert latest(sampler)["cpu_watts"] == 270.0
    assert summary(sampler)["estimated_energy_breakdown"]["cpu_kwh"] == 2700 / JOULES_PER_KWH
    assert summary(sampler)["samples"] == {"cpu": 1, "gpu": 0}


def test_a_counter_that_wraps_loses_no_energy(
    sampler: PowerSampler, rapl: Rapl, clock: Clock
) -> None:
    for energy_uj in (900_000_000, 100_000_000, 300_000_000):
        rapl.set("intel-rapl:0", "package-0", energy_uj, range_uj=1_000_000_000)
        clock.now_s += 4
        sampler.sample()
    assert latest(sampler)["cpu_watts"] == 50.0
    assert summary(sampler)["estimated_energy_kwh"] == 400 / JOULES_PER_KWH


def test_a_wrap_of_unknown_range_is_left_out(
    sampler: PowerSampler, rapl: Rapl, clock: Clock
) -> None:
    for energy_uj in (900_000_000, 100_000_000):
        rapl.set("intel-rapl:0", "package-0", energy_uj)
        (rapl.root / "intel-rapl:0" / "max_energy_range_uj").unlink()
        clock.now_s += 4
        sampler.sample()
    assert latest(sampler) == NO_POWER
    assert summary(sampler)["estimated_energy_kwh"] is None


def test_a_counter_that_cannot_be_read_is_absent(
    sampler: PowerSampler, rapl: Rapl, clock: Clock
) -> None:
    rapl.set("intel-rapl:0", "package-0", 1)
    counter = rapl.root / "intel-rapl:0" / "energy_uj"
    counter.unlink()
    counter.mkdir()  # unlike a file without permissions, unreadable to root as well
    sampler.sample()
    clock.now_s += 1
    sampler.sample()
    assert latest(sampler) == NO_POWER


def test_a_counter_that_disappears_spoils_no_neighbour(
    sampler: PowerSampler, rapl: Rapl, clock: Clock
) -> None:
    rapl.set("intel-rapl:0", "package-0", 0)
    rapl.set("intel-rapl:1", "package-1", 0)
    sampler.sample()
    clock.now_s += 1
    rapl.set("intel-rapl:0", "package-0", 30_000_000)
    (rapl.root / "intel-rapl:1" / "energy_uj").unlink()
    sampler.sample()
    assert latest(sampler)["cpu_watts"] == 30.0
    rapl.set("intel-rapl:1", "package-1", 500_000_000)
    clock.now_s += 1
    sampler.sample()
    assert summary(sampler)["estimated_energy_kwh"] == 30 / JOULES_PER_KWH


def test_gpu_energy_is_integrated_between_samples(rapl: Rapl, clock: Clock) -> None:
    nvml = FakeNvml(100.0, 40.0, None)
    sampler = PowerSampler(gpu=GpuReader(nvml=nvml), rapl_root=rapl.root, clock=clock)
    sampler.sample()
    assert summary(sampler)["estimated_energy_kwh"] is None
    nvml.watts = [300.0, None, None]
    clock.now_s += 10
    sampler.sample()
    assert latest(sampler)["gpu_watts"] == {
        "total": 300.0,
        "per_gpu": [
            {"index": 0, "power_w": 300.0},
            {"index": 1, "power_w": None},
            {"index": 2, "power_w": None},
        ],
    }
    told = summary(sampler)
    assert told["avg_gpu_watts"] == 220.0
    assert told["per_gpu_avg_watts"] == {"0": 200.0, "1": 40.0}
    assert told["samples"] == {"cpu": 0, "gpu": 2}
    assert told["estimated_energy_breakdown"] == {
        "cpu_kwh": None,
        "gpu_kwh": 2000 / JOULES_PER_KWH,
    }
    assert told["estimated_energy_kwh"] == 2000 / JOULES_PER_KWH


def test_energy_of_cpu_and_gpu_adds_up(rapl: Rapl, clock: Clock) -> None:
    sampler = PowerSampler(gpu=GpuReader(nvml=FakeNvml(50)), rapl_root=rapl.root, clock=clock)
    for energy_uj in (0, 600_000_000):
        rapl.set("intel-rapl:0", "package-0", energy_uj)
        clock.now_s += 10
        sampler.sample()
    breakdown = {"cpu_kwh": 600 / JOULES_PER_KWH, "gpu_kwh": 500 / JOULES_PER_KWH}
    assert summary(sampler)["estimated_energy_breakdown"] == breakdown
    assert summary(sampler)["estimated_energy_kwh"] == pytest.approx(1100 / JOULES_PER_KWH)


def test_only_visible_gpus_count(rapl: Rapl, clock: Clock) -> None:
    reader = GpuReader(nvml=FakeNvml(100.0, 40.0), visible_devices="1")
    sampler = PowerSampler(gpu=reader, rapl_root=rapl.root, clock=clock)
    sampler.sample()
    assert latest(sampler)["gpu_watts"]["per_gpu"] == [{"index": 1, "power_w": 40.0}]


def test_a_started_sampler_goes_on_until_it_is_stopped(rapl: Rapl) -> None:
    gpu = GpuReader(nvml=FakeNvml(100.0))
    sampler = PowerSampler(interval_s=0.01, gpu=gpu, rapl_root=rapl.root)
    before = threading.active_count()
    sampler.start()
    sampler.start()
    assert threading.active_count() == before + 1
    wait_for(lambda: summary(sampler)["samples"]["gpu"] >= 3)
    sampler.stop(timeout_s=20)
    sampler.stop(timeout_s=20)
    assert threading.active_count() == before
    assert summary(sampler)["avg_gpu_watts"] == pytest.approx(100.0)
    assert summary(sampler)["estimated_energy_kwh"] > 0


def test_stopping_a_sampler_that_never_started_is_allowed(sampler: PowerSampler) -> None:
    sampler.stop()
    assert latest(sampler) == NO_POWER


def test_stop_does_not_wait_out_the_interval(rapl: Rapl) -> None:
    sampler = PowerSampler(interval_s=3600, rapl_root=rapl.root)
    before = threading.active_count()
    sampler.start()
    sampler.stop(timeout_s=20)
    assert threading.active_count() == before


def test_a_hanging_driver_blocks_no_reader_and_no_stop(rapl: Rapl, hanging: FakeNvml) -> None:
    sampler = PowerSampler(interval_s=0.01, gpu=GpuReader(nvml=hanging), rapl_root=rapl.root)
    sampler.start()
    assert hanging.reading.wait(20)
    began_s = time.monotonic()
    assert latest(sampler) == NO_POWER
    assert summary(sampler)["samples"] == {"cpu": 0, "gpu": 0}
    sampler.stop(timeout_s=0.05)
    assert time.monotonic() - began_s < 10
    assert not hanging.may_return.is_set()


def test_the_last_sample_stays_while_the_driver_hangs(rapl: Rapl) -> None:
    nvml = FakeNvml(100.0)
    sampler = PowerSampler(interval_s=0.01, gpu=GpuReader(nvml=nvml), rapl_root=rapl.root)
    sampler.start()
    wait_for(lambda: summary(sampler)["samples"]["gpu"])
    nvml.may_return.clear()
    nvml.reading.clear()
    assert nvml.reading.wait(20)
    assert latest(sampler)["gpu_watts"]["total"] == 100.0
    nvml.may_return.set()
    sampler.stop(timeout_s=20)


@pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists() or Path("/sys/class/powercap/intel-rapl:0").exists(),
    reason="this machine has sensors",
)
def test_this_machine_without_sensors_reports_none() -> None:
    sampler = PowerSampler(gpu=GpuReader())
    sampler.sample()
    sampler.sample()
    assert latest(sampler) == NO_POWER
    assert summary(sampler)["estimated_energy_kwh"] is None
