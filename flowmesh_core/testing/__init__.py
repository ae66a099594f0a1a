"""What authors and operators test with; each name is loaded on first use.

``ExecutorSuite`` checks what every executor must do, ``run_task`` runs one without a queue;
``StoreSuite``, ``PlaceSuite`` and ``TransportSuite`` check drivers; ``ManualClock`` is moved by a
test, and ``recorded_messages`` are what ``parse_message`` must read;
``RedisServer``, ``WorkerProcess`` and ``StandInOrchestrator`` are the real surroundings of a
worker; ``wait_for`` waits for what another process brings about; ``build_tiny_llama``,
``build_lora`` and ``build_smollm2`` make real models. The pytest fixtures of
``flowmesh_core.testing.fixtures`` are there as soon as the package is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, as type checkers and readers see them
    from flowmesh_core.testing.clock import ManualClock as ManualClock
    from flowmesh_core.testing.executor_suite import ExecutorSuite as ExecutorSuite
    from flowmesh_core.testing.harness import TaskRun as TaskRun
    from flowmesh_core.testing.harness import run_task as run_task
    from flowmesh_core.testing.models import build_lora as build_lora
    from flowmesh_core.testing.models import build_smollm2 as build_smollm2
    from flowmesh_core.testing.models import build_tiny_llama as build_tiny_llama
    from flowmesh_core.testing.orchestrator import StandInOrchestrator as StandInOrchestrator
    from flowmesh_core.testing.place_suite import PlaceSuite as PlaceSuite
    from flowmesh_core.testing.redis_server import RedisServer as RedisServer
    from flowmesh_core.testing.store_suite import Remote as Remote
    from flowmesh_core.testing.store_suite import StoreSuite as StoreSuite
    from flowmesh_core.testing.transport_suite import TransportSuite as TransportSuite
    from flowmesh_core.testing.transport_suite import Wire as Wire
    from flowmesh_core.testing.waiting import wait_for as wait_for
    from flowmesh_core.testing.wire_messages import recorded_messages as recorded_messages
    from flowmesh_core.testing.worker_process import WorkerProcess as WorkerProcess

__all__ = [
    "ExecutorSuite",
    "ManualClock",
    "PlaceSuite",
    "RedisServer",
    "Remote",
    "StandInOrchestrator",
    "StoreSuite",
    "TaskRun",
    "TransportSuite",
    "Wire",
    "WorkerProcess",
    "build_lora",
    "build_smollm2",
    "build_tiny_llama",
    "recorded_messages",
    "run_task",
    "wait_for",
]

_HOME = {
    "ExecutorSuite": "executor_suite",
    "ManualClock": "clock",
    "PlaceSuite": "place_suite",
    "RedisServer": "redis_server",
    "Remote": "store_suite",
    "StandInOrchestrator": "orchestrator",
    "StoreSuite": "store_suite",
    "TaskRun": "harness",
    "TransportSuite": "transport_suite",
    "Wire": "transport_suite",
    "WorkerProcess": "worker_process",
    "build_lora": "models",
    "build_smollm2": "models",
    "build_tiny_llama": "models",
    "recorded_messages": "wire_messages",
    "run_task": "harness",
    "wait_for": "waiting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
