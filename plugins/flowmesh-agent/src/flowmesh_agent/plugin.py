"""Declares the executor ``agent``; imports no engine."""

from __future__ import annotations

from flowmesh_core import Capability, ExecutorInfo, hookimpl

__all__ = ["flowmesh_register_executors"]


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare what runs agents.

    There is no ``example``: a model would have to come with it, and that is another executor's.
    CONCURRENT is left out: a tool that hangs ends with the process of its task, and with no other.
    """
    agent = ExecutorInfo(
        name="agent",
        task_types={"agent"},
        target="flowmesh_agent.executor:AgentExecutor",
        needs=["pydantic_ai", "openai", "fastmcp", "jsonschema"],
        install="pip install 'flowmesh-agent[engine]'",
        capabilities={Capability.CPU},
        places=["process"],
        spec="flowmesh_agent.spec:AgentSpec",
        settings="flowmesh_agent.settings:AgentSettings",
        result="flowmesh_agent.spec:AgentResult",
        inputs={"rows"},
        variables=[
            # A `*` leaves out what is named like a secret.
            *("AGENT_LLM_*", "AGENT_LLM_API_KEY", "UTU_LLM_*", "UTU_LLM_API_KEY"),
            *("SERPER_API_KEY", "JINA_API_KEY", "FLOWMESH_HTTP_ALLOW"),
            "PYDANTIC_AI_NO_BANNER=1",
        ],
    )
    return [agent]
