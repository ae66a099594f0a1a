from __future__ import annotations

import itertools
from typing import Any

import pytest

from flowmesh_core.checking import check_workflow
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.workflow import expand_workflow


@pytest.fixture
def registry() -> ExecutorRegistry:
    return ExecutorRegistry(
        [
            ExecutorInfo(
                name="echo", task_types={"echo"}, target="flowmesh_core.echo:EchoExecutor"
            ),
            ExecutorInfo(
                name="llama",
                task_types={"inference"},
                target="m:C",
                spec="flowmesh_core.specs:InferenceSpec",
                model_formats=["gguf"],
            ),
            ExecutorInfo(
                name="vox", task_types={"tts"}, target="m:C", needs=["no_vox"], install="get vox"
            ),
            ExecutorInfo(name="bad", task_types={"bad"}, target="m:C", spec="no_such_module:Spec"),
        ]
    )


def check(registry: ExecutorRegistry, spec: Any) -> list[str]:
    numbers = itertools.count()
    document = {"metadata": {"name": "w"}, "spec": spec}
    workflow = expand_workflow(document, new_id=lambda: f"t{next(numbers)}")
    return check_workflow(workflow, registry)


def test_a_good_workflow_has_no_problems(registry: ExecutorRegistry) -> None:
    assert check(registry, {"taskType": "echo", "anything": {"goes": 1}}) == []
    assert check(registry, {"taskType": "inference", "inference": {"max_tokens": 3}}) == []


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"a": 1}, "spec.taskType is required; known are bad, echo, inference, tts"),
        ({"taskType": None}, "spec.taskType is required; known are bad, echo, inference, tts"),
        (
            {"taskType": "ecko"},
            "task type 'ecko' is not known here; known are bad, echo, inference, tts",
        ),
        (
            {"taskType": "tts"},
            "task type 'tts': executor 'vox' needs the package no_vox, not installed here;"
            " run: get vox",
        ),
        (
            {"taskType": "echo", "executor": "llama"},
            "task type 'echo': executor 'echo' is not 'llama', which spec.executor asks for",
        ),
        ({"taskType": "echo", "timeoutSec": -1}, "spec.timeoutSec must be greater than 0, got -1"),
    ],
)
def test_each_problem_is_said_in_one_sentence(
    registry: ExecutorRegistry, spec: Any, problem: str
) -> None:
    assert check(registry, spec) == [problem]


def test_all_problems_of_a_spec_come_at_once(registry: ExecutorRegistry) -> None:
    inference = {"max_tokens": 0, "top_p": 7}
    problems = check(registry, {"taskType": "inference", "inference": inference, "postprocess": 5})
    assert [problem.split(" ")[0] for problem in problems] == [
        *("spec.inference.top_p", "spec.inference.max_tokens", "spec.postprocess")
    ]


def test_an_unknown_key_names_the_nearest(registry: ExecutorRegistry) -> None:
    (problem,) = check(registry, {"taskType": "inference", "inference": {"tempereture": 1}})
    assert problem.startswith("spec.inference")
    assert "did you mean 'temperature'?" in problem


def test_problems_name_their_stage_and_no_stage_hides_another(registry: ExecutorRegistry) -> None:
    stages = [
        {"name": "one", "spec": {"taskType": "ecko"}},
        {"name": "two", "spec": {"taskType": "echo"}},
        {"name": "three", "spec": {"taskType": "inference", "inference": {"top_p": 7}}},
    ]
    first, second = check(registry, {"stages": stages})
    assert first.startswith("stage 'one': task type 'ecko'")
    assert second.startswith("stage 'three': spec.inference.top_p")


@pytest.mark.parametrize(
    "spec",
    [
        {"taskType": "inference", "inference": {"max_tokens": "${one.result.n}"}},
        {"taskType": "echo", "enforce_cpu": "${one.result.flag}"},
        {"taskType": "echo", "timeoutSec": "${one.result.n}"},
        {"taskType": "echo", "shard": {"index": "${one.result.n}", "total": 2}},
        {"taskType": "echo", "executor": "${one.result.name}"},
        {"taskType": "${one.result.kind}"},
        {"taskType": "inference", "model": {"source": {"identifier": "${one.result.path}"}}},
    ],
)
def test_what_an_earlier_stage_fills_in_is_left_to_the_run(
    registry: ExecutorRegistry, spec: dict[str, Any]
) -> None:
    stages = [{"name": "one", "spec": {"taskType": "echo"}}, {"name": "two", "spec": spec}]
    assert check(registry, {"stages": stages}) == []


def test_the_rest_of_a_spec_with_open_values_is_still_checked(registry: ExecutorRegistry) -> None:
    spec = {
        "taskType": "inference",
        "timeoutSec": "${one.result.n}",
        "inference": {"top_p": 7, "max_tokens": "${one.result.n}"},
    }
    stages = [{"name": "one", "spec": {"taskType": "echo"}}, {"name": "two", "spec": spec}]
    (problem,) = check(registry, {"stages": stages})
    assert problem.startswith("stage 'two': spec.inference.top_p")


def test_a_spec_model_that_cannot_be_imported_is_a_problem_and_no_crash(
    registry: ExecutorRegistry,
) -> None:
    (problem,) = check(registry, {"taskType": "bad"})
    assert problem == (
        "cannot import no_such_module:Spec: ModuleNotFoundError: No module named 'no_such_module'"
    )
