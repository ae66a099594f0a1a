"""Deterministic work is done once, and only what is provably the same counts as done."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import (
    Artifact,
    Executor,
    ExecutorInfo,
    Outcome,
    RunContext,
    Settings,
    load_settings,
)
from flowmesh_core.bounded_folder import BoundedFolder
from flowmesh_core.contract import parse_task
from flowmesh_core.errors import DeadlineError, ExecutionError
from flowmesh_core.inputs import FileRef, Inputs, ModelRef, RowSource
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins
from flowmesh_core.result_cache import ResultCache, result_key
from flowmesh_core.testing import run_task
from flowmesh_core.testing.harness import TaskRun

NOTHING = Inputs()
GREEDY = {"data": {"type": "list", "items": ["a"]}, "inference": {"temperature": 0}}


class Answers(Executor):
    """Counts its runs in a file, and fails, writes or waits when it is told to."""

    def run(self, ctx: RunContext) -> Mapping[str, Any] | Outcome:
        runs = Path(ctx.raw_spec.get("runs") or ctx.folder.parent / "runs")
        with runs.open("a") as file:
            file.write("x")
        if ctx.raw_spec.get("do") == "fail":
            raise ExecutionError("no")
        if ctx.raw_spec.get("do") == "write":
            (ctx.folder / "artifacts" / "made.txt").write_text("made")
        rows = [] if ctx.inputs.rows is None else [row.prompt for row in ctx.inputs.rows]
        return {"ok": ctx.raw_spec.get("do") != "deny", "rows": rows}


INFO = ExecutorInfo(
    name="answers", task_types={"inference"}, target=f"{__name__}:Answers", inputs={"rows"}
)


def settings(folder: Path, **options: Any) -> Settings:
    options.setdefault("result_cache", folder / "cache")
    return load_settings({}, results_dir=folder, **options)


def answer(folder: Path, spec: Mapping[str, Any], task_id: str, **options: Any) -> TaskRun:
    return run_task(
        Answers,
        {"taskType": "inference", **spec},
        info=INFO,
        task_id=task_id,
        folder=folder,
        settings=settings(folder, **options),
    )


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


def test_the_same_work_is_done_once_and_a_hit_says_so(tmp_path: Path) -> None:
    first = answer(tmp_path, GREEDY, "one")
    second = answer(tmp_path, {**GREEDY, "priority": 3, "timeoutSec": 60}, "two")
    assert runs(tmp_path) == 1
    assert "cached" not in first.result
    assert second.result["cached"]["task_id"] == "one"
    assert {key: second.result[key] for key in first.result} == first.result
    assert "result of task one used" in (second.folder / "logs" / "task.log").read_text()


def test_nothing_is_kept_unless_the_operator_wants_it(tmp_path: Path) -> None:
    for task_id in ("one", "two"):
        assert "cached" not in answer(tmp_path, GREEDY, task_id, result_cache=None).result
    assert runs(tmp_path) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"type": "list", "items": ["b"]}},
        {"inference": {"temperature": 0, "max_tokens": 3}},
        {"inference": {"temperature": 0.1}},
        {"inference": {}},
        {"model": {"source": {"identifier": "other"}}},
        {"enforce_cpu": True},
    ],
)
def test_what_differs_is_done_itself(change: dict[str, Any], tmp_path: Path) -> None:
    answer(tmp_path, GREEDY, "one")
    answer(tmp_path, {**GREEDY, **change}, "two")
    assert runs(tmp_path) == 2


def test_work_that_chance_decides_is_never_taken_from_another(tmp_path: Path) -> None:
    for task_id in ("one", "two"):
        answer(tmp_path, {**GREEDY, "inference": {"temperature": 0.5, "seed": 1}}, task_id)
    assert runs(tmp_path) == 2


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    spec = {**GREEDY, "data": {"type": "jsonl", "path": str(file)}}
    for number, text in enumerate(["a", "a", "b"]):
        file.write_text(json.dumps({"prompt": text}))
        assert answer(tmp_path, spec, f"t{number}").result["rows"] == [text]
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("do", ["fail", "write", "deny"])
def test_a_failure_and_a_result_with_files_are_not_kept(do: str, tmp_path: Path) -> None:
    for task_id in ("one", "two"):
        answer(tmp_path, {**GREEDY, "do": do}, task_id)
    assert runs(tmp_path) == 2
    assert not (tmp_path / "cache").exists()


DAMAGES = [b"", b"[]", b'{"result": 1}', b'{"result": {}, "cached": 1}']


@pytest.mark.parametrize("damage", [*DAMAGES, b'{"result": {}, "cached": {}}'])
def test_a_damaged_entry_is_done_again_and_replaced(damage: bytes, tmp_path: Path) -> None:
    answer(tmp_path, GREEDY, "one")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage)
    assert "cached" not in answer(tmp_path, GREEDY, "two").result
    assert answer(tmp_path, GREEDY, "three").result["cached"]["task_id"] == "two"


def test_a_cache_that_cannot_be_written_fails_no_task(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    assert answer(tmp_path, GREEDY, "one").ok
    assert answer(tmp_path, GREEDY, "two").ok


def test_the_longest_unused_results_go_first(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, max_bytes=400)
    for name in "abc":
        assert cache.keep(name, "t", Outcome(result={"text": "x" * 50}))
        cache.make_room()
        time.sleep(0.01)  # the file system's clock is coarse
        assert cache.find("a") is not None, "what is used stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    assert not cache.keep("files", "t", Outcome(artifacts=[Artifact("made.txt")]))
    assert not cache.keep("large", "t", Outcome(result={"text": "x" * 500}))
    assert cache.find("files") is None
    assert cache.find("large") is None


def test_all_files_are_looked_at_only_when_enough_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looks.append(path), scan(path))[1])
    folder = BoundedFolder(tmp_path, 16_000)
    for number in range(40):
        with folder.appearing(tmp_path / str(number)) as part:
            part.write_bytes(b"x" * 500)
        folder.make_room()
        total = sum(path.stat().st_size for path in tmp_path.glob("*"))
        assert total <= 16_000
    assert len(looks) - 40 < 15, "glob looks too"


def test_a_file_that_another_process_removes_meanwhile_is_no_error(tmp_path: Path) -> None:
    folder = BoundedFolder(tmp_path, 1)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with folder.appearing(tmp_path / "whole") as part:
        part.write_bytes(b"12")
        assert not (tmp_path / "whole").exists()
    folder.make_room()
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]


def key(
    inputs: Inputs = NOTHING,
    *,
    metadata: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
    target: str = f"{__name__}:Answers",
    **info: Any,
) -> str | None:
    declared = ExecutorInfo(name="a", task_types={"inference"}, target=target, **info)
    known = {"taskType": "inference", **GREEDY, **(spec or {})}
    task = parse_task({"metadata": metadata or {}, "spec": known}, task_id="t")
    return result_key(declared, task, inputs)


def test_a_result_is_nobody_elses(tmp_path: Path) -> None:
    owners = [{}, {"owner": "ann"}, {"owner": "bob"}, {"owner": "ann", "tenant": "t"}]
    assert len({key(Inputs(), metadata=owner) for owner in owners}) == 4
    assert key(Inputs(), metadata={"name": "x"}) == key(Inputs(), metadata={"name": "y"})


def test_what_cannot_be_told_to_be_equal_has_no_key(tmp_path: Path) -> None:
    hub = ModelRef(identifier="org/m", hub_id="org/m", revision="main")
    assert key(Inputs(model=hub)) is None
    pinned = ModelRef(identifier="org/m", hub_id="org/m", revision="0" * 40)
    assert key(Inputs(model=pinned)) is not None
    assert key(Inputs(), environment="blue") is None
    assert key(Inputs(checkpoint=tmp_path / "gone")) is None
    assert key(needs=["no_such_package"]) is None
    assert key(target="no_such_package:Thing") is None


def test_earlier_results_count_however_they_are_stored() -> None:
    said = [{"items": [{"output": text}]} for text in "ab"]
    wrapped = [{"task_id": f"t{n}", "result": each} for n, each in enumerate(said)]
    seen = {key(spec={"_upstreamResults": {"one": each}}) for each in (*said, {"other": 1})}
    assert len(seen) == 3
    told = [key(spec={"_upstreamResults": {"one": each}}) for each in wrapped]
    assert told[0] != told[1]
    again = {"task_id": "later", "result": {**said[0], "cached": {"task_id": "t0"}}}
    assert key(spec={"_upstreamResults": {"one": again}}) == told[0]


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    for name, content in {"a": "x", "b": "x", "c": "y"}.items():
        (tmp_path / name).write_text(content)

    def of(path: str, name: str) -> str | None:
        return key(Inputs(files=(FileRef(path=tmp_path / path, name=name),)))

    assert of("a", "one") == of("b", "one") is not None
    assert len({of("a", "one"), of("a", "two"), of("c", "one")}) == 3


def test_rows_that_were_rendered_count_by_what_they_say() -> None:
    rendered = [Inputs(rows=RowSource.from_prompts([text])) for text in "ab"]
    assert key(rendered[0]) != key(rendered[1])


def test_the_code_of_the_executor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {key(target="pytest:Thing"), key(target="attrs:Thing"), key()}
    file = tmp_path / "flowmesh_plugin_x.py"
    module = types.ModuleType("flowmesh_plugin_x")
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for text in ("one", "two"):
        file.write_text(text)
        seen.add(key(target="flowmesh_plugin_x:Thing"))
    assert None not in seen
    assert len(seen) == 5


def test_weights_count_by_their_files(tmp_path: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    seen = set()
    for name, text in [("a", "1"), ("a", "2"), ("b", "2")]:
        (weights / name).write_text(text)
        seen.add(key(Inputs(checkpoint=weights)))
    assert len(seen) == 3


def test_a_large_file_counts_by_its_time(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    first = key(Inputs(checkpoint=large))
    assert key(Inputs(checkpoint=large)) == first
    time.sleep(0.01)
    large.touch()
    assert key(Inputs(checkpoint=large)) != first


PLUGIN = """
import asyncio
from pathlib import Path
from flowmesh_core import Capability, ExecutionError, Executor, ExecutorInfo, hookimpl

