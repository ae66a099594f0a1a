"""A workflow in this process: every stage is reported, whatever happens to its neighbours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from flowmesh_core.config import load_settings
from flowmesh_core.events import TaskEvent
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.workflow import PlannedTask


def run(
    nodes: list[dict[str, Any]], results: Path, events: list[tuple[str, str]] | None = None
) -> dict[str, StageReport]:
    settings = load_settings({}, results_dir=results, worker_id="local")
    workflow = plan({"spec": {"taskType": "echo", "graph": {"nodes": nodes}}})

    def note(task: PlannedTask, event: TaskEvent) -> None:
        if events is not None:
            events.append((task.name, event.type))

    async def work() -> list[StageReport]:
        local = LocalRun(workflow, settings, load_plugins(settings), on_event=note)
        return await asyncio.wait_for(local.run(), 30)

    return {report.name: report for report in asyncio.run(work())}


def test_failures_of_every_kind_leave_the_other_stages_alone(tmp_path: Path) -> None:
    reports = run(
        [
            {"name": "refused", "spec": {"m": "${env.NOT_ALLOWED}"}},
            {"name": "good", "spec": {"m": [1, 2]}},
            {"name": "unrendered1", "spec": {"m": "${good.result.nothing}"}},
            {"name": "unrendered2", "spec": {"m": "${good.result.nowhere}"}},
            {"name": "skipped", "dependsOn": ["unrendered1"], "spec": {}},
            {"name": "skipped-too", "dependsOn": ["skipped"], "spec": {}},
            {"name": "after", "spec": {"m": "${good.result.echo.m}", "id": "${good.task_id}"}},
        ],
        tmp_path,
    )
    assert [name for name, report in reports.items() if report.ok] == ["good", "after"]
    assert reports["refused"].code == "contract"
    assert "good.result.nowhere" in reports["unrendered2"].error
    assert reports["skipped-too"].error == "Dependency unrendered1 failed"
    echoed = reports["after"].result["echo"]
    assert echoed["m"] == [1, 2]
    assert echoed["id"] == reports["good"].task_id


def test_a_stage_starts_after_the_stages_that_it_names(tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    run([{"name": "b", "dependsOn": ["a"]}, {"name": "a"}], tmp_path, events)
    assert events == [
        ("a", "TASK_STARTED"),
        ("a", "TASK_SUCCEEDED"),
        ("b", "TASK_STARTED"),
        ("b", "TASK_SUCCEEDED"),
    ]


def test_results_lie_where_the_report_says(tmp_path: Path) -> None:
    report = run([{"name": "a", "spec": {"m": 1}}], tmp_path)["a"]
    assert report.folder is not None
    assert report.folder.parent == tmp_path
    assert (report.folder / "responses.json").exists()
