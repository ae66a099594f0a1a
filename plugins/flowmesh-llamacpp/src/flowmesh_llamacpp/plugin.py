"""Declares the executors ``llamacpp`` and ``llamacpp.serve``; imports no engine."""

from __future__ import annotations

from typing import Any

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

ENGINE_KEY = ("model.source", "model.llamacpp", "model.adapters", "checkpoint.load")
SHARED: dict[str, Any] = {
    "needs": ["xllamacpp"],
    "install": "pip install flowmesh-llamacpp",
    "model_formats": {"gguf"},
    "variables": ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "FLOWMESH_SERVE_HOSTS"],
}


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what answers prompts and what serves a model over HTTP.

    BATCH_INVARIANT is left out on purpose: llama.cpp multiplies unquantized weights (F16, BF16,
    F32) by other kernels when several prompts share a step, which moves the last bits.
    """
    inference = ExecutorInfo(
        name="llamacpp",
        task_types={"inference"},
        target="flowmesh_llamacpp.executor:LlamacppExecutor",
        capabilities={Capability.CPU, Capability.CONCURRENT},
        spec="flowmesh_llamacpp.spec:LlamacppSpec",
        result="flowmesh_core:InferenceResult",
        example="flowmesh_llamacpp.examples:INFERENCE",
        inputs={"rows", "model", "adapters", "checkpoint"},
        engine_key=ENGINE_KEY,
        group_key=ENGINE_KEY,  # sampling belongs to each prompt, so that any members agree
        **SHARED,
    )
    # Without CONCURRENT no two services share a process, not even those of equal documents.
    serve = ExecutorInfo(
        name="llamacpp.serve",
        task_types={"serve"},
        target="flowmesh_llamacpp.serve:LlamacppServer",
        capabilities={Capability.CPU, Capability.SERVICE},
        spec="flowmesh_llamacpp.spec:LlamacppServeSpec",
        result="flowmesh_core:ServeResult",
        example="flowmesh_llamacpp.examples:SERVE",
        settings="flowmesh_core:ServeSettings",
        inputs={"model", "adapters", "checkpoint"},
        engine_key=(*ENGINE_KEY, "serve"),
        **SHARED,
    )
    return [inference, serve]
