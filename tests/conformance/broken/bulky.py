"""Loads many modules where it only declares; a single-file plugin."""

from __future__ import annotations

import http.server
import xml.dom.minidom
import xmlrpc.client
from typing import Any

from flowmesh_core import Executor, ExecutorInfo, RunContext, hookimpl

USED = (http.server, xml.dom.minidom, xmlrpc.client)


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    name = "broken.Bulky"
    return [ExecutorInfo(name=name, task_types={name}, target=f"{__name__}:Bulky")]


class Bulky(Executor):
    def run(self, ctx: RunContext) -> Any:
        return {"used": len(USED)}
