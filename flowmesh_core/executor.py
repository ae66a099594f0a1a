"""The interface between the core and an executor: what one declares, gets and gives back."""

from __future__ import annotations

import enum
import json
import logging
import re
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from typing import Any

import attrs

from flowmesh_core.errors import (
    CancelledError,
    DeadlineError,
    ExecutionError,
    FlowmeshError,
    PluginError,
    PluginLoadError,
)
from flowmesh_core.inputs import Inputs

__all__ = [
    "API_VERSION",
    "OWNER_FIELDS",
    "Artifact",
    "Capability",
    "ChildTask",
    "Executor",
    "ExecutorInfo",
    "Outcome",
    "RunContext",
    "RunResult",
    "as_executor_class",
]

API_VERSION = "1.0"
# Members of ``metadata`` that say whose a task is: nothing is shared across them.
OWNER_FIELDS = ("owner", "namespace", "tenant")
_TARGET = re.compile(r"[\w.]+:\w+\Z")


class Capability(str, enum.Enum):
    """What an executor promises; the core relies on it and the conformance kit checks it."""

    CPU = "cpu"
    """Runs on a machine without a GPU."""
    GPU = "gpu"
    """Uses the GPUs in ``ctx.devices`` when there are any; without CPU beside it, needs one."""
    CONCURRENT = "concurrent"
    """A coroutine ``run`` that may be given several tasks at once."""
    GROUP = "group"
    """Has ``run_group``: takes tasks that agree on ``group_key`` as one batch."""
    BATCH_INVARIANT = "batch_invariant"
    """A task's output does not depend on the tasks that ran beside it."""
    SHRINK = "shrink"
    """May be run once more with a smaller batch after memory ran out."""
    SERVICE = "service"
    """Calls ``ctx.ready``; its task has succeeded then, while ``run`` goes on."""


def _capabilities(values: Iterable[Capability | str]) -> frozenset[Capability]:
    try:
        return frozenset(Capability(value) for value in _ordered(values))
    except ValueError as exc:
        known = ", ".join(sorted(item.value for item in Capability))
        raise PluginError(f"{exc}; known are {known}") from None


def _names(values: Iterable[str]) -> frozenset[str]:
    return frozenset(_ordered(values))


def _ordered(values: Iterable[str]) -> tuple[str, ...]:
    # One name without brackets means that name, not its letters.
    return (values,) if isinstance(values, str) else tuple(values)


