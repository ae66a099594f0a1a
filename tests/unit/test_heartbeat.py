from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.telemetry.heartbeat import (
    Heartbeat,
    build_farewell,
    build_metrics,
    next_due_s,
)
from flowmesh_core.telemetry.power import PowerSampler
from flowmesh_core.telemetry.probes import GpuReader
from flowmesh_core.testing import wait_for


class Beats:
    """Counts beats and fails on demand."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.error: Callable[[], Exception | None] = lambda: None

    def __call__(self) -> None:
        self.times_s.append(time.monotonic())
        error = self.error()
        if error is not None:
            raise error

    def wait_for(self, count: int) -> None:
        wait_for(lambda: len(self.times_s) >= count)


@pytest.fixture
def beats() -> Beats:
    return Beats()


@pytest.fixture
def power(tmp_path: Path) -> PowerSampler:
    return PowerSampler(rapl_root=tmp_path)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hanging fakes wait for; set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def start() -> Iterator[Callable[..., Heartbeat]]:
    """Start heartbeats that are stopped when the test is over."""
    started: list[Heartbeat] = []

    def start_one(beat: Callable[[], object], **options: Any) -> Heartbeat:
        heartbeat = Heartbeat(beat, **{"interval_s": 0.02, **options})
        heartbeat.start()
        started.append(heartbeat)
        return heartbeat

    yield start_one
    for heartbeat in started:
        heartbeat.stop(timeout_s=20)


def test_metrics_have_exactly_the_keys_of_the_contract(power: PowerSampler) -> None:
    metrics: Any = json.loads(json.dumps(build_metrics(uptime_s=90, cost_per_hour=4, power=power)))
    assert set(metrics) == {"uptime_sec", "accrued_cost_usd", "loadavg", "power", "power_summary"}
    assert (metrics["uptime_sec"], metrics["accrued_cost_usd"]) == (90, pytest.approx(0.1))
    assert list(metrics["loadavg"]) == ["1m", "5m", "15m"]
    assert all(load >= 0 for load in metrics["loadavg"].values())
    assert metrics["power"] == power.latest()
    assert metrics["power_summary"]["samples"] == {"cpu": 0, "gpu": 0}


def test_energy_is_told_once_it_was_measured(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "name").write_text("package-0\n")
    power = PowerSampler(rapl_root=tmp_path)
    for energy_uj in ("0\n", "7200000000\n"):
        (package / "energy_uj").write_text(energy_uj)
        power.sample()
    metrics = build_metrics(uptime_s=1, cost_per_hour=0, power=power)
    assert metrics["estimated_energy_kwh"] == 0.002


def test_extra_fields_stand_beside_those_of_the_contract(power: PowerSampler) -> None:
    extra = {"kv_cache": 0.5, "uptime_sec": -1, "power": None, "estimated_energy_kwh": 9.0}
    metrics = build_metrics(uptime_s=2, cost_per_hour=0, power=power, extra=extra)
    assert metrics["kv_cache"] == 0.5
    assert metrics["uptime_sec"] == 2
    assert metrics["power"] == power.latest()
    assert "estimated_energy_kwh" not in metrics


def test_the_farewell_settles_the_account(power: PowerSampler) -> None:
    farewell: Any = build_farewell(uptime_s=1800, cost_per_hour=3.0, power=power)
    farewell["power_summary"].pop("uptime_sec")
    expected = power.summary()
    del expected["uptime_sec"]
    assert farewell == {
        "cost_per_hour": 3.0,
        "uptime_sec": 1800,
        "accrued_cost_usd": 1.5,
        "power_summary": expected,
    }


def test_the_first_beat_comes_at_once(beats: Beats, start: Callable[..., Heartbeat]) -> None:
    start(beats, interval_s=3600)
    beats.wait_for(1)


def test_beats_follow_until_stop_and_never_after(
    beats: Beats, start: Callable[..., Heartbeat]
) -> None:
    heartbeat = start(beats)
    heartbeat.start()
    beats.wait_for(4)
    heartbeat.stop(timeout_s=20)
    heartbeat.stop(timeout_s=20)
    count = len(beats.times_s)
    time.sleep(0.1)
    assert len(beats.times_s) == count


def test_beats_keep_their_distance(beats: Beats, start: Callable[..., Heartbeat]) -> None:
    start(beats, interval_s=0.05)
    beats.wait_for(11)
    assert beats.times_s[10] - beats.times_s[0] > 0.2


def test_a_second_start_adds_no_thread(beats: Beats, start: Callable[..., Heartbeat]) -> None:
    before = threading.active_count()
    heartbeat = start(beats)
    heartbeat.start()
    assert threading.active_count() == before + 1


def test_stop_ends_a_long_pause_at_once(beats: Beats, start: Callable[..., Heartbeat]) -> None:
    before = threading.active_count()
    heartbeat = start(beats, interval_s=3600)
    beats.wait_for(1)
    heartbeat.stop(timeout_s=20)
    assert threading.active_count() == before


def test_stop_waits_no_longer_than_it_was_told(
    released: threading.Event, start: Callable[..., Heartbeat]
) -> None:
    beating = threading.Event()

    def hang() -> None:
        beating.set()
        released.wait()

    heartbeat = start(hang)
    assert beating.wait(20)
    began_s = time.monotonic()
    heartbeat.stop(timeout_s=0.05)
    assert time.monotonic() - began_s < 10
    released.set()


def test_a_heartbeat_that_never_started_can_be_stopped(beats: Beats) -> None:
    heartbeat = Heartbeat(beats, interval_s=1)
    heartbeat.stop()
    heartbeat.start()
    heartbeat.stop()
    assert beats.times_s == []


def test_a_raising_beat_is_not_the_last_and_each_text_is_logged_once(
    beats: Beats, start: Callable[..., Heartbeat], caplog: pytest.LogCaptureFixture
) -> None:
    errors = itertools.cycle([ConnectionError("refused"), None, OSError("reset")])
    beats.error = lambda: next(errors)
    with caplog.at_level(logging.WARNING):
        start(beats)
        beats.wait_for(8)
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        "flowmesh-heartbeat failed and goes on: ConnectionError: refused",
        "flowmesh-heartbeat failed and goes on: OSError: reset",
    ]


class Timeline(threading.Event):
    """A clock that moves only by waiting and by what a test says; stands in for the stop event."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now_s += max(timeout, 0)
        return self.is_set()


