"""One document into single tasks, and the one state machine that every runner uses to run them.

Laws of ``begin`` and ``advance``, whatever the order of reports: every task ends in exactly one
terminal state; none becomes ready before all that it depends on is done, and none twice; as long as
the run is not finished, something is ready.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from graphlib import CycleError, TopologicalSorter
from typing import Any

from attrs import evolve, field, frozen

from flowmesh_core.errors import ContractError
from flowmesh_core.templates import (
    UPSTREAM_KEY,
    Reference,
    graph_template_stages,
    listing,
    map_strings,
    references,
    render,
    type_name,
    walk,
)

__all__ = [
    "PlannedTask",
    "Step",
    "TaskOutcome",
    "TaskState",
    "Workflow",
    "WorkflowState",
    "advance",
    "begin",
    "expand_workflow",
    "render_task",
]

_STRUCTURE = ("stages", "graph", "dependsOn")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")


@frozen(kw_only=True)
class PlannedTask:
    """One task of a workflow, placeholders still in it.

    Attributes:
        task_id: From the caller's ``new_id``.
        name: The stage or node name; empty for a single document.
        document: A complete task document without ``stages``, ``graph`` and ``dependsOn``.
        depends_on: Task ids, declared ones first, then those that references imply.
    """

    task_id: str
    name: str
    document: Mapping[str, Any]
    depends_on: tuple[str, ...] = ()


@frozen(kw_only=True)
class Workflow:
    """The tasks of one document, each after all that it depends on."""

    name: str
    tasks: tuple[PlannedTask, ...]
    staged: bool

    def by_name(self, name: str) -> PlannedTask:
        """Find a task by its stage name; an unknown one raises ``ContractError``."""
        return self._find("stage", name, {task.name: task for task in self.tasks})

    def by_id(self, task_id: str) -> PlannedTask:
        """Find a task by its id; an unknown one raises ``ContractError``."""
        return self._find("task", task_id, {task.task_id: task for task in self.tasks})

    def _find(self, kind: str, key: str, known: Mapping[str, PlannedTask]) -> PlannedTask:
        if key not in known:
            raise ContractError(f"workflow '{self.name}' has no {_unknown(kind, key, known)}")
        return known[key]


def _unknown(kind: str, name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{kind} '{name}'; known: {listing(known)}{hint}"


@frozen(kw_only=True)
class _Node:
    """A stage or node as written; ``declared`` is None where ``dependsOn`` is absent."""

    kind: str
    name: str
    document: Mapping[str, Any]
    declared: tuple[str, ...] | None

    @property
    def label(self) -> str:
        return f"{self.kind} '{self.name}'"


def expand_workflow(document: object, *, new_id: Callable[[], str]) -> Workflow:
    """Turn a parsed document into single tasks: itself, its ``stages`` or its ``graph.nodes``.

    Stages follow one another unless ``dependsOn`` says otherwise (``[]`` makes a root); nodes are
    roots unless it does. A reference to a stage's result is a dependency as well.

    Args:
        document: As YAML or JSON was parsed; it is copied.
        new_id: Called once for each task, in the order of the result, when nothing is wrong.

    Raises:
        ContractError: With every fault found.
    """
    if not isinstance(document, Mapping):
        raise ContractError(f"the document must be a mapping, got {type_name(document)}")
    plain: dict[str, Any] = map_strings(document, str)
    spec, metadata = plain.get("spec"), plain.get("metadata") or {}
    if not isinstance(spec, dict):
        raise ContractError(f"spec must be a mapping, got {type_name(spec)}")
    problems: list[str] = []
    if not isinstance(metadata, dict):
        problems.append(f"metadata must be a mapping, got {type_name(metadata)}")
        metadata = {}
    name = str(metadata.get("name") or "task")
    kind = _choose_kind(spec, problems)
    if spec.get("dependsOn"):
        instead = f"write it inside a {kind}" if kind else "write spec.stages to order tasks"
        problems.append(
            "spec.dependsOn names tasks that only an orchestrator knows,"
            f" got {spec['dependsOn']!r}; {instead}"
        )
    base = {**plain, "spec": {key: spec[key] for key in spec if key not in _STRUCTURE}}
    nodes: list[_Node] = []
    if kind:
        base["metadata"] = {**metadata, "name": name}
        nodes = _read_nodes(kind, _items(kind, spec, problems), base, problems)
    links = _link(nodes, problems)
    order = _sort(nodes, links, problems)
    if problems:
        raise ContractError(problems)
    if not kind:
        task = PlannedTask(task_id=new_id(), name="", document=base)
        return Workflow(name=name, tasks=(task,), staged=False)
    return Workflow(name=name, tasks=_plan(order, links, new_id), staged=True)


def _choose_kind(spec: Mapping[str, Any], problems: list[str]) -> str:
    """Return ``stage``, ``node`` or, for a single document, nothing."""
    if "stages" in spec and "graph" in spec:
        problems.append("spec has both stages and graph; keep one of them")
    return "stage" if "stages" in spec else "node" if "graph" in spec else ""


def _items(kind: str, spec: Mapping[str, Any], problems: list[str]) -> list[object]:
    where, items = "spec.stages", spec.get("stages")
    if kind == "node":
        where, graph = "spec.graph.nodes", spec["graph"]
        items = graph.get("nodes") if isinstance(graph, dict) else None
    if isinstance(items, list) and items:
        return items
    got = "an empty one" if isinstance(items, list) else type_name(items)
    problems.append(f"{where} must be a non-empty list, got {got}")
    return []


def _read_nodes(
    kind: str, items: list[object], base: Mapping[str, Any], problems: list[str]
) -> list[_Node]:
    nodes: dict[str, _Node] = {}
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            problems.append(f"{kind} {number} must be a mapping, got {type_name(item)}")
            continue
        name = item.get("name", item.get("id", f"{kind}-{number}"))
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name) or name == "env":
            problems.append(
                f"{kind} {number}: name must be made of letters, digits, '_' and '-',"
                f" and not be 'env', got {name!r}"
            )
        elif name in nodes:
            problems.append(f"{kind} {number}: name '{name}' is taken; give each {kind} its own")
        else:
            nodes[name] = _read_node(kind, name, item, base, problems)
    return list(nodes.values())


def _read_node(
    kind: str, name: str, item: Mapping[str, Any], base: Mapping[str, Any], problems: list[str]
) -> _Node:
    spec: Any = item.get("spec") or {}
    declared: Any = item.get("dependsOn", [])
    if not isinstance(spec, dict):
        problems.append(f"{kind} '{name}': spec must be a mapping, got {type_name(spec)}")
        spec = {}
    problems += [
        f"{kind} '{name}': {key} cannot stand in its spec; move it out"
        for key in _STRUCTURE
        if key in spec
    ]
    if not _is_names(declared):
        problems.append(
            f"{kind} '{name}': dependsOn must be a list of {kind} names, got {declared!r}"
        )
        declared = []
    document = _merge(base, {"spec": spec})
    document["metadata"] = {**base["metadata"], "name": f"{base['metadata']['name']}:{name}"}
    given = tuple(declared) if "dependsOn" in item else None
    return _Node(kind=kind, name=name, document=document, declared=given)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old: Any = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value
    return merged


def _link(nodes: list[_Node], problems: list[str]) -> dict[str, list[str]]:
    """Map each name to the names it depends on; only sound ones get in."""
    position = {node.name: number for number, node in enumerate(nodes)}
    links: dict[str, list[str]] = {}
    previous = ""
    for node in nodes:
        wanted = [*_declared(node, previous), *_implied(node, position, problems)]
        faults = [_judge(node, name, source, position) for name, source in wanted]
        problems.extend(filter(None, dict.fromkeys(faults)))
        sound = [name for (name, _), fault in zip(wanted, faults, strict=True) if not fault]
        links[node.name] = list(dict.fromkeys(sound))
        previous = node.name
    return links


def _declared(node: _Node, previous: str) -> Iterator[tuple[str, str]]:
    if node.declared is not None:
        yield from ((name, "dependsOn") for name in node.declared)
    elif node.kind == "stage" and previous:
        yield previous, "dependsOn"


def _implied(
    node: _Node, position: Mapping[str, int], problems: list[str]
) -> Iterator[tuple[str, str]]:
    for reference in sorted(references(node.document), key=lambda found: found.text):
        source = f"reference '{reference.text}'"
        if not reference.path:
            problems.append(
                f"{node.label}: {source} has no path; write ${{{node.kind}.path}},"
                " or $${ for a literal ${"
            )
        elif not reference.is_env and (
            reference.path != "task_id" or reference.stage not in position
        ):
            # An id is known from the start, so a stage may name any other's, or its own.
            yield reference.stage, source
    data = node.document["spec"].get("data")
    if isinstance(data, dict) and data.get("type") == "graph_template":
        template = data.get("template")
        stages = graph_template_stages(template) if isinstance(template, dict) else ()
        yield from ((stage, "data.template.columns") for stage in sorted(stages))


def _judge(node: _Node, name: str, source: str, position: Mapping[str, int]) -> str:
    """Say what is wrong with a dependency, or nothing."""
    if name not in position:
        return f"{node.label}: {source} names no {_unknown(node.kind, name, position)}"
    if name == node.name:
        return f"{node.label}: {source} names the {node.kind} itself; remove it"
    if node.kind == "stage" and position[name] > position[node.name]:
        return f"{node.label}: {source} names '{name}', which comes later; move '{name}' before it"
    return ""


def _sort(
    nodes: list[_Node], links: Mapping[str, list[str]], problems: list[str]
) -> tuple[_Node, ...]:
    """Order nodes by their dependencies; stages already are."""
    if any(node.kind == "stage" for node in nodes):
        return tuple(nodes)
    left = dict(links)
    while cycle := _find_cycle(left):
        problems.append(f"nodes wait for one another: {' -> '.join(cycle)}; break the cycle")
        left = {name: left[name] for name in left if name not in cycle}
    by_name = {node.name: node for node in nodes}
    return tuple(by_name[name] for name in TopologicalSorter(left).static_order())


def _find_cycle(links: Mapping[str, list[str]]) -> list[str]:
    """Name one circle in the order in which it would run, or nothing."""
    try:
        TopologicalSorter(links).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _plan(
    order: tuple[_Node, ...], links: Mapping[str, list[str]], new_id: Callable[[], str]
) -> tuple[PlannedTask, ...]:
    ids = {node.name: new_id() for node in order}
    return tuple(
        PlannedTask(
            task_id=ids[node.name],
            name=node.name,
            document=node.document,
            depends_on=tuple(ids[name] for name in links[node.name]),
        )
        for node in order
    )


class TaskState(str, Enum):
    """Where a task of a workflow stands; the last three are terminal."""

    PENDING = "PENDING"
    READY = "READY"
    DONE = "DONE"
    FAILED = "FAILED"
    SKIPPED = "SKIPPED"

    @property
    def is_terminal(self) -> bool:
        """Whether no report changes it any more."""
        return self not in (TaskState.PENDING, TaskState.READY)


@frozen(kw_only=True)
class TaskOutcome:
    """What a runner reports of one task, after its last attempt."""

    task_id: str
    ok: bool
    error: str = ""


@frozen(kw_only=True)
class WorkflowState:
    """How far a run has come; ``states`` and ``errors`` are plain maps by task id.

    Attributes:
        workflow: What runs.
        states: One for each task.
        errors: Texts of the tasks that failed or were skipped.
    """

    workflow: Workflow
    states: Mapping[str, TaskState]
    errors: Mapping[str, str] = field(factory=dict)

    def finished(self) -> bool:
        """Whether every task has reached its last state."""
        return all(state.is_terminal for state in self.states.values())

    def ok(self) -> bool:
        """Whether every task is done."""
        return all(state is TaskState.DONE for state in self.states.values())


@frozen(kw_only=True)
class Step:
    """The state after a report, what to start now, and what will never start because of it."""

    state: WorkflowState
    ready: tuple[PlannedTask, ...] = ()
    skipped: tuple[PlannedTask, ...] = ()


def begin(workflow: Workflow) -> Step:
    """Start a run: the tasks that depend on nothing are ready."""
    states = {task.task_id: TaskState.PENDING for task in workflow.tasks}
    return _release(WorkflowState(workflow=workflow, states=states))


def advance(state: WorkflowState, outcome: TaskOutcome) -> Step:
    """Take a report in; one that comes late or twice changes nothing.

    A failure skips every task that depends on it, near or far, at once.

    Raises:
        ContractError: The task is not of this workflow, or was never ready.
    """
    task = state.workflow.by_id(outcome.task_id)
    current = state.states[task.task_id]
    if current.is_terminal:
        return Step(state=state)
    if current is TaskState.PENDING:
        raise ContractError(
            f"task {task.task_id}: a report came while it waits for others; only start ready tasks"
        )
    if not outcome.ok:
        return _fail(state, task, outcome.error)
    return _release(evolve(state, states={**state.states, task.task_id: TaskState.DONE}))


def _release(state: WorkflowState) -> Step:
    ready = tuple(
        task
        for task in state.workflow.tasks
        if state.states[task.task_id] is TaskState.PENDING
        and all(state.states[name] is TaskState.DONE for name in task.depends_on)
    )
    states = {**state.states, **{task.task_id: TaskState.READY for task in ready}}
    return Step(state=evolve(state, states=states), ready=ready)


def _fail(state: WorkflowState, failed: PlannedTask, error: str) -> Step:
    states, errors = dict(state.states), dict(state.errors)
    states[failed.task_id] = TaskState.FAILED
    errors[failed.task_id] = error
    lost, skipped = {failed.task_id}, []
    # One pass is enough: tasks come after all that they depend on.
    for task in state.workflow.tasks:
        if states[task.task_id] is TaskState.PENDING and not lost.isdisjoint(task.depends_on):
            lost.add(task.task_id)
            skipped.append(task)
            states[task.task_id] = TaskState.SKIPPED
            errors[task.task_id] = f"Dependency {failed.name or failed.task_id} failed"
    after = evolve(state, states=states, errors=errors)
    return Step(state=after, skipped=tuple(skipped))


def render_task(
    workflow: Workflow, task: PlannedTask, documents: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Fill in a task's references and attach what its dependencies left.

    Args:
        workflow: The one the task is of.
        task: Ready to start.
        documents: Stage name to stored result document, of the stages that are done.

    Returns:
        A document of its own; that of a single-document workflow keeps its placeholders.

    Raises:
        ContractError: A reference has no value, or a dependency no document; all of them at once.
    """
    if not workflow.staged:
        return dict(map_strings(task.document, str))
    values: dict[Reference, object] = {}
    problems: list[str] = []
    for reference in sorted(references(task.document), key=lambda found: found.text):
        if not reference.is_env:
            values[reference] = _look_up(workflow, reference, documents, problems)
    names = [workflow.by_id(task_id).name for task_id in task.depends_on]
    problems += [
        f"dependency '{name}' has no stored result" for name in names if name not in documents
    ]
    if problems:
        raise ContractError(problems, where=f"stage '{task.name}'")
    rendered: Any = render(task.document, values.__getitem__)
    if names:
        spec = rendered["spec"]
        given = spec.get(UPSTREAM_KEY)
        kept = given if isinstance(given, dict) else {}
        spec[UPSTREAM_KEY] = {**kept, **{name: documents[name] for name in names}}
    return dict(rendered)


def _look_up(
    workflow: Workflow,
    reference: Reference,
    documents: Mapping[str, Mapping[str, Any]],
    problems: list[str],
) -> object:
    if reference.path == "task_id":
        return workflow.by_name(reference.stage).task_id
    if reference.stage not in documents:
        problems.append(
            f"Missing value for reference '{reference.text}':"
            f" stage '{reference.stage}' has no stored result"
        )
        return None
    try:
        return walk(documents[reference.stage], reference.path, reference=reference.text)
    except ContractError as error:
        problems.extend(error.problems)
        return None