@attrs.frozen(kw_only=True)
class ExecutorInfo:
    """A declaration: plain data that is enough to route, check and list without importing.

    Attributes:
        name: Unique among all installed executors; third parties use ``vendor.name``.
        task_types: Values of ``spec.taskType`` that it serves.
        target: ``package.module:Class``, imported when its first task arrives.
        needs: Import names without which it cannot run; looked for, never imported.
        install: The command that installs them.
        capabilities: What it promises.
        places: Drivers of ``flowmesh.places`` in which it may run, preferred first.
        api_version: The ``API_VERSION`` that it was written for.
        spec: ``package.module:Model``, a pydantic model of ``spec``; light to import.
        settings: ``package.module:Model``, a pydantic model that the environment fills.
        result: ``package.module:Model``, a pydantic model of what ``run`` answers.
        example: ``package.module:name`` of a spec that runs within seconds and without a network,
            or of a callable that gets an empty folder, may put files there and returns one.
        inputs: What the core gathers for it before it runs: ``rows``, ``eval_rows``, ``files``,
            ``model``, ``adapters``, ``checkpoint``.
        models: Paths into ``spec`` of what names further models, like ``reward_model``.
        engine_key: Paths into ``spec``; tasks that agree on them share a loaded engine.
            ``model.adapters[apply=merge]`` looks at those entries of a list only.
        group_key: Paths into ``spec``; tasks that agree on them may run as one group.
        model_formats: ``gguf``, ``hf``: what it loads; empty means it loads no model.
        default_model: Environment variable that names the model of tasks that name none.
        variables: Environment variables that its child process keeps; ``NAME_*`` keeps all that
            begin so, and ``NAME=value`` sets what the operator has not set.
        environment: Name of the virtual environment that it was found in; empty for the worker's
            own. Set by discovery, not by authors.
        missing: Packages of ``needs`` that this environment lacks. Set as above.
        priority: Rank among executors of one task type; higher is preferred.
        cpu_priority: The same where it would run on the CPU; ``priority`` when not given.
    """

    name: str
    task_types: frozenset[str] = attrs.field(converter=_names)
    target: str
    needs: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    install: str = ""
    capabilities: frozenset[Capability] = attrs.field(
        default=(Capability.CPU,), converter=_capabilities
    )
    places: tuple[str, ...] = attrs.field(default=("process", "inline"), converter=_ordered)
    api_version: str = API_VERSION
    spec: str = ""
    settings: str = ""
    result: str = ""
    example: str = ""
    inputs: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    models: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    engine_key: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    group_key: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    model_formats: frozenset[str] = attrs.field(default=frozenset(), converter=_names)
    default_model: str = ""
    variables: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    environment: str = ""
    missing: tuple[str, ...] = attrs.field(default=(), converter=_ordered)
    priority: int = 0
    cpu_priority: int | None = None

    def __attrs_post_init__(self) -> None:
        problems = []
        if not self.name or not self.task_types:
            problems.append("name and task_types must not be empty")
        for field in ("target", "spec", "settings", "result", "example"):
            path = getattr(self, field)
            if (path or field == "target") and not _TARGET.match(path):
                problems.append(f"{field} must be 'package.module:Name', got {path!r}")
        if problems:
            raise PluginError(f"executor {self.name!r}: {'; '.join(problems)}")

    @property
    def needs_gpu(self) -> bool:
        """Whether it cannot run without a GPU."""
        return Capability.GPU in self.capabilities and Capability.CPU not in self.capabilities

    def rank(self, *, on_gpu: bool) -> int:
        """Return its priority where it would run."""
        return self.priority if on_gpu or self.cpu_priority is None else self.cpu_priority

    def to_dict(self) -> dict[str, Any]:
        """Return the declaration as JSON data, sets sorted."""
        return attrs.asdict(self, value_serializer=_plain)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExecutorInfo:
        """Build a declaration from ``to_dict``; fields of a later version are ignored.

        Raises:
            PluginError: A field is missing or cannot be read.
        """
        known = {field.name for field in attrs.fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as exc:
            raise PluginError(f"executor {data.get('name')!r} cannot be read: {exc}") from exc


def _plain(_owner: Any, _field: Any, value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(getattr(item, "value", item) for item in value)
    return list(value) if isinstance(value, tuple) else value


def _relative(_owner: Any, _field: Any, value: str) -> None:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"artifact path must lie in the task's folder, got {value!r}")


@attrs.frozen
class Artifact:
    """A file or folder of the task's folder that is to reach the task's destination.

    Attributes:
        path: Relative to ``ctx.folder``.
        result_key: Key of the result whose object gets ``path``, ``url``, ``download_url``. For a
            folder, what its keys begin with; its name when it is empty.
        archive: The path is a folder, to be packed as ``<path>.tar.gz`` beside it. The result of
            ``final_model`` gets ``final_model_path``, ``final_model_archive`` and the rest of the
            contract's keys.
    """

    path: str = attrs.field(validator=_relative)
    result_key: str = ""
    archive: bool = False


def _files(values: Iterable[Artifact]) -> tuple[Artifact, ...]:
    files = tuple(values)
    for file in files:
        if not isinstance(file, Artifact):
            raise TypeError(f"artifacts must be Artifact objects, got {file!r}")
    return files


@attrs.frozen(kw_only=True)
class Outcome:
    """What became of one task: a JSON result, or the error that ended it.

    Attributes:
        result: JSON object, as the task type's result model has it.
        error: Why it failed; None when it succeeded.
        artifacts: Files to ship.
        folder: Of a child task: its folder on the worker. The core sets it.
    """

    result: Mapping[str, Any] = attrs.field(factory=dict)
    error: FlowmeshError | None = None
    artifacts: tuple[Artifact, ...] = attrs.field(default=(), converter=_files)
    folder: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether the task succeeded."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as data that ``from_dict`` reads in another process."""
        return {
            "result": self.result,
            "error": self.error and self.error.to_dict(),
            "artifacts": [attrs.asdict(artifact) for artifact in self.artifacts],
            "folder": self.folder and str(self.folder),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Build an outcome from ``to_dict``."""
        return cls(
            result=data["result"],
            error=data["error"] and FlowmeshError.from_dict(data["error"]),
            artifacts=[Artifact(**fields) for fields in data["artifacts"]],
            folder=data["folder"] and Path(data["folder"]),
        )


RunResult = Outcome | Mapping[str, Any]


class ChildTask:
    """A task that an executor started with ``ctx.run_task``.

    A coroutine awaits it, and ends it when it is cancelled meanwhile; a plain ``run`` calls
    ``result``.
    """

    def __init__(self, future: Future[Outcome]) -> None:
        self._future = future

    def result(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the outcome. Never call this from a coroutine.

        Raises:
            TimeoutError: It has not ended within ``timeout_s``.
        """
        if not wait([self._future], timeout_s).done:
            raise TimeoutError(f"the child task has not ended within {timeout_s} s")
        return self._future.result()

    def cancel(self) -> None:
        """End the task, whose outcome nobody waits for any more; harmless when it has ended."""
        self._future.cancel()

    def __await__(self) -> Generator[Any, None, Outcome]:
        import asyncio  # noqa: PLC0415 - plugins that only declare do not pay for it

        return asyncio.wrap_future(self._future).__await__()


def _as_json(value: Any) -> Any:
    if isinstance(value, (str, int, float, type(None))):
        return value
    try:
        plain = value.item() if hasattr(value, "item") else value
        json.dumps(plain)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return str(value)
    return plain


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for a callback that nobody listens to."""


def _no_children(_spec: Mapping[str, Any]) -> Future[Outcome]:
    raise PluginError("this place cannot run child tasks")


@attrs.define(kw_only=True, eq=False)
class RunContext:
    """All that an executor is told about one task; new fields break no executor.

    Attributes:
        task_id: Plain name.
        task_type: ``spec.taskType``.
        spec: Instance of the declared spec model, or the raw mapping without one. Secrets that
            the document names are resolved in it.
        raw_spec: The document's ``spec`` as it came, secrets still by name.
        metadata: The document's ``metadata``.
        folder: The attempt's own folder; becomes the task's folder when it succeeds.
        final_folder: Where that will lie on the worker then: what a result says of its files.
        inputs: Rows, model and checkpoint, resolved to local paths and descriptors.
        attempt: From 1.
        previous: Folder of an earlier attempt of this task, with its checkpoints, or None.
        settings: Instance of the declared settings model, or None.
        devices: GPU indexes that this task may use; empty on CPU.
        deadline: Seconds on ``clock`` at which the task must have ended, or None.
        clock: Monotonic clock in seconds.
        batch_scale: Factor for batch sizes, 1 or less; 0.5 when memory ran out before and the
            executor declares ``Capability.SHRINK``.
    """

    task_id: str
    task_type: str
    spec: Any
    raw_spec: Mapping[str, Any]
    folder: Path
    final_folder: Path = attrs.Factory(lambda self: self.folder, takes_self=True)
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    inputs: Inputs = attrs.field(factory=Inputs)
    attempt: int = 1
    previous: Path | None = None
    settings: Any = None
    devices: tuple[str, ...] = ()
    deadline: float | None = None
    clock: Callable[[], float]
    batch_scale: float = 1.0
    is_cancelled: Callable[[], bool] = attrs.field(default=lambda: False, repr=False)
    on_progress: Callable[[Mapping[str, Any]], None] = attrs.field(default=_nothing, repr=False)
    on_log: Callable[[str, str], None] = attrs.field(default=_nothing, repr=False)
    on_ready: Callable[[RunResult, float | None], None] = attrs.field(default=_nothing, repr=False)
    start_child: Callable[[Mapping[str, Any]], Future[Outcome]] = attrs.field(
        default=_no_children, repr=False
    )

    @property
    def owner(self) -> str:
        """Whose task it is, as its metadata say; empty when they do not."""
        named = [self.metadata.get(name) for name in OWNER_FIELDS]
        return json.dumps(named) if any(named) else ""

    def progress(
        self,
        fraction: float | None = None,
        message: str = "",
        *,
        step: int | None = None,
        total: int | None = None,
        **values: Any,
    ) -> None:
        """Report progress; cheap, never blocks, from any thread.

        Every report becomes a line of ``metrics.jsonl``; subscribers get the latest one a few
        times a second.

        Args:
            fraction: 0 to 1 and never falling, or None when unknown.
            message: For people.
            step: Units of work done; with ``total`` it gives the fraction.
            total: Units of work in all.
            values: Numbers and texts, such as ``loss`` or ``step``; NumPy and torch scalars are
                taken as numbers, anything else that is no JSON as its text.
        """
        if step is not None:
            values |= {"step": step} if total is None else {"step": step, "total": total}
            if fraction is None and total:
                fraction = min(step / total, 1.0)
        plain = {key: _as_json(value) for key, value in values.items()}
        self.on_progress({"fraction": _as_json(fraction), "message": str(message), **plain})

    def log(self, message: str, *, level: str = "info") -> None:
        """Write one line to the task's log."""
        name = level if isinstance(level, str) else logging.getLevelName(level)
        self.on_log(name, str(message))

    def ready(self, result: RunResult, *, ttl_s: float | None = None) -> None:
        """Say that a service is up: the task has succeeded while ``run`` goes on.

        The service keeps its devices and memory, not its slot, until ``ttl_s`` seconds are over,
        the task is cancelled, its workflow ends or the worker stops; it is then cancelled like
        any task.
        """
        self.on_ready(result, ttl_s)

    def run_task(self, spec: Mapping[str, Any]) -> ChildTask:
        """Run another task on this worker within this task's slot, deadline and cancel."""
        return ChildTask(self.start_child(spec))

    @property
    def cancelled(self) -> bool:
        """Whether the task has been cancelled; look often, and stop soon when it is true."""
        return self.is_cancelled()

    @property
    def remaining_s(self) -> float | None:
        """Seconds left before the deadline, not below 0; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - self.clock())

    def check(self) -> None:
        """Return at once, or raise because the task must stop.

        Raises:
            CancelledError: The task was cancelled.
            DeadlineError: Its time is over.
        """
        if self.cancelled:
            raise CancelledError(f"task {self.task_id} was cancelled")
        if self.remaining_s == 0.0:
            raise DeadlineError(f"task {self.task_id} reached its deadline")


class Executor:
    """Base of all executors. One instance serves one engine key, perhaps for many tasks.

    A subclass defines ``run``, ``run_group`` or both. The core creates an instance for the first
    task of an engine key, calls ``load`` once, then ``run`` for each task that agrees on the key,
    and ``unload`` at the end.
    """

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings

    def run(self, ctx: RunContext) -> RunResult | Awaitable[RunResult]:
        """Do the work of one task; where a subclass does not say how, as a group of one.

        A plain method has its process's main thread, or a thread of its own when it runs inline;
        a coroutine runs on an event loop and must not block it. Files go under ``ctx.folder`` only.

        Returns:
            The result as a mapping, or an ``Outcome`` that also names artifacts.

        Raises:
            FlowmeshError: Raised as it is; its ``retriable`` says whether to try again.
            Exception: Anything else is reported as a failed execution.
        """
        answers = list(self.run_group([ctx]))
        if not answers:
            ctx.check()
        named = [task_id for task_id, _ in answers]
        if named != [ctx.task_id]:
            raise ExecutionError(f"run_group must answer {ctx.task_id!r} once, got answers {named}")
        answer = answers[0][1]
        if isinstance(answer, Outcome) and answer.error is not None:
            raise answer.error
        return answer

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterable[tuple[str, RunResult]]:
        """Do the work of several tasks that agree on ``group_key``; needs ``Capability.GROUP``.

        Called like a plain ``run``. A member that fails alone is yielded with
        ``Outcome(error=...)``; what is raised fails all that have no outcome yet. A member whose
        context is cancelled is left out.

        Returns:
            Task id and answer of each member, once each, as soon as the member has finished.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no run_group")

    def load(self, ctx: RunContext) -> None:
        """Load the engine; called once, before the first ``run``, with that task's context."""

    def sleep(self) -> bool | Awaitable[bool]:
        """Give back what can be given of the GPUs' memory, and keep what makes waking quick.

        Called in a child only, never while a task runs, when another engine needs the room: on
        the main thread or, when ``run`` is a coroutine, on its loop. Host memory may grow. What
        comes next is ``wake`` or ``unload``.

        Returns:
            Whether it sleeps. If not, or when this raises or takes 30 seconds, its process ends.
        """
        return False

    def wake(self) -> Awaitable[None] | None:
        """Undo ``sleep``; called as that is, before the next task, which fails if this raises."""
        return None

    def unload(self) -> None:
        """Free what ``load`` took, asleep or not.

        Comes even after ``run`` raised, and may come twice.
        """


def as_executor_class(found: object, target: str) -> type[Executor]:
    """Return what a declaration's ``target`` names.

    Raises:
        PluginLoadError: It is no ``Executor``, or has neither ``run`` nor ``run_group``.
    """
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise PluginLoadError(f"{target} must be a subclass of flowmesh_core.Executor")
    if found.run is Executor.run and found.run_group is Executor.run_group:
        raise PluginLoadError(f"{target} must define run, or run_group for several tasks at once")
    return found
