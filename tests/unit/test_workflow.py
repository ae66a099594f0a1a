from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.errors import ContractError
from flowmesh_core.workflow import (
    PlannedTask,
    Step,
    TaskOutcome,
    TaskState,
    Workflow,
    WorkflowState,
    advance,
    begin,
    expand_workflow,
    render_task,
)


def numbered() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"id-{next(numbers)}"


def expand(document: object) -> Workflow:
    return expand_workflow(document, new_id=numbered())


def staged(*stages: object, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "w"}, "spec": {"taskType": "echo", **spec, "stages": list(stages)}}


def graph(*nodes: object) -> dict[str, Any]:
    return {"metadata": {"name": "w"}, "spec": {"taskType": "echo", "graph": {"nodes": [*nodes]}}}


def links(workflow: Workflow) -> dict[str, list[str]]:
    """Stage name to the names it depends on."""
    return {
        task.name: [workflow.by_id(task_id).name for task_id in task.depends_on]
        for task in workflow.tasks
    }


def problems_of(document: object, *, match: str) -> list[str]:
    with pytest.raises(ContractError, match=match) as caught:
        expand(document)
    return list(caught.value.problems)


class TestSingleDocument:
    def test_it_is_one_task_with_its_placeholders(self) -> None:
        document = {
            "kind": "EchoTask",
            "metadata": {"name": "x"},
            "spec": {"p": "${a.b} ${c} $${d}"},
        }
        workflow = expand(document)
        assert (workflow.name, workflow.staged) == ("x", False)
        [task] = workflow.tasks
        assert (task.task_id, task.name, task.depends_on) == ("id-1", "", ())
        assert task.document == document
        assert render_task(workflow, task, {}) == document

    @pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": {"owner": "o"}}])
    def test_a_nameless_one_is_called_task(self, metadata: dict[str, Any]) -> None:
        assert expand({**metadata, "spec": {}}).name == "task"

    @pytest.mark.parametrize("depends_on", [[], None])
    def test_an_empty_depends_on_leaves_no_trace(self, depends_on: object) -> None:
        workflow = expand({"spec": {"taskType": "echo", "dependsOn": depends_on}})
        assert workflow.tasks[0].document == {"spec": {"taskType": "echo"}}

    @pytest.mark.parametrize("depends_on", [["t-9"], "t-9"])
    def test_a_foreign_task_id_is_refused(self, depends_on: object) -> None:
        with pytest.raises(ContractError, match=r"only an orchestrator knows, got .*t-9.*; write"):
            expand({"spec": {"dependsOn": depends_on}})

    def test_the_argument_may_change_afterwards(self) -> None:
        document: dict[str, Any] = {"spec": {"items": ["a"]}}
        workflow = expand(document)
        document["spec"]["items"].append("b")
        assert workflow.tasks[0].document == {"spec": {"items": ["a"]}}

    def test_a_rendered_document_may_change_afterwards(self) -> None:
        workflow = expand({"spec": {"items": ["a"]}})
        render_task(workflow, workflow.tasks[0], {})["spec"]["items"].append("b")
        assert workflow.tasks[0].document == {"spec": {"items": ["a"]}}


