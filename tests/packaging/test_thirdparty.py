"""What other authors have: a sample distribution and new projects, each from its built wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hatchling  # noqa: F401 - the builder; without it nothing here may pass
import pytest

from flowmesh_core.testing import StandInOrchestrator, WorkerProcess

SAMPLE = Path(__file__).parents[1] / "thirdparty" / "acme-shout"
ONE_FILE = """\
from flowmesh_core import Executor, ExecutorInfo, hookimpl


@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="acme.one", task_types="acme.one", target=f"{__name__}:One")]


class One(Executor):
    def run(self, ctx):
        return {"ok": True, "one": 1}
"""


def run(folder: Path, site: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where a wheel's content is installed beside everything else."""
    environ = {**os.environ, "PYTHONPATH": str(site), "FLOWMESH_STRICT_PLUGINS": "1"}
    environ.pop("FLOWMESH_ONLY_PLUGINS", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=180,
    )


def install(project: Path, tmp_path: Path) -> Path:
    """Build a project's wheel and return the folder that it was unpacked into."""
    built = run(project, "", "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(SAMPLE, tmp_path_factory.mktemp("sample"))


def flowmesh(site: Path, folder: Path, *arguments: str) -> Any:
    done = run(folder, site, "-m", "flowmesh_core", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_sample_is_listed_with_what_it_declares(site: Path, tmp_path: Path) -> None:
    rows = flowmesh(site, tmp_path, "plugins", "list", "--json")
    (row,) = [row for row in rows if row["name"] == "acme-shout"]
    assert (row["state"], row["distribution"], row["version"]) == ("loaded", "acme-shout", "1.2.0")
    assert row["executors"][0]["task_types"] == ["acme.shout"]


def test_tasks_of_the_sample_run_as_one_group(site: Path, tmp_path: Path) -> None:
    nodes = [
        {
            "name": name,
            "spec": {"taskType": "acme.shout", "data": {"type": "list", "items": [name]}},
        }
        for name in ("a", "b")
    ]
    document = {"spec": {"taskType": "acme.shout", "graph": {"nodes": nodes}}}
    (tmp_path / "two.yaml").write_text(json.dumps(document))
    reports = flowmesh(site, tmp_path, "run", "two.yaml", "--json")
    assert [report["result"]["items"][0]["output"] for report in reports] == ["A!", "B!"]
    assert [report["result"]["together"] for report in reports] == [2, 2]
    assert [Path(report["folder"], "shouts.txt").read_text() for report in reports] == [
        "A!\n",
        "B!\n",
    ]


def test_the_sample_works_in_a_real_worker(
    site: Path, tmp_path: Path, flowmesh_redis_url: str, flowmesh_orchestrator: StandInOrchestrator
) -> None:
    data = {"type": "list", "items": ["hello"]}
    spec = {"taskType": "acme.shout", "data": data, "volume": 2}
    environ = {"PYTHONPATH": str(site), "ACME_SHOUT_MARK": "?"}
    with WorkerProcess(flowmesh_redis_url, tmp_path / "results", environ=environ):
        flowmesh_orchestrator.wait_workers(1)
        good = flowmesh_orchestrator.submit({"spec": spec})
        assert flowmesh_orchestrator.wait_task(good, 30).status == "DONE"
        bad = flowmesh_orchestrator.submit({"spec": {**spec, "volume": 12}})
        (failed,) = flowmesh_orchestrator.wait_for(
            lambda: [e for e in flowmesh_orchestrator.events if e.get("type") == "TASK_FAILED"], 30
        )
    assert (tmp_path / "results" / good / "shouts.txt").read_text() == "HELLO??\n"
    assert failed["task_id"] == bad
    assert "spec.volume must be" in failed["error"]


def test_the_kit_finds_no_fault_with_the_sample(site: Path, tmp_path: Path) -> None:
    report = flowmesh(site, tmp_path, "kit", "acme.shout", "--json")
    outcomes = {check["clause"]: check["outcome"] for check in report["checks"]}
    assert report["distribution"] == "acme-shout"
    assert "failed" not in outcomes.values()
    for clause in ("result", "artifacts", "files", "retry", "unicode", "answers", "invariant"):
        assert outcomes[clause] == "passed", clause


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return what makes a new project and installs it: its folder and where it is installed."""

    def build(name: str, *arguments: str) -> tuple[Path, Path]:
        done = run(tmp_path, "", "-m", "flowmesh_core", "new", "executor", name, *arguments)
        assert done.returncode == 0, done.stderr
        return tmp_path / name, install(tmp_path / name, tmp_path / "dist")

    return build


def test_a_new_project_passes_its_own_tests_and_runs_its_example(
    build: Callable[..., tuple[Path, Path]],
) -> None:
    project, site = build("flowmesh-acme-tts")
    tested = run(project, site, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    assert int(re.findall(r"(\d+) passed", tested.stdout)[0]) > 25
    (report,) = flowmesh(site, project, "run", "examples/example.yaml", "--json")
    assert [item["output"] for item in report["result"]["items"]] == ["HELLO", "WORLD"]


def test_a_single_file_becomes_a_project_that_passes_its_own_tests(
    build: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text(ONE_FILE)
    project, site = build("acme-one", "--from", "one.py")
    tested = run(project, site, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    (report,) = flowmesh(site, project, "run", "examples/example.yaml", "--json")
    assert report["result"]["one"] == 1
