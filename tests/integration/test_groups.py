"""Groups through real child processes: in one workflow, and as the earlier orchestrator merges."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.config import load_settings
from flowmesh_core.events import TaskEvent
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.testing import StandInOrchestrator, WorkerProcess
from flowmesh_core.workflow import PlannedTask

ROUGH = Path(__file__).parents[1] / "executors" / "rough.py"


def run_all(
    tmp_path: Path,
    nodes: Mapping[str, Mapping[str, Any]],
    *,
    note: Callable[[LocalRun, PlannedTask, TaskEvent], None] = lambda *_: None,
    **settings: Any,
) -> dict[str, StageReport]:
    """Run stages that are ready at once on a worker of one slot."""
    chosen = load_settings(
        {}, results_dir=tmp_path, worker_id="local", cancel_grace_s=0.5, **settings
    )
    graph = [
        {"name": name, "spec": {"taskType": "rough.groups", "model": "m", **spec}}
        for name, spec in nodes.items()
    ]
    workflow = plan({"spec": {"taskType": "rough.groups", "graph": {"nodes": graph}}})
    plugins = load_plugins(chosen, files=[ROUGH])

    async def work() -> list[StageReport]:
        local = LocalRun(
            workflow, chosen, plugins, on_event=lambda task, event: note(local, task, event)
        )
        return await asyncio.wait_for(local.run(), 60)

    return {report.name: report for report in asyncio.run(work())}


def test_parallel_stages_on_one_model_are_one_batch(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {name: {"data": name} for name in "abcd"})
    results = [report.result for report in reports.values()]
    assert [len(result["with"]) for result in results] == [4] * 4
    assert {result["run"] for result in results} == {1}
    assert [result["data"] for result in results] == list("abcd")
    for report in reports.values():
        assert report.folder is not None
        assert (report.folder / "made.txt").read_text() == report.task_id


@pytest.mark.parametrize(
    "other", [{"model": "n"}, {"inference": {"seed": 1}}, {"enforce_cpu": True}]
)
def test_what_does_not_agree_is_not_grouped(other: dict[str, Any], tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {}, "b": other, "c": {}})
    sizes = {name: len(report.result["with"]) for name, report in reports.items()}
    assert sizes == {"a": 2, "b": 1, "c": 2}


def test_a_group_has_no_more_members_than_the_operator_allows(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {name: {} for name in "abcde"}, group_max=2)
    assert sorted(len(report.result["with"]) for report in reports.values()) == [1, 2, 2, 2, 2]
    reports = run_all(tmp_path, {name: {} for name in "ab"}, group_max=1)
    assert [len(report.result["with"]) for report in reports.values()] == [1, 1]


@pytest.mark.parametrize("do", ["fail", "forget"])
def test_one_bad_member_spoils_no_neighbour(do: str, tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {}, "bad": {"do": do}, "c": {}})
    assert [report.ok for report in reports.values()] == [True, False, True]
    assert reports["bad"].code == "executor.failed"


def test_what_is_raised_fails_only_those_that_had_no_answer_yet(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {}, "b": {"do": "raise", "s": 0.1}, "c": {"s": 0.2}})
    assert [report.ok for report in reports.values()] == [True, False, False]
    assert "everybody who waits" in reports["c"].error


def test_a_crash_leaves_the_answers_that_were_given(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {}, "b": {"do": "die", "s": 0.3}, "c": {"s": 0.6}})
    assert [report.code for report in reports.values()] == ["", "crash", "crash"]


def test_members_are_answered_as_they_finish(tmp_path: Path) -> None:
    ended: list[str] = []

    def note(_run: LocalRun, task: PlannedTask, event: TaskEvent) -> None:
        if event.type == "TASK_SUCCEEDED":
            ended.append(task.name)

    run_all(tmp_path, {"slow": {"s": 1.0}, "quick": {}, "mid": {"s": 0.4}}, note=note)
    assert ended == ["quick", "mid", "slow"]


def test_a_stopped_member_leaves_the_group_and_the_others_go_on(tmp_path: Path) -> None:
    nodes = {"a": {}, "long": {"do": "wait", "timeoutSec": 0.5}, "c": {"s": 0.1}}
    reports = run_all(tmp_path, nodes)
    assert reports["long"].code == "deadline"
    assert reports["a"].ok
    assert reports["c"].ok, reports["c"].error


def test_memory_that_runs_out_halves_the_batch_of_those_that_wait(tmp_path: Path) -> None:
    reports = run_all(tmp_path, {"a": {}, "b": {"do": "shrink", "s": 0.1}, "c": {"s": 0.2}})
    assert reports["a"].result["scale"] == 1.0
    assert reports["b"].code == "crash.out_of_memory", "this executor does not declare SHRINK"


def test_the_same_deterministic_work_is_done_once(tmp_path: Path) -> None:
    greedy = {"taskType": "inference", "executor": "rough.infers", "inference": {"temperature": 0}}
    chance = {**greedy, "inference": {"temperature": 1}}
    reports = run_all(
        tmp_path,
        {
            "a": {**greedy, "data": "x"},
            "same": {**greedy, "data": "x", "output": {"artifacts": ["made.txt"]}},
            "other": {**greedy, "data": "y"},
            "p": {**chance, "data": "x"},
            "q": {**chance, "data": "x"},
        },
    )
    together = {name: report.result["with"] for name, report in reports.items()}
    assert len(together["a"]) == 2
    assert together["same"] == together["a"]
    assert reports["same"].task_id not in together["a"]
    assert len(together["p"]) == 2
    folder = reports["same"].folder
    assert folder is not None
    assert (folder / "made.txt").read_text() == reports["a"].task_id


def test_a_merged_dispatch_is_one_batch_and_every_child_has_its_own_answer(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, tmp_path: Path
) -> None:
    host = flowmesh_orchestrator
    url = f"{host.url}/api/v1/results"
    document = {
        "metadata": {"name": "n"},
        "spec": {
            "taskType": "inference",
            "executor": "rough.infers",
            "model": "m",
            "inference": {"temperature": 1},
            "output": {"destination": {"type": "http", "url": url}},
        },
    }
    documents = []
    for letter in "abc":
        spec = {**document["spec"], "data": {"type": "list", "items": [letter]}}
        documents.append({**document, "spec": spec})
    with WorkerProcess(
        flowmesh_redis_url, tmp_path / "results", arguments=("--plugin", str(ROUGH))
    ):
        ids = host.submit_together(documents)
        host.wait_workers(1)
        for task_id in ids:
            assert host.wait_task(task_id, 20).status == "DONE"
        results = [host.result(task_id)["result"] for task_id in ids]
    assert [result["data"]["items"] for result in results] == [["a"], ["b"], ["c"]]
    assert [sorted(result["with"]) for result in results] == [sorted(ids)] * 3
    (group,) = [result["group"] for result in results if "children" in result]
    assert (group["members"], group["computed"]) == (3, 3)
    assert group["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
