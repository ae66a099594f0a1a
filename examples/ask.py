"""A plugin in one file that asks an OpenAI-compatible endpoint; ``serve_and_use.yaml`` uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from flowmesh_core import Executor, ExecutorInfo, RunContext, hookimpl


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare the executor."""
    return [ExecutorInfo(name="example.ask", task_types={"example.ask"}, target=f"{__name__}:Ask")]


class Ask(Executor):
    """Asks one question after the other."""

    def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Return one item per question."""
        items = []
        for question in ctx.spec["questions"]:
            ctx.check()
            items.append({"prompt": question, "output": self._ask(ctx.spec, question)})
        return {"ok": True, "items": items}

    def _ask(self, spec: Mapping[str, Any], question: str) -> str:
        body = {
            "model": spec["model"],
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": question},
            ],
            "temperature": 0,
            "max_tokens": 64,
        }
        url = f"{spec['endpoint']}/chat/completions"
        answer = httpx.post(url, json=body, timeout=60, trust_env=False).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])