COMMON = dict(task_types={"inference"}, places=["inline"], group_key=["inference"])

@hookimpl
def flowmesh_register_executors():
    yield ExecutorInfo(
        name="slow", target=f"{__name__}:Slow", capabilities={"cpu", "concurrent"}, **COMMON
    )
    yield ExecutorInfo(
        name="grouped", target=f"{__name__}:Grouped", capabilities={"cpu", "group"}, **COMMON
    )

def count(ctx):
    runs = Path(ctx.raw_spec["runs"])
    with runs.open("a") as file:
        file.write("x")
    if ctx.raw_spec.get("write"):
        (ctx.folder / "made.txt").write_text("made")
    if len(runs.read_text()) <= ctx.raw_spec.get("fail", 0):
        raise ExecutionError("not yet")

class Slow(Executor):
    async def run(self, ctx):
        count(ctx)
        await asyncio.sleep(ctx.raw_spec.get("s", 0.2))
        return {"ok": True}

class Grouped(Executor):
    def run(self, ctx):
        count(ctx)
        return {"ok": True}

    def run_group(self, ctxs):
        for ctx in ctxs:
            yield ctx.task_id, self.run(ctx)
"""


def run_stages(
    tmp_path: Path, stages: Mapping[str, Any], slots: int, **after: list[str]
) -> dict[str, StageReport]:
    file = tmp_path / "slow.py"
    file.write_text(PLUGIN)
    chosen = settings(tmp_path, worker_id="local", max_concurrent_tasks=slots, cancel_grace_s=0.2)
    common = {"runs": str(tmp_path / "runs"), "inference": {"temperature": 0}}
    graph = [
        {
            "name": name,
            "spec": {"taskType": "inference", **common, **spec},
            "dependsOn": after.get(name, []),
        }
        for name, spec in stages.items()
    ]
    workflow = plan({"spec": {"taskType": "inference", "graph": {"nodes": graph}}})
    local = LocalRun(workflow, chosen, load_plugins(chosen, files=[file]))

    async def work() -> list[StageReport]:
        return await asyncio.wait_for(local.run(), 30)

    return {report.name: report for report in asyncio.run(work())}


@pytest.mark.parametrize("executor", ["slow", "grouped"])
@pytest.mark.parametrize("slots", [1, 4])
def test_equal_tasks_at_the_same_time_are_one_run(
    executor: str, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.batches._PATIENCE_S", 60.0)
    reports = run_stages(tmp_path, {name: {"executor": executor} for name in "abcd"}, slots)
    assert all(report.ok for report in reports.values())
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("slots", [1, 4])
def test_equal_work_of_one_batch_is_done_once_though_its_files_cannot_be_kept(
    slots: int, tmp_path: Path
) -> None:
    stages = {name: {"executor": "grouped", "write": True} for name in "abcd"}
    reports = run_stages(tmp_path, stages, slots)
    assert runs(tmp_path) == 1
    for report in reports.values():
        assert report.folder is not None
        assert (report.folder / "made.txt").read_text() == "made"


def test_nobody_waits_in_turn_for_what_cannot_be_kept(tmp_path: Path) -> None:
    stages = {name: {"executor": "slow", "write": True, "s": 1.0} for name in "abcd"}
    started = time.monotonic()
    reports = run_stages(tmp_path, stages, slots=4)
    assert all(report.ok for report in reports.values())
    assert runs(tmp_path) == 4
    assert time.monotonic() - started < 3.5, "in turn they take 4 s"


def test_a_secret_counts_by_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {**GREEDY, "note": "${env.PERSONA}"}
    for number, persona in enumerate(["ann", "ann", "bob"]):
        monkeypatch.setenv("PERSONA", persona)
        answer(tmp_path, spec, f"t{number}", env_allow=("PERSONA",))
    assert runs(tmp_path) == 2


def test_when_the_first_fails_the_next_does_it_itself(tmp_path: Path) -> None:
    stages = {name: {"executor": "slow", "fail": 1} for name in "abc"}
    reports = run_stages(tmp_path, stages, slots=3)
    assert sorted(report.ok for report in reports.values()) == [False, True, True]
    assert runs(tmp_path) == 2


def test_who_waits_for_another_keeps_its_own_deadline(tmp_path: Path) -> None:
    long = {"executor": "slow", "s": 1.5}
    short = {"executor": "slow", "s": 0.2}
    late = {**long, "timeoutSec": 0.3, "priority": -1}  # has its slot once the short one ends
    reports = run_stages(tmp_path, {"a": long, "b": short, "c": late}, slots=2)
    assert [report.ok for report in reports.values()] == [True, True, False]
    assert reports["c"].code == DeadlineError.code
    assert runs(tmp_path) == 2


def test_a_later_stage_is_found_again_when_the_earlier_one_was(tmp_path: Path) -> None:
    template = {"name": "x", "columns": [{"expr": "a.result.ok"}], "text": "{col1_value}"}
    data = {"type": "graph_template", "template": template}
    stages = {"a": {"executor": "slow"}, "b": {"executor": "slow", "data": data}}
    for _ in range(2):
        reports = run_stages(tmp_path, stages, slots=1, b=["a"])
        assert all(report.ok for report in reports.values())
    assert runs(tmp_path) == 2
