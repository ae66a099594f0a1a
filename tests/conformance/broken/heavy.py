"""Imports its engine where it only declares; a single-file plugin."""

from __future__ import annotations

import sqlite3
from typing import Any

from flowmesh_core import Executor, ExecutorInfo, RunContext, hookimpl


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="broken.Heavy",
            task_types={"broken.Heavy"},
            target=f"{__name__}:Heavy",
            needs=["sqlite3"],
        )
    ]


class Heavy(Executor):
    def run(self, ctx: RunContext) -> Any:
        return {"version": sqlite3.sqlite_version}