class TestStages:
    def test_each_is_merged_over_the_base(self) -> None:
        document = {
            "apiVersion": "mloc/v1",
            "metadata": {"name": "w", "owner": "o"},
            "spec": {
                "taskType": "inference",
                "model": {"source": {"id": "m"}, "vllm": {"seed": 1}},
                "tags": ["a", "b"],
                "stages": [
                    {"name": "one", "spec": {"model": {"vllm": {"tp": 2}}, "tags": ["c"]}},
                    {"id": "two", "spec": {"taskType": "sft", "model": "n"}},
                    {},
                ],
            },
        }
        before = copy.deepcopy(document)
        workflow = expand(document)
        assert document == before
        assert workflow.staged
        assert [task.document["metadata"] for task in workflow.tasks] == [
            {"name": "w:one", "owner": "o"},
            {"name": "w:two", "owner": "o"},
            {"name": "w:stage-3", "owner": "o"},
        ]
        assert [task.document["spec"] for task in workflow.tasks] == [
            {
                "taskType": "inference",
                "model": {"source": {"id": "m"}, "vllm": {"seed": 1, "tp": 2}},
                "tags": ["c"],
            },
            {"taskType": "sft", "model": "n", "tags": ["a", "b"]},
            {
                "taskType": "inference",
                "model": {"source": {"id": "m"}, "vllm": {"seed": 1}},
                "tags": ["a", "b"],
            },
        ]
        assert workflow.tasks[0].document["apiVersion"] == "mloc/v1"

    def test_nameless_base_is_called_task(self) -> None:
        workflow = expand({"spec": {"stages": [{"name": "a", "spec": None}]}})
        assert workflow.tasks[0].document == {"metadata": {"name": "task:a"}, "spec": {}}

    def test_depends_on_replaces_the_chain(self) -> None:
        workflow = expand(
            staged(
                {"name": "a"},
                {"name": "b"},
                {"name": "c", "dependsOn": []},
                {"name": "d", "dependsOn": ["b", "a", "b"]},
                {"name": "e"},
            )
        )
        assert links(workflow) == {"a": [], "b": ["a"], "c": [], "d": ["b", "a"], "e": ["d"]}

    def test_a_reference_to_a_result_is_a_dependency(self) -> None:
        workflow = expand(
            staged(
                {"name": "a"},
                {"name": "b", "dependsOn": []},
                {"name": "c", "dependsOn": [], "spec": {"x": [{"y": "see ${a.result.z} ${b.q}"}]}},
                {"name": "d", "spec": {"x": "${a.result}"}},
            )
        )
        assert links(workflow) == {"a": [], "b": [], "c": ["a", "b"], "d": ["c", "a"]}

    def test_a_graph_template_column_is_a_dependency(self) -> None:
        columns = [{"expr": "b.result.x"}, {"node": "a", "path": "result"}]
        data = {"type": "graph_template", "template": {"columns": columns}}
        last = {"name": "c", "dependsOn": [], "spec": {"data": data}}
        workflow = expand(staged({"name": "a"}, {"name": "b"}, last))
        assert links(workflow)["c"] == ["a", "b"]
        data["type"] = "list"
        assert links(expand(staged({"name": "a"}, {"name": "b"}, last)))["c"] == []

    def test_a_task_id_may_be_named_by_any_stage_and_orders_nothing(self) -> None:
        spec = {"x": "${a.task_id}${b.task_id}"}
        stages = [{"name": name, "dependsOn": [], "spec": spec} for name in "ab"]
        assert links(expand(staged(*stages))) == {"a": [], "b": []}

    def test_secrets_and_escapes_are_no_stages(self) -> None:
        assert links(expand(staged({"name": "a"}, x="${env.KEY} $${HOME} $${b.c}"))) == {"a": []}

    def test_a_template_that_is_no_mapping_is_left_to_its_reader(self) -> None:
        data = {"type": "graph_template", "template": "x"}
        assert links(expand(staged({"name": "a", "spec": {"data": data}}))) == {"a": []}


class TestGraph:
    def test_nodes_come_in_dependency_order(self) -> None:
        workflow = expand(
            graph(
                {"name": "join", "dependsOn": ["left", "right"]},
                {"id": "left", "dependsOn": ["node-4"]},
                {"name": "right", "spec": {"x": "${node-4.result}"}},
                {},
            )
        )
        names = [task.name for task in workflow.tasks]
        assert sorted(names[1:3]) == ["left", "right"]
        assert (names[0], names[3]) == ("node-4", "join")
        assert links(workflow) == {
            "node-4": [],
            "left": ["node-4"],
            "right": ["node-4"],
            "join": ["left", "right"],
        }
        assert [task.task_id for task in workflow.tasks] == ["id-1", "id-2", "id-3", "id-4"]

    def test_nodes_without_depends_on_are_roots(self) -> None:
        assert links(expand(graph({"name": "a"}, {"name": "b"}))) == {"a": [], "b": []}

    def test_every_cycle_is_named(self) -> None:
        found = problems_of(
            graph(
                {"name": "a", "dependsOn": ["b"]},
                {"name": "b", "spec": {"x": "${a.result}"}},
                {"name": "c", "dependsOn": ["e"]},
                {"name": "d", "dependsOn": ["c"]},
                {"name": "e", "dependsOn": ["d"]},
                {"name": "f", "dependsOn": ["a"]},
            ),
            match="nodes wait for one another",
        )
        assert len(found) == 2
        assert "a -> b -> a" in found[0] or "b -> a -> b" in found[0]
        ring = found[1].split(": ")[1].split("; ")[0].split(" -> ")
        assert ring[0] == ring[-1]
        # In running order: each is what the next one waits for.
        assert set(itertools.pairwise(ring)) == {("c", "d"), ("d", "e"), ("e", "c")}


