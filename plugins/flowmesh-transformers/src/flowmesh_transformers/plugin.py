"""Declares the executor ``transformers``; imports no engine."""

from __future__ import annotations

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]

ENGINE_KEY = (
    "taskType",  # what answers prompts has no vectors
    *("model.source", "model.transformers", "model.adapters", "checkpoint.load"),
)
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "do_sample", "seed", "n", "stop"),
    *("max_tokens", "max_new_tokens", "prompt_format"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what answers prompts and turns texts into vectors.

    Without CONCURRENT and BATCH_INVARIANT: tasks share batches only as a group, and a matrix
    product over more rows moves the last bits of each.
    """
    info = ExecutorInfo(
        name="transformers",
        task_types={"inference", "embedding"},
        target="flowmesh_transformers.executor:TransformersExecutor",
        needs=["torch", "transformers"],
        install="pip install 'flowmesh-transformers[engine]'",
        capabilities={Capability.CPU, Capability.GPU, Capability.SHRINK, Capability.GROUP},
        places=["process"],  # a GPU's number counts those that the process sees
        spec="flowmesh_transformers.spec:TransformersSpec",
        result="flowmesh_transformers.spec:TransformersResult",
        example="flowmesh_transformers.examples:inference",
        settings="flowmesh_transformers.spec:TransformersSettings",
        inputs={"rows", "model", "adapters", "checkpoint"},
        engine_key=ENGINE_KEY,
        group_key=(*ENGINE_KEY, *(f"inference.{name}" for name in SAMPLING), "normalize"),
        model_formats={"hf", "gguf"},
        default_model="HF_MODEL",
        variables=["FLOWMESH_TRUST_REMOTE_CODE"],
        priority=-1,  # without a GPU, an engine made for a format is the better one for it
    )
    return [info]
