"""Declares the executor ``llamacpp``; imports no engine."""

from __future__ import annotations

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

ENGINE_KEY = ("model.source", "model.llamacpp", "model.adapters", "checkpoint.load")


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare the one executor of this distribution.

    BATCH_INVARIANT is left out on purpose: llama.cpp multiplies unquantized weights (F16, BF16,
    F32) by other kernels when several prompts share a step, which moves the last bits.
    """
    return [
        ExecutorInfo(
            name="llamacpp",
            task_types={"inference"},
            target="flowmesh_llamacpp.executor:LlamacppExecutor",
            needs=["xllamacpp"],
            install="pip install flowmesh-llamacpp",
            capabilities={Capability.CPU, Capability.CONCURRENT},
            spec="flowmesh_llamacpp.spec:LlamacppSpec",
            inputs={"rows", "model", "adapters", "checkpoint"},
            model_formats={"gguf"},
            variables=["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"],
            engine_key=ENGINE_KEY,
            group_key=ENGINE_KEY,  # sampling belongs to each prompt, so that any members agree
        )
    ]