class TestRefusals:
    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (None, "the document must be a mapping, got null"),
            ([], "the document must be a mapping, got list"),
            ({}, "spec must be a mapping, got null"),
            ({"spec": "echo"}, "spec must be a mapping, got str"),
            ({"metadata": ["x"], "spec": {}}, "metadata must be a mapping, got list"),
            ({"spec": {"stages": {}}}, r"spec\.stages must be a non-empty list, got dict"),
            ({"spec": {"stages": []}}, r"spec\.stages must be a non-empty list, got an empty one"),
            ({"spec": {"graph": None}}, r"spec\.graph\.nodes must be a non-empty list, got null"),
            ({"spec": {"graph": {"nodes": "a"}}}, r"nodes must be a non-empty list, got str"),
            (staged("a"), "stage 1 must be a mapping, got str"),
            (graph({"name": "a"}, None), "node 2 must be a mapping, got null"),
            (staged({"name": "a", "spec": ["x"]}), "stage 'a': spec must be a mapping, got list"),
            (
                staged({"name": "a", "spec": {"dependsOn": ["b"]}}),
                "stage 'a': dependsOn cannot stand in its spec; move it out",
            ),
            (staged({"name": "a", "dependsOn": "b"}), "dependsOn must be a list of stage names, g"),
            (staged({"name": "a", "dependsOn": None}), "list of stage names, got None"),
            (graph({"name": "a", "dependsOn": [1]}), r"list of node names, got \[1\]"),
            (staged({"name": "a", "dependsOn": ["a"]}), "dependsOn names the stage itself"),
            (graph({"name": "a", "dependsOn": ["a"]}), "dependsOn names the node itself"),
            (staged({"name": "a"}, x="${a.result}"), r"'a\.result' names the stage itself"),
            (
                staged({"name": "a", "dependsOn": ["b"]}, {"name": "b", "dependsOn": []}),
                "stage 'a': dependsOn names 'b', which comes later; move 'b' before it",
            ),
            (
                staged({"name": "a", "spec": {"x": "${b.result}"}}, {"name": "b"}),
                r"stage 'a': reference 'b\.result' names 'b', which comes later",
            ),
            (
                staged({"name": "train"}, {"name": "b", "dependsOn": ["trian"]}),
                "'b': dependsOn names no stage 'trian'; known: train, b; did you mean 'train'?",
            ),
            (graph({"name": "a", "dependsOn": ["zzz"]}), r"no node 'zzz'; known: a$"),
            (
                staged({"name": "a", "spec": {"x": "${q.result}"}}),
                r"'q\.result' names no stage 'q'",
            ),
            (staged({"name": "a", "spec": {"x": "${q.task_id}"}}), "names no stage 'q'; known: a"),
            (
                staged({"name": "a", "spec": {"x": "${HOME}"}}),
                r"reference 'HOME' has no path; write \$\{stage\.path\}, or \$\$\{ for a literal",
            ),
            (
                {"metadata": {"n": "${gone.x}"}, "spec": {"stages": [{"name": "a"}]}},
                r"reference 'gone\.x' names no stage 'gone'",
            ),
            (
                staged({"name": "a"}, dependsOn=["t-9"]),
                r"spec\.dependsOn names tasks .* got \['t-9'\]; write it inside a stage",
            ),
        ],
    )
    def test_a_faulty_document_is_refused(self, document: object, message: str) -> None:
        with pytest.raises(ContractError, match=message):
            expand(document)

    @pytest.mark.parametrize("name", ["a.b", "a b", "", "é", "env", 1, None, "a\n"])
    @pytest.mark.parametrize("key", ["name", "id"])
    def test_a_name_that_is_not_plain_is_refused(self, key: str, name: object) -> None:
        with pytest.raises(ContractError, match="stage 1: name must be made of letters, digits"):
            expand(staged({key: name}))

    def test_a_column_that_names_an_unknown_stage_is_refused(self) -> None:
        data = {"type": "graph_template", "template": {"columns": [{"expr": "aa.result"}]}}
        document = staged({"name": "a"}, {"name": "b", "spec": {"data": data}})
        with pytest.raises(ContractError, match="columns names no stage 'aa'; known: a, b"):
            expand(document)

    def test_both_shapes_at_once_are_refused(self) -> None:
        document = {"spec": {"stages": [{"name": "a"}], "graph": {"nodes": [{"name": "a"}]}}}
        assert problems_of(document, match="both") == [
            "spec has both stages and graph; keep one of them"
        ]

    def test_a_default_name_can_be_taken_too(self) -> None:
        assert problems_of(staged({"name": "stage-2"}, {}), match="taken") == [
            "stage 2: name 'stage-2' is taken; give each stage its own"
        ]

    def test_all_faults_come_at_once_and_no_id_is_spent(self) -> None:
        document = staged(
            "x",
            {"name": "a", "dependsOn": ["gone"], "spec": {"p": "${BARE} ${b.result}"}},
            {"name": "b", "spec": 5},
            {"name": "b"},
            dependsOn=["t"],
        )
        spent: list[str] = []
        with pytest.raises(ContractError, match="BARE") as caught:
            expand_workflow(document, new_id=lambda: spent.append("x") or "x")  # type: ignore[func-returns-value]
        assert len(caught.value.problems) == 7
        assert spent == []

    def test_an_endless_document_is_refused(self) -> None:
        document: dict[str, Any] = {"spec": {}}
        document["spec"]["again"] = document
        with pytest.raises(ContractError, match="nested 100 levels deep"):
            expand(document)


