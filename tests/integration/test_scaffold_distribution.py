"""From an empty environment to a stranger's wheel in a worker, with the tools of strangers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowmesh_core.testing import StandInOrchestrator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "thirdparty" / "acme-shout"
HEAVY = '''\
"""Counts with an engine."""

from __future__ import annotations

import hypothesis
from pydantic import Field

from flowmesh_core import Executor, ExecutorInfo, RunContext, TaskSpec, hookimpl

LIMIT = 10


class CountSpec(TaskSpec):
    upto: int = Field(default=3, ge=1, le=LIMIT)


@hookimpl
def flowmesh_register_executors():
    name = "acme.count"
    spec = f"{__name__}:CountSpec"
    return [ExecutorInfo(name=name, task_types=name, target=f"{__name__}:Count", spec=spec)]


class Count(Executor):
    def run(self, ctx: RunContext):
        upto = min(ctx.spec.upto, LIMIT)
        return {"ok": True, "by": hypothesis.__name__, "counts": [*range(upto)]}
'''


# What would send commands to the environment of this test run; nox sets those of uv.
_OF_THIS_RUN = ("PYTHONPATH", "UV_PROJECT_ENVIRONMENT", "UV_PYTHON")


def find_uv() -> str:
    """Return the path of uv, beside this Python or anywhere."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("uv", path=places)
    if not found and os.environ.get("CI"):
        pytest.fail("uv is not installed")
    return found or pytest.skip("uv is not installed")


class Environment:
    """A virtual environment, and the variables under which commands find what was built."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        more = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", "")
        self.bin = folder / "bin"
        self.environ = {
            **{key: value for key, value in os.environ.items() if key not in _OF_THIS_RUN},
            "UV_FIND_LINKS": ",".join([str(wheels), *more.split()]),
            "VIRTUAL_ENV": str(folder),
            "PATH": os.pathsep.join(
                [str(self.bin), str(Path(find_uv()).parent), os.environ["PATH"]]
            ),
            "FLOWMESH_STRICT_PLUGINS": "1",
        }

    def run(self, *arguments: str, cwd: Path) -> str:
        done = subprocess.run(
            arguments, cwd=cwd, env=self.environ, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of the core and of the sample."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, SAMPLE):
        build = [find_uv(), "build", "--wheel", "--quiet", "--out-dir", str(folder), str(project)]
        subprocess.run(build, check=True, timeout=300)
    return folder


@pytest.fixture
def venv(tmp_path: Path, wheels: Path) -> Environment:
    """An empty environment."""
    environment = Environment(tmp_path / "venv", wheels)
    environment.run("uv", "venv", "-q", "--python", sys.executable, "venv", cwd=tmp_path)
    return environment


def test_a_wheel_of_someone_else_is_installed_listed_run_examined_and_served(
    venv: Environment,
    tmp_path: Path,
    flowmesh_redis_url: str,
    flowmesh_orchestrator: StandInOrchestrator,
) -> None:
    venv.run("uv", "pip", "install", "-q", "acme-shout[dev]", cwd=tmp_path)
    rows = json.loads(venv.run("flowmesh", "plugins", "list", "--json", cwd=tmp_path))
    assert {row["name"]: row["version"] for row in rows}["acme-shout"] == "1.2.0"

    document = SAMPLE / "examples" / "shout.yaml"
    (report,) = json.loads(venv.run("flowmesh", "run", str(document), "--json", cwd=tmp_path))
    assert [item["output"] for item in report["result"]["items"]] == ["HELLO!!!", "WORLD!!!"]
    examined = json.loads(venv.run("flowmesh", "kit", "acme.shout", "--json", cwd=tmp_path))
    assert "failed" not in {check["outcome"] for check in examined["checks"]}

    results = tmp_path / "worker-results"
    variables = {"REDIS_URL": flowmesh_redis_url, "RESULTS_DIR": str(results)}
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [venv.bin / "flowmesh", "worker"], env={**venv.environ, **variables}, stderr=log
        )
    try:
        flowmesh_orchestrator.wait_workers(1, 60)
        task_id = flowmesh_orchestrator.submit(yaml.safe_load(document.read_text("utf-8")))
        assert flowmesh_orchestrator.wait_task(task_id, 60).status == "DONE"
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
    assert (results / task_id / "shouts.txt").read_text() == "HELLO!!!\nWORLD!!!\n"


@pytest.mark.parametrize("resolution", ["highest", "lowest-direct"])
def test_a_new_project_passes_its_own_continuous_integration(
    resolution: str, venv: Environment, tmp_path: Path
) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Names of the shortest and the longest kind: the formatter agrees with both.
    name = "acme-tts" if resolution == "highest" else f"flowmesh-acme-{'long' * 6}-b"
    folder = tmp_path / name
    create = [sys.executable, "-m", "flowmesh_core", "new", "executor", name]
    venv.run(*create, cwd=tmp_path)
    del venv.environ["VIRTUAL_ENV"]  # the workflow makes one in the project
    job = yaml.safe_load((folder / ".github/workflows/test.yml").read_text("utf-8"))["jobs"]["test"]
    for step in job["steps"]:
        line = step.get("run", "true").replace("${{ matrix.resolution }}", resolution)
        venv.run("bash", "-ec", line.replace("${{ matrix.python }}", here), cwd=folder)
    assert len([*(folder / "dist").glob("*.whl")]) == 1
    ran = venv.run(".venv/bin/flowmesh", "run", "examples/example.yaml", cwd=folder)
    assert re.search(r"> world\n +WORLD", ran)


def test_a_single_file_with_an_engine_passes_all_checks_after_the_formatter(
    venv: Environment, tmp_path: Path
) -> None:
    (tmp_path / "count.py").write_text(HEAVY)
    create = [sys.executable, "-m", "flowmesh_core", "new", "executor", "acme-count"]
    told = venv.run(*create, "--from", "count.py", cwd=tmp_path)
    assert "ruff check --fix . && ruff format ." in told
    folder = tmp_path / "acme-count"
    venv.run("uv", "pip", "install", "-q", "-e", ".[dev]", cwd=folder)
    checks = "ruff check -q --fix . && ruff format -q . && pytest -q && mypy && ruff check ."
    venv.run("bash", "-ec", f"{checks} && ruff format --check .", cwd=folder)
    plugin = (folder / "src/acme_count/plugin.py").read_text()
    assert "hypothesis" not in plugin
    ran = venv.run("flowmesh", "run", "examples/example.yaml", "--json", cwd=folder)
    assert json.loads(ran)[0]["result"] == {"ok": True, "by": "hypothesis", "counts": [0, 1, 2]}
    readme = (folder / "README.md").read_text().splitlines()
    (kit,) = [line for line in readme if line.startswith("flowmesh kit ")]
    venv.run(*kit.split(), cwd=folder)
