"""What a worker says about itself: that it is there, how it is, what it does, that it leaves."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from flowmesh_core.config import Settings
from flowmesh_core.events import (
    HEARTBEAT,
    REGISTER,
    STATUS,
    TASK_PROGRESS,
    UNREGISTER,
    LogChunk,
    TaskEvent,
    WorkerEvent,
)
from flowmesh_core.plugins import Plugins
from flowmesh_core.telemetry.heartbeat import Heartbeat, build_farewell, build_metrics
from flowmesh_core.telemetry.power import PowerSampler
from flowmesh_core.telemetry.probes import GpuReader, probe_hardware
from flowmesh_core.transports.base import Transport
from flowmesh_core.wire import utc_now

__all__ = ["Presence"]

_log = logging.getLogger(__name__)
_PROBE_S = 20.0


class Presence:
    """Speaks for one worker; its methods may be called from any thread.

    Args:
        settings: Who the worker is.
        transport: Carries what is said.
        plugins: Named in the registration; some add fields to the heartbeat.
        gpus: Where GPU power is read, or None.
    """

    def __init__(
        self,
        settings: Settings,
        transport: Transport,
        plugins: Plugins,
        *,
        gpus: GpuReader | None,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._plugins = plugins
        self._started, self._started_at = time.monotonic(), utc_now()
        self._announced = False
        self._power = PowerSampler(gpu=gpus)
        self._heartbeat = Heartbeat(
            self._beat,
            interval_s=settings.heartbeat_interval_s,
            extra_fields=plugins.heartbeat_fields,
        )

    async def announce(self) -> None:
        """Register, say IDLE and begin to beat."""
        self._power.start()
        hardware = await self._probe()
        payload = {
            "env": {},
            "hardware": hardware,
            "cost_per_hour": self._settings.cost_per_hour,
            "power_metrics": self._power.latest(),
            "started_at": self._started_at,
            "pid": os.getpid(),
            "executors": [info.to_dict() for info in self._plugins.executors],
            "plugins": [report.to_wire() for report in self._plugins.reports],
        }
        tags = list(self._settings.worker_tags)
        self._say_of_worker(
            WorkerEvent(type=REGISTER, status="STARTING", tags=tags, payload=payload)
        )
        self.say_status(full=False)
        self._announced = True
        self._heartbeat.start()

    async def _probe(self) -> Mapping[str, Any]:
        """Describe the machine; a driver that hangs costs the description, not the start."""
        probing = asyncio.to_thread(
            probe_hardware,
            network_bandwidth_bytes_per_s=self._settings.network_bandwidth_bytes_per_s,
            visible_devices=self._settings.visible_devices,
        )
        try:
            return await asyncio.wait_for(probing, _PROBE_S)
        except asyncio.TimeoutError:
            _log.error("the hardware did not answer within %g s; registering without it", _PROBE_S)
            return {}

    def withdraw(self) -> None:
        """Stop the beats and unregister; harmless when never announced."""
        self._heartbeat.stop()
        self._power.stop()
        if not self._announced:
            return
        self._announced = False
        payload = build_farewell(
            uptime_s=time.monotonic() - self._started,
            cost_per_hour=self._settings.cost_per_hour,
            power=self._power,
        )
        self._say_of_worker(WorkerEvent(type=UNREGISTER, payload=payload))

    def say_status(self, *, full: bool, **payload: Any) -> None:
        """Say RUNNING when every slot is taken, else IDLE: then another task may come."""
        status = "RUNNING" if full else "IDLE"
        self._say_of_worker(WorkerEvent(type=STATUS, status=status, payload=payload))

    def say_progress(self, task_id: str, values: Mapping[str, Any]) -> None:
        """Pass on what an executor reported."""
        self.say(TaskEvent(type=TASK_PROGRESS, task_id=task_id, payload=dict(values)))

    def say_output(self, task_id: str, stream: str, offset: int, data: bytes) -> None:
        """Pass on a piece of a task's log."""
        self._transport.send_log(
            LogChunk(
                task_id=task_id,
                worker_id=self._settings.worker_id,
                stream=stream,
                offset=offset,
                data=data,
            )
        )

    def say(self, event: TaskEvent, on_sent: Callable[[], None] | None = None) -> None:
        """Send an event about a task; ``on_sent`` is called, on any thread, once it has left."""
        event.worker_id = self._settings.worker_id
        self._transport.send(event, on_sent)

    def _say_of_worker(self, event: WorkerEvent) -> None:
        event.worker_id = self._settings.worker_id
        self._transport.send(event)

    def _beat(self) -> None:
        metrics = build_metrics(
            uptime_s=time.monotonic() - self._started,
            cost_per_hour=self._settings.cost_per_hour,
            power=self._power,
            extra=self._heartbeat.extra,
        )
        self._say_of_worker(WorkerEvent(type=HEARTBEAT, metrics=metrics))