class TestLookUp:
    def test_tasks_are_found_by_name_and_by_id(self) -> None:
        workflow = expand(staged({"name": "a"}, {"name": "b"}))
        assert workflow.by_name("b") is workflow.by_id("id-2") is workflow.tasks[1]

    def test_an_unknown_one_is_told_with_the_known_ones(self) -> None:
        workflow = expand(staged({"name": "train"}, {"name": "b"}))
        with pytest.raises(ContractError, match="'w' has no stage 'trainn'; known: train, b; did"):
            workflow.by_name("trainn")
        with pytest.raises(ContractError, match="has no task 'q'; known: id-1, id-2"):
            workflow.by_id("q")


DONE_A = {"task_id": "id-1", "result": {"items": [{"output": "blue"}], "n": 3, "none": None}}


class TestRenderTask:
    def test_references_are_filled_and_dependencies_attached(self) -> None:
        workflow = expand(
            staged(
                {"name": "a"},
                {"name": "b", "dependsOn": []},
                {
                    "name": "c",
                    "dependsOn": [],
                    "spec": {
                        "n": "${a.result.n}",
                        "text": "is ${a.result.items[0].output}, ${a.result.items.0.output}",
                        "ids": ["${c.task_id}", "${b.task_id}"],
                        "key": "${env.KEY} $${x}",
                    },
                },
            )
        )
        task = workflow.by_name("c")
        before = copy.deepcopy(task)
        document = render_task(workflow, task, {"a": DONE_A, "b": {"result": 1}})
        assert document["spec"] == {
            "taskType": "echo",
            "n": 3,
            "text": "is blue, blue",
            "ids": ["id-3", "id-2"],
            "key": "${env.KEY} ${x}",
            "_upstreamResults": {"a": DONE_A},
        }
        assert task == before

    def test_metadata_is_filled_too(self) -> None:
        document = staged({"name": "a"})
        document["metadata"]["annotations"] = {"run": "${a.task_id}"}
        workflow = expand(document)
        rendered = render_task(workflow, workflow.tasks[0], {})
        assert rendered["metadata"] == {"name": "w:a", "annotations": {"run": "id-1"}}
        assert "_upstreamResults" not in rendered["spec"]

    @pytest.mark.parametrize(
        ("given", "kept"), [({"old": {"result": "${x}"}}, {"old": {"result": "${x}"}}), ("x", {})]
    )
    def test_results_that_are_already_there_stay(self, given: object, kept: dict[str, Any]) -> None:
        second = {"name": "b", "spec": {"_upstreamResults": given}}
        workflow = expand(staged({"name": "a"}, second))
        rendered = render_task(workflow, workflow.tasks[1], {"a": DONE_A})
        assert rendered["spec"]["_upstreamResults"] == {**kept, "a": DONE_A}

    def test_all_that_is_missing_is_told_at_once(self) -> None:
        spec = {"x": "${a.result.none} ${a.result.n.m} ${b.result}", "y": "${a.result.items[1]}"}
        workflow = expand(staged({"name": "a"}, {"name": "b"}, {"name": "c", "spec": spec}))
        with pytest.raises(ContractError, match=r"^stage 'c': Missing value") as caught:
            render_task(workflow, workflow.by_name("c"), {"a": DONE_A})
        assert list(caught.value.problems) == [
            "Missing value for reference 'a.result.items[1]':"
            " 'result.items' is a list and takes an index below 1, got '1'",
            "Missing value for reference 'a.result.n.m': 'result.n' is int and has no 'm'",
            "Missing value for reference 'a.result.none': 'result.none' is null",
            "Missing value for reference 'b.result': stage 'b' has no stored result",
            "dependency 'b' has no stored result",
        ]


