"""The heartbeat: a beat every interval, whatever sensors, plugins or one failed beat do.

A worker whose beats stop is declared dead and its task given away, so the beating thread does
nothing slow but send.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from flowmesh_core.telemetry.power import PowerSampler

__all__ = ["Heartbeat", "build_farewell", "build_metrics"]

_log = logging.getLogger(__name__)

_METRIC_KEYS = frozenset(
    {"uptime_sec", "accrued_cost_usd", "loadavg", "power", "power_summary", "estimated_energy_kwh"}
)
_MESSAGES_KEPT = 100


def build_metrics(
    *,
    uptime_s: float,
    cost_per_hour: float,
    power: PowerSampler,
    extra: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, object]:
    """Build the ``metrics`` of one HEARTBEAT without waiting for anything.

    Args:
        uptime_s: Seconds since the worker started.
        cost_per_hour: US dollars.
        power: Its last sample is used.
        extra: Fields put beside those of the contract; the contract's own keys are left out of it.
    """
    summary = power.summary()
    metrics = {key: value for key, value in extra.items() if key not in _METRIC_KEYS}
    metrics |= {
        "uptime_sec": uptime_s,
        "accrued_cost_usd": _accrued_usd(cost_per_hour, uptime_s),
        "loadavg": _load_averages(),
        "power": power.latest(),
        "power_summary": summary,
    }
    if summary["estimated_energy_kwh"] is not None:
        metrics["estimated_energy_kwh"] = summary["estimated_energy_kwh"]
    return metrics


def build_farewell(
    *, uptime_s: float, cost_per_hour: float, power: PowerSampler
) -> dict[str, object]:
    """Build the ``payload`` of UNREGISTER: what the worker has cost in all, in US dollars."""
    return {
        "cost_per_hour": cost_per_hour,
        "uptime_sec": uptime_s,
        "accrued_cost_usd": _accrued_usd(cost_per_hour, uptime_s),
        "power_summary": power.summary(),
    }


class Heartbeat:
    """Calls ``beat`` at once and then every ``interval_s``; once stopped, it stays so.

    Args:
        beat: Sends one beat, in the heartbeat's thread. It may raise; the next beat comes anyway.
        interval_s: From one beat to the next, without drift; beats missed in a stall are left out.
        extra_fields: Asked every interval in another thread, so that it may be slow or hang; what
            it returned last is ``extra``. It must be JSON.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        beat: Callable[[], object],
        *,
        interval_s: float,
        extra_fields: Callable[[], Mapping[str, object]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._stopping = threading.Event()
        self._started = False
        self._extra_fields = extra_fields
        self._extra: Mapping[str, object] = MappingProxyType({})
        self._beating = self._thread("flowmesh-heartbeat", beat)
        self._collecting = self._thread("flowmesh-heartbeat-fields", self._collect)

    @property
    def extra(self) -> Mapping[str, object]:
        """What ``extra_fields`` returned last, empty until it has; reading it never waits."""
        return self._extra

    def start(self) -> None:
        """Begin to beat; a second call changes nothing."""
        if self._started:
            return
        self._started = True
        if self._extra_fields is not None:
            self._collecting.start()
        self._beating.start()

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """End the beats and wait for one in progress, at most ``timeout_s``.

        Extra fields that are being collected are left to their daemon thread.
        """
        self._stopping.set()
        if self._started:
            self._beating.join(timeout_s)

    def _thread(self, name: str, call: Callable[[], object]) -> threading.Thread:
        return threading.Thread(target=self._repeat, args=(name, call), name=name, daemon=True)

    def _repeat(self, name: str, call: Callable[[], object]) -> None:
        logged: set[str] = set()
        due_s = self._clock()
        while not self._stopping.is_set():
            try:
                call()
            except Exception as exc:  # noqa: BLE001 - one failed beat must not be the last
                _log_once(logged, name, exc)
            due_s = next_due_s(due_s, self._clock(), self._interval_s)
            self._stopping.wait(due_s - self._clock())

    def _collect(self) -> None:
        if self._extra_fields is not None:
            # Through text: what is no JSON fails here, not in the beat, and the copy is ours.
            self._extra = json.loads(json.dumps(dict(self._extra_fields()), allow_nan=False))


def next_due_s(due_s: float, now_s: float, interval_s: float) -> float:
    """Return the first moment after ``now_s`` that lies whole intervals after ``due_s``."""
    return due_s + (math.floor((now_s - due_s) / interval_s) + 1) * interval_s


def _log_once(logged: set[str], name: str, exc: Exception) -> None:
    """Warn of a failure that repeats every interval only when its text is new."""
    text = f"{type(exc).__name__}: {exc}"
    if text in logged:
        return
    if len(logged) >= _MESSAGES_KEPT:  # texts that never repeat must not fill the memory
        logged.clear()
    logged.add(text)
    _log.warning("%s failed and goes on: %s", name, text, exc_info=exc)


def _accrued_usd(cost_per_hour: float, uptime_s: float) -> float:
    return cost_per_hour / 3600 * uptime_s


def _load_averages() -> dict[str, float | None]:
    try:
        one, five, fifteen = os.getloadavg()
    except OSError:
        return {"1m": None, "5m": None, "15m": None}
    return {"1m": one, "5m": five, "15m": fifteen}
