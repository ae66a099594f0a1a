"""Was written for an executor API that does not exist yet; a single-file plugin."""

from __future__ import annotations

from typing import Any

from flowmesh_core import Executor, ExecutorInfo, RunContext, hookimpl


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="broken.Newer",
            task_types={"broken.Newer"},
            target=f"{__name__}:Newer",
            api_version="9.0",
        )
    ]


class Newer(Executor):
    def run(self, ctx: RunContext) -> Any:
        return {}