def diamond() -> Workflow:
    return expand(
        graph(
            {"name": "a"},
            {"name": "b", "dependsOn": ["a"]},
            {"name": "c", "dependsOn": ["a"]},
            {"name": "d", "dependsOn": ["b", "c"]},
            {"name": "e", "dependsOn": ["d"]},
            {"name": "z"},
        )
    )


def names(tasks: tuple[PlannedTask, ...]) -> set[str]:
    return {task.name for task in tasks}


def report(state: WorkflowState, name: str, *, ok: bool = True, error: str = "") -> Step:
    task_id = state.workflow.by_name(name).task_id
    return advance(state, TaskOutcome(task_id=task_id, ok=ok, error=error))


class TestStateMachine:
    def test_roots_are_ready_at_once(self) -> None:
        step = begin(diamond())
        assert names(step.ready) == {"a", "z"}
        assert step.skipped == ()
        assert not step.state.finished()

    def test_a_task_waits_for_all_that_it_depends_on(self) -> None:
        step = report(begin(diamond()).state, "a")
        assert names(step.ready) == {"b", "c"}
        step = report(step.state, "c")
        assert step.ready == ()
        step = report(step.state, "b")
        assert names(step.ready) == {"d"}

    def test_a_failure_skips_near_and_far_dependents_at_once(self) -> None:
        state = report(report(begin(diamond()).state, "a").state, "c").state
        step = report(state, "b", ok=False, error="out of memory")
        assert names(step.skipped) == {"d", "e"}
        by_name = {task.name: task.task_id for task in state.workflow.tasks}
        assert step.state.errors == {
            by_name["b"]: "out of memory",
            by_name["d"]: "Dependency b failed",
            by_name["e"]: "Dependency b failed",
        }
        last = report(step.state, "z").state
        assert last.finished()
        assert not last.ok()

    def test_the_first_failure_is_the_one_named(self) -> None:
        state = report(begin(diamond()).state, "a").state
        state = report(state, "c", ok=False).state
        step = report(state, "b", ok=False)
        assert step.skipped == ()
        assert step.state.errors[state.workflow.by_name("d").task_id] == "Dependency c failed"

    def test_a_single_document_runs_and_fails_under_its_id(self) -> None:
        workflow = expand({"spec": {}})
        [task] = begin(workflow).ready
        after = advance(begin(workflow).state, TaskOutcome(task_id="id-1", ok=False, error="no"))
        assert task.task_id == "id-1"
        assert after.state.errors == {"id-1": "no"}
        assert after.state.finished()

    @pytest.mark.parametrize("ok", [True, False])
    def test_a_late_report_changes_nothing(self, *, ok: bool) -> None:
        for first in (True, False):
            state = report(begin(diamond()).state, "a", ok=first, error="x").state
            again = report(state, "a", ok=ok, error="y")
            assert again == Step(state=state)
        assert report(state, "d", ok=ok) == Step(state=state)  # skipped with its dependency

    def test_a_report_for_a_waiting_task_is_an_error(self) -> None:
        with pytest.raises(ContractError, match=r"id-\d: a report came while it waits for others"):
            report(begin(diamond()).state, "d")

    def test_a_report_for_an_unknown_task_is_an_error(self) -> None:
        with pytest.raises(ContractError, match="workflow 'w' has no task 'id-99'"):
            advance(begin(diamond()).state, TaskOutcome(task_id="id-99", ok=True))

    def test_a_report_leaves_the_state_it_was_given_as_it_was(self) -> None:
        state = begin(diamond()).state
        before = (dict(state.states), dict(state.errors))
        report(state, "a", ok=False, error="x")
        assert (dict(state.states), dict(state.errors)) == before

    def test_a_state_survives_json(self) -> None:
        state = report(begin(diamond()).state, "a", ok=False, error="x").state
        text = json.dumps({"states": state.states, "errors": state.errors})
        read = json.loads(text)
        states = {key: TaskState(value) for key, value in read["states"].items()}
        restored = WorkflowState(workflow=state.workflow, states=states, errors=read["errors"])
        assert restored == state
        assert report(restored, "z").state.finished()


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    size = draw(st.integers(min_value=1, max_value=8))
    order = draw(st.permutations(range(size)))
    nodes = [
        {"name": f"n{number}", "dependsOn": [f"n{order[index]}" for index in draw(_subset(place))]}
        for place, number in enumerate(order)
    ]
    return expand(graph(*draw(st.permutations(nodes))))


