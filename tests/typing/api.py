"""The public API as a stranger uses it; checked by type checkers, never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from flowmesh_core import (
    AdapterRef,
    Answer,
    Artifact,
    Capability,
    Choice,
    ContractError,
    Destination,
    Envelope,
    ExecutionError,
    Executor,
    ExecutorInfo,
    ExecutorRegistry,
    FlowmeshError,
    InferenceItem,
    InferenceResult,
    InferenceSpec,
    Inputs,
    Model,
    ModelRef,
    Outcome,
    PluginReport,
    Row,
    RowSource,
    RunContext,
    Settings,
    StrictBlock,
    Task,
    TaskSpec,
    Usage,
    Worker,
    build_item,
    build_messages,
    build_result,
    build_text,
    build_vector_item,
    derive_seed,
    hookimpl,
    load_plugins,
    load_settings,
    normalize,
    parse_envelope,
    parse_message,
    parse_task,
    refuse_fields,
)
from flowmesh_core.events import TaskEvent
from flowmesh_core.places.base import Job, Place
from flowmesh_core.stores.base import Store
from flowmesh_core.testing import TaskRun, run_task
from flowmesh_core.workflow import TaskOutcome, Workflow, advance, begin, expand_workflow


class Voice(StrictBlock):
    """A block of one's own."""

    speed: float = Field(default=1.0, gt=0)


class SpeakSpec(TaskSpec):
    """A spec of one's own."""

    text: str
    voice: Voice = Field(default_factory=Voice)


class EngineModel(Model):
    """A shared block with an engine's own block."""

    acme: Voice = Field(default_factory=Voice)


class EngineSpec(InferenceSpec):
    """A shared spec with that block."""

    model: EngineModel = Field(default_factory=EngineModel)


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Declare executors with any kind of collection."""
    return [
        ExecutorInfo(
            name="acme.speak",
            task_types={"acme.speak"},
            target=f"{__name__}:Speak",
            spec=f"{__name__}:SpeakSpec",
            needs=["acme_engine"],
            capabilities=[Capability.CPU, "concurrent"],
            places=("inline",),
            engine_key=["voice.speed"],
        )
    ]


@hookimpl
def flowmesh_before_task(task_id: str, metadata: Mapping[str, Any]) -> None:
    """Observe with fewer arguments than the hook has."""


@hookimpl
def flowmesh_choose_executor(candidates: Sequence[ExecutorInfo]) -> str | None:
    """Choose."""
    return candidates[0].name if candidates else None


class Speak(Executor):
    """A plain executor."""

    def load(self, ctx: RunContext) -> None:
        """Load."""
        ctx.log(f"loading for {ctx.task_id}")

    def run(self, ctx: RunContext) -> Outcome:
        """Use every kind of member."""
        ctx.check()
        left: float | None = ctx.remaining_s
        ctx.progress(0.5, "half", step=1, left=left)
        if ctx.cancelled:
            raise ExecutionError("stopped", retriable=True)
        path: Path = ctx.folder / "speech.wav"
        earlier: Path | None = ctx.previous
        return Outcome(
            result={"ok": True, "resumed": earlier is not None},
            artifacts=[Artifact(path.name, result_key="speech")],
        )

    def unload(self) -> None:
        """Unload."""


class Answers(Executor):
    """A coroutine that returns a mapping."""

    async def run(self, ctx: RunContext) -> Mapping[str, Any]:
        """Answer rows with shared results and run a child."""
        rows: RowSource | None = ctx.inputs.rows
        items = [answer(row) for row in rows or ()]
        child: Outcome = await ctx.run_task({"taskType": "echo"})
        usage = Usage(num_requests=len(items))
        result = InferenceResult(model=name_of(ctx.inputs), items=items, usage=usage)
        return {**result.model_dump(), "child": child.ok}


def answer(row: Row) -> InferenceItem:
    """Build an item."""
    text = row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"])
    choices = [Choice(output=text.upper(), finish_reason="stop")]
    return InferenceItem(index=row.index, prompt=text, output=text.upper(), choices=choices)


def answer_alike(rows: RowSource, model: ModelRef | None) -> Mapping[str, Any]:
    """Answer in the shape that engines share."""
    items: list[dict[str, Any]] = []
    for row in rows:
        messages: list[dict[str, Any]] = build_messages(row, "Be brief")
        seed: int | None = derive_seed(7, row.index, 0)
        said = Answer(text=f"{messages[-1]['content']} {seed}", finish_reason="stop", tokens=2)
        items.append(build_item(row, build_text(row, None), [said]))
    return build_result(model, items, prompt_tokens=1, completion_tokens=2, latency_s=0.1)


def embed_alike(row: Row, model: ModelRef | None) -> Mapping[str, Any]:
    """Give a vector in the shape that engines share."""
    item: dict[str, Any] = build_vector_item(row, normalize((3, 4)))
    counts = {"prompt_tokens": 1, "completion_tokens": 0}
    return build_result(model, [item], **counts, latency_s=0.1, dimensions=2)


def name_of(inputs: Inputs) -> str:
    """Read references."""
    model: ModelRef | None = inputs.model
    adapters: tuple[AdapterRef, ...] = inputs.adapters
    return "none" if model is None else f"{model.identifier}+{len(adapters)}"


class FolderStore(Store):
    """A destination of one's own."""

    async def upload(
        self, task_id: str, path: Path, final: Path, destination: Destination
    ) -> dict[str, Any]:
        """Ship."""
        return {"url": str(final), "download_url": str(final)}

    async def deliver(
        self, task_id: str, result: Mapping[str, Any], destination: Destination
    ) -> None:
        """Deliver."""