def test_slow_beats_do_not_drift_and_a_stall_is_not_followed_by_a_burst() -> None:
    timeline = Timeline()
    took_s = iter([3, 9, 0, 25, 3, 10, 0])
    times_s: list[float] = []

    def beat() -> None:
        times_s.append(timeline.now_s)
        timeline.now_s += next(took_s)
        if len(times_s) == 7:
            timeline.set()

    heartbeat = Heartbeat(beat, interval_s=10, clock=lambda: timeline.now_s)
    heartbeat._stopping = timeline
    heartbeat.start()
    heartbeat._beating.join(20)
    assert times_s == [0, 10, 20, 30, 60, 70, 90]


@given(
    due_s=st.integers(0, 10**6),
    late_ms=st.integers(0, 10**7),
    interval_s=st.integers(1, 3600),
)
def test_the_next_beat_lies_on_the_grid_and_within_one_interval(
    due_s: int, late_ms: int, interval_s: int
) -> None:
    now_s = due_s + late_ms / 1000
    due_next_s = next_due_s(due_s, now_s, interval_s)
    assert now_s < due_next_s <= now_s + interval_s
    assert (due_next_s - due_s) % interval_s == 0


def test_extra_fields_are_collected_again_and_again(
    beats: Beats, start: Callable[..., Heartbeat]
) -> None:
    counter = itertools.count()
    heartbeat = start(beats, extra_fields=lambda: {"count": next(counter), "pair": (1, 2)})
    wait_for(lambda: heartbeat.extra.get("count") not in (None, 0, 1))
    assert heartbeat.extra["pair"] == [1, 2]


def test_no_extra_fields_are_an_empty_mapping(
    beats: Beats, start: Callable[..., Heartbeat]
) -> None:
    heartbeat = start(beats)
    beats.wait_for(2)
    assert dict(heartbeat.extra) == {}


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"socket": object()}, "not JSON serializable"),
        ({"load": float("nan")}, "Out of range float values"),
        (17, "'int' object is not iterable"),
    ],
)
def test_bad_extra_fields_are_logged_and_the_last_good_ones_stay(
    beats: Beats,
    start: Callable[..., Heartbeat],
    caplog: pytest.LogCaptureFixture,
    bad: object,
    text: str,
) -> None:
    answers = itertools.chain([{"good": 1}], itertools.repeat(bad))
    asked: list[object] = []

    def fields() -> Any:
        asked.append(None)
        return next(answers)

    heartbeat = start(beats, extra_fields=fields)
    wait_for(lambda: len(asked) >= 4)
    assert dict(heartbeat.extra) == {"good": 1}
    (record,) = caplog.records
    assert record.getMessage().startswith("flowmesh-heartbeat-fields failed and goes on: ")
    assert text in record.getMessage()


def test_hanging_extra_fields_delay_neither_beats_nor_stop(
    beats: Beats, released: threading.Event, start: Callable[..., Heartbeat]
) -> None:
    def hang() -> dict[str, object]:
        released.wait()
        return {}

    heartbeat = start(beats, extra_fields=hang)
    beats.wait_for(5)
    began_s = time.monotonic()
    heartbeat.stop(timeout_s=20)
    assert time.monotonic() - began_s < 10
    assert not released.is_set()


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_call_that_never_returns_delays_no_beat(
    call: str, tmp_path: Path, released: threading.Event, start: Callable[..., Heartbeat]
) -> None:
    nvml = ModuleType("pynvml")
    nvml.NVMLError = pynvml.NVMLError  # type: ignore[attr-defined]
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    hung = threading.Event()

    def hang() -> None:
        hung.set()
        released.wait()
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    setattr(nvml, call, hang)
    power = PowerSampler(gpu=GpuReader(nvml=nvml), rapl_root=tmp_path)
    power.start()
    assert hung.wait(20)
    sent: list[dict[str, object]] = []
    start(lambda: sent.append(build_metrics(uptime_s=1, cost_per_hour=1, power=power)))
    wait_for(lambda: len(sent) >= 5)
    assert sent[4]["power"] == power.latest()
    power.stop(timeout_s=0)
    assert not released.is_set()


def test_beats_carry_the_power_of_this_very_machine(start: Callable[..., Heartbeat]) -> None:
    power = PowerSampler(interval_s=0.01, gpu=GpuReader())
    power.start()
    sent: list[Any] = []
    start(lambda: sent.append(build_metrics(uptime_s=1, cost_per_hour=1, power=power)))
    wait_for(lambda: len(sent) >= 5)
    power.stop(timeout_s=20)
    assert set(sent[-1]["power"]) == {"timestamp", "cpu_watts", "gpu_watts"}
    assert sent[0]["power"]["timestamp"] < sent[-1]["power"]["timestamp"]
