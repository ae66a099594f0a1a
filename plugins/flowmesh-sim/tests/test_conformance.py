"""Both executors pass what every executor must."""

from __future__ import annotations

from typing import Any

from flowmesh_core.testing import ExecutorSuite

REFUSED = [
    {"simulate": {"epoch": 3}},
    {"simulate": {"epochs": 0}},
    {"simulate": {"failure": {"kind": "exit", "signal": "SIGKILL"}}},
]
LONG: dict[str, Any] = {"simulate": {"epochs": 1000, "epoch_seconds": [1, 1]}}
VARIANTS = [{"simulate": {"epochs": 3, "time_scale": 0, "seed": seed}} for seed in (1, 2)]


class TestSim(ExecutorSuite):
    executor = "sim"
    refused = REFUSED
    long_spec = LONG


class TestSimShared(ExecutorSuite):
    executor = "sim.shared"
    refused = REFUSED
    long_spec = LONG
    variants = VARIANTS