def _subset(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), unique=True) if size else st.just([])


class TestLaws:
    @given(workflow=workflows())
    def test_tasks_come_after_all_that_they_depend_on(self, workflow: Workflow) -> None:
        seen: set[str] = set()
        for task in workflow.tasks:
            assert seen.issuperset(task.depends_on)
            seen.add(task.task_id)

    @given(workflow=workflows(), data=st.data())
    def test_any_run_keeps_the_laws(self, workflow: Workflow, data: st.DataObject) -> None:
        step = begin(workflow)
        released: list[str] = []
        skipped: list[str] = []
        terminal: dict[str, TaskState] = {}
        while True:
            state = step.state
            for task in step.ready:
                assert all(state.states[name] is TaskState.DONE for name in task.depends_on)
            released += [task.task_id for task in step.ready]
            skipped += [task.task_id for task in step.skipped]
            for task_id, kept in terminal.items():
                assert state.states[task_id] is kept
            terminal = {key: value for key, value in state.states.items() if value.is_terminal}
            running = [task_id for task_id in released if task_id not in terminal]
            assert {key for key, value in state.states.items() if value is TaskState.READY} == set(
                running
            )
            assert bool(running) != state.finished()
            if not running:
                break
            # Late and repeated reports come in between.
            task_id = data.draw(st.sampled_from(running + sorted(terminal)))
            ok = data.draw(st.booleans())
            after = advance(state, TaskOutcome(task_id=task_id, ok=ok, error="e"))
            if task_id in terminal:
                assert after == Step(state=state)
                ok = data.draw(st.booleans())
                after = advance(state, TaskOutcome(task_id=running[0], ok=ok, error="e"))
            step = after
        assert len(released) == len(set(released))
        assert sorted(released + skipped) == sorted(task.task_id for task in workflow.tasks)
        assert state.ok() == (skipped == [] and TaskState.FAILED not in terminal.values())
        check_blame(state)


def check_blame(state: WorkflowState) -> None:
    """Skipped exactly where something before failed, and the blame names a failed task."""
    failed = {TaskState.FAILED, TaskState.SKIPPED}
    by_name = {task.name: task.task_id for task in state.workflow.tasks}
    for task in state.workflow.tasks:
        lost = any(state.states[name] in failed for name in task.depends_on)
        assert lost == (state.states[task.task_id] is TaskState.SKIPPED)
        if lost:
            blamed = state.errors[task.task_id].split(" ")[1]
            assert state.states[by_name[blamed]] is TaskState.FAILED