class HerePlace(Place):
    """A place of one's own."""

    async def run(self, job: Job) -> Outcome:
        """Run."""
        load: Callable[[ExecutorInfo], type[Executor]] = self.context.load_class
        executor = load(job.info)(job.ctx.settings)
        answer = executor.run(job.ctx)
        return answer if isinstance(answer, Outcome) else Outcome()

    async def close(self) -> None:
        """Close."""


def test_an_executor() -> str:
    """Run one without a queue and look at what it did."""
    run: TaskRun = run_task(Speak, {"text": "hi"}, info=flowmesh_register_executors()[0])
    error: FlowmeshError | None = run.error
    return "" if error is None else f"{error.code} {error.retriable}"


def read(body: bytes) -> Task:
    """Parse what came over the wire."""
    try:
        envelope: Envelope = parse_envelope(parse_message(body))
    except ContractError as exc:
        first: str = exc.problems[0]
        return parse_task({"metadata": {"why": first}}, task_id="refused")
    return envelope.task


async def work() -> list[str]:
    """Start a worker from code."""
    settings: Settings = load_settings({"WORKER_ID": "w1"}, results_dir=Path("results"))
    plugins = load_plugins(settings)
    reports: tuple[PluginReport, ...] = plugins.reports
    registry = ExecutorRegistry(plugins.executors)
    registry.register(flowmesh_register_executors()[0], Speak)
    worker = Worker(settings, plugins=plugins)
    await worker.run()
    event = TaskEvent.failed("t", ExecutionError("no"), worker_id="w1")
    return [report.name for report in reports] + [event.type]


def plan(document: object) -> bool:
    """Drive a workflow's state machine."""
    workflow: Workflow = expand_workflow(document, new_id=lambda: "t1")
    step = begin(workflow)
    for task in step.ready:
        step = advance(step.state, TaskOutcome(task_id=task.task_id, ok=True))
    return step.state.finished()


def refuse(spec: EngineSpec) -> None:
    """Refuse what an engine cannot do."""
    refuse_fields(spec.inference, ["logprobs"], engine="acme")
