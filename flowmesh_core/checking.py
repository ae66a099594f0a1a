"""Explain what is wrong with a workflow before anything is loaded or run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from flowmesh_core.contract import CommonSpec
from flowmesh_core.errors import FlowmeshError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.places.environments import check_there
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.validation import as_model, describe_problems
from flowmesh_core.workflow import PlannedTask, Workflow

__all__ = ["check_result", "check_spec", "check_workflow"]


def check_workflow(workflow: Workflow, registry: ExecutorRegistry) -> list[str]:
    """Return every problem that can be seen without running, each with its stage.

    Values that a stage takes from an earlier one (``${...}``) are left to the run.
    """
    problems: list[str] = []
    for task in workflow.tasks:
        where = f"stage {task.name!r}: " if task.name else ""
        problems += [where + problem for problem in _check_task(task, registry)]
    return problems


def _check_task(task: PlannedTask, registry: ExecutorRegistry) -> list[str]:
    spec = task.document.get("spec") or {}
    problems = _check_model(CommonSpec, spec)
    if problems or not isinstance(spec, Mapping):
        return problems
    settled = {key: value for key, value in spec.items() if "${" not in str(value)}
    common = CommonSpec.model_validate(settled)
    if not common.task_type:
        known = ", ".join(registry.task_types)
        open_yet = "taskType" in spec and "taskType" not in settled
        return [] if open_yet else [f"spec.taskType is required; known are {known}"]
    try:
        info = registry.resolve(
            common.task_type, settled, enforce_cpu=common.enforce_cpu, executor=common.executor
        )
        if info.spec and info.environment:
            python = registry.pythons[info.environment]
            return check_there(info.environment, python, info.spec, spec)
    except FlowmeshError as exc:
        return [str(exc)]
    return check_spec(info.spec, spec) if info.spec else []


def check_spec(target: str, spec: Mapping[str, Any]) -> list[str]:
    """Return what the model ``package.module:Model`` finds wrong with a spec.

    The Python of another environment calls it too, for the models that live there.
    """
    try:
        return _check_model(as_model(import_target(target), target), spec)
    except FlowmeshError as exc:
        return [str(exc)]


def check_result(info: ExecutorInfo, result: Mapping[str, Any]) -> list[str]:
    """Return what an executor's model of its results finds wrong with one.

    Nothing where it declares none, or where that lives in another environment.
    """
    if not info.result or info.environment:
        return []
    try:
        as_model(import_target(info.result), info.result).model_validate(result)
    except ValidationError as exc:
        return describe_problems(exc, prefix="result")
    except FlowmeshError as exc:
        return [str(exc)]
    return []


def _check_model(model: Any, spec: Mapping[str, Any]) -> list[str]:
    try:
        model.model_validate(spec)
    except ValidationError as exc:
        return describe_problems(exc, prefix="spec", skip_placeholders=True)
    return []
