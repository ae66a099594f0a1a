"""Declares the executors ``sim`` and ``sim.shared``."""

from __future__ import annotations

import attrs

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare one class twice: with a process for each task that runs, and with one for all."""
    sim = ExecutorInfo(
        name="sim",
        task_types={"simulate"},
        target="flowmesh_sim.executor:SimulatedTraining",
        places=["process"],  # never inline: a crash on demand must not be the worker's
        spec="flowmesh_sim.spec:SimulateSpec",
        result="flowmesh_sim.spec:SimulateResult",
        example="flowmesh_sim.spec:EXAMPLE",
    )
    shared = attrs.evolve(
        sim,
        name="sim.shared",
        capabilities={Capability.CPU, Capability.CONCURRENT},
        priority=-1,  # for documents that say `executor: sim.shared`
    )
    return [sim, shared]
