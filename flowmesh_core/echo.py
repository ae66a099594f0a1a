"""The executor that gives its spec back: an ordinary plugin, and the shortest example of one."""

from __future__ import annotations

from flowmesh_core.executor import Executor, ExecutorInfo, Outcome, RunContext, RunResult
from flowmesh_core.hookspecs import hookimpl
from flowmesh_core.masking import mask_sensitive

__all__ = ["EchoExecutor", "flowmesh_register_executors"]


EXAMPLE = {"text": "hello"}


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare ``echo``."""
    return [
        ExecutorInfo(
            name="echo",
            task_types={"echo"},
            target="flowmesh_core.echo:EchoExecutor",
            places=["inline"],
            example="flowmesh_core.echo:EXAMPLE",
        )
    ]


class EchoExecutor(Executor):
    """Answers with the task's spec; secrets stay names, credentials are masked."""

    async def run(self, ctx: RunContext) -> RunResult:
        """Return ``{"ok": true, "echo": <spec>}``."""
        return Outcome(result={"ok": True, "echo": mask_sensitive(ctx.raw_spec)})
