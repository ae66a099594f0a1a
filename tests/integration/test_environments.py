"""Two plugins that need different versions of one library serve one workflow.

The wheels are built here. One environment is made by ``flowmesh env add`` as an operator would, the
other is an existing one that is linked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

import flowmesh_core
from flowmesh_core.config import Settings
from flowmesh_core.places.installer import build_environment
from flowmesh_core.plugins import core_requirement

PLUGIN = """
from flowmesh_core import ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [
        ExecutorInfo(
            name="{name}",
            task_types=["{name}"],
            target="acme_{name}.executor:Acme",
            spec="acme_{name}.executor:Spec",
            needs=["acme_codec"],
        )
    ]
"""
EXECUTOR = """
import acme_codec
from pydantic import Field
from flowmesh_core import Executor, TaskSpec

class Spec(TaskSpec):
    level: int = Field(default=1, le=acme_codec.LEVELS)

class Acme(Executor):
    def run(self, ctx):
        return {"codec": acme_codec.__version__, "level": ctx.spec.level}
"""
CODEC = "__version__ = '{version}.0'\nLEVELS = {version}\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str],
    *,
    requires: str = "",
    points: str = "",
) -> Path:
    """Write a wheel; source: the binary distribution format of the packaging guide."""
    info = f"{name}-{version}.dist-info"
    told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content = {
        **files,
        f"{info}/METADATA": told + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": WHEEL,
    }
    if points:
        content[f"{info}/entry_points.txt"] = points
    content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in content.items():
            wheel.writestr(member, text)
    return path


def write_plugin_wheel(folder: Path, name: str, codec: int) -> Path:
    package = f"acme_{name}"
    return write_wheel(
        folder,
        package,
        "1.0",
        {
            f"{package}/__init__.py": "",
            f"{package}/plugin.py": PLUGIN.format(name=name),
            f"{package}/executor.py": EXECUTOR,
        },
        requires=f"acme_codec=={codec}.0",
        points=f"[flowmesh]\n{name} = {package}.plugin\n",
    )


@attrs.frozen
class Site:
    """The folder of environments, the wheels, and the command line that sees them."""

    root: Path

    @property
    def envs(self) -> Path:
        return self.root / "envs"

    @property
    def wheels(self) -> dict[str, Path]:
        return {path.name.partition("-1")[0]: path for path in self.root.glob("*.whl")}

    def flowmesh(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "flowmesh_core", *arguments],
            cwd=self.root,
            env={
                **os.environ,
                "FLOWMESH_ENVS": str(self.envs),
                "FLOWMESH_ONLY_PLUGINS": "alpha,beta,echo",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def listed(self) -> dict[str, Any]:
        rows = json.loads(self.flowmesh("plugins", "list", "--json").stdout)
        return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Give alpha, built with the first codec, and beta, linked with the second one."""
    root = tmp_path_factory.mktemp("site")
    made = Site(root)
    codecs = [
        write_wheel(root, "acme_codec", f"{n}.0", {"acme_codec.py": CODEC.format(version=n)})
        for n in (1, 2)
    ]
    alpha, beta = (write_plugin_wheel(root, name, n) for name, n in (("alpha", 1), ("beta", 2)))
    told = made.flowmesh("env", "add", "one", f"./{alpha.name}", f"./{codecs[0].name}").stdout
    assert "plugins: alpha" in told
    venv.create(root / "mine", symlinks=True, with_pip=False)
    (packages,) = (root / "mine").glob("lib/python*/site-packages")
    core = Path(flowmesh_core.__file__).parents[1]
    (packages / "seen.pth").write_text(f"{core}\n{sysconfig.get_path('purelib')}\n")
    for wheel in (beta, codecs[1]):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    assert "beta" in made.flowmesh("env", "add", "two", "--path", "mine").stdout
    yield made
    made.flowmesh("env", "remove", "one")
    made.flowmesh("env", "remove", "two")
    assert not [path for path in made.envs.iterdir() if path.name != ".lock"]
    assert packages.is_dir(), "what was linked stays"


def test_both_plugins_are_listed_with_their_environments(site: Site) -> None:
    rows = site.listed()
    assert {name: rows[name]["environment"] for name in ("alpha", "beta", "echo")} == {
        "alpha": "one",
        "beta": "two",
        "echo": "",
    }
    for name in ("alpha", "beta"):
        assert (rows[name]["state"], rows[name]["version"]) == ("loaded", "1.0")
        assert rows[name]["executors"][0]["missing"] == []
    first, second = json.loads(site.flowmesh("env", "list", "--json").stdout)
    assert (first["name"], first["state"], first["plugins"]) == ("one", "ready", ["alpha"])
    assert (second["name"], second["state"]) == ("two", "ready")
    assert {first["core"], second["core"]} == {flowmesh_core.__version__}


WORKFLOW = """
metadata: {{name: two}}
spec:
  stages:
    - {{name: a, spec: {{taskType: alpha, level: {level}}}}}
    - {{name: b, dependsOn: [a], spec: {{taskType: beta, level: {level}}}}}
"""


def test_a_document_is_checked_by_the_models_of_its_environments(site: Site) -> None:
    (site.root / "w.yaml").write_text(WORKFLOW.format(level=1))
    assert site.flowmesh("check", "w.yaml").stdout == "a: ok\nb: ok, after a\n"
    (site.root / "w.yaml").write_text(WORKFLOW.format(level=3))
    assert site.flowmesh("check", "w.yaml", code=2).stderr.splitlines() == [
        "w.yaml: stage 'a': spec.level must be less than or equal to 1, got 3",
        "w.yaml: stage 'b': spec.level must be less than or equal to 2, got 3",
    ]


def test_one_worker_runs_both_each_with_its_own_version_of_the_library(site: Site) -> None:
    (site.root / "w.yaml").write_text(WORKFLOW.format(level=1))
    first, second = json.loads(site.flowmesh("run", "w.yaml", "--json").stdout)
    assert first["result"] == {"codec": "1.0", "level": 1}
    assert second["result"] == {"codec": "2.0", "level": 1}


def test_an_answer_is_kept_until_the_interpreter_is_gone(site: Site) -> None:
    before = site.listed()["alpha"]
    python = site.envs / "one" / "bin" / "python"
    target = python.readlink()
    python.unlink()
    python.symlink_to("/no/such/python")
    try:
        row = site.listed()["one"]
    finally:
        python.unlink()
        python.symlink_to(target)
    assert (row["state"], row["environment"], row["executors"]) == ("broken", "one", [])
    assert "cannot be started: No such file or directory; repair it, or run: " in row["reason"]
    after = site.listed()["alpha"]
    assert after == before
    assert after["import_s"] == before["import_s"] > 0, "measured once"


@pytest.mark.slow
def test_an_environment_is_built_with_pip_where_there_is_no_uv(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.places.installer._find_uv", lambda: None)
    settings = Settings(envs_dir=tmp_path / "envs")
    wheels = [
        str(path) for path in site.root.glob("*.whl") if "beta" in path.name or "-2" in path.name
    ]
    lines: list[str] = []
    offer = build_environment(settings, "pip", [*core_requirement(), *wheels], on_line=lines.append)
    assert [row["name"] for row in offer.plugins] == ["beta"]
    assert any(line.startswith("Successfully installed") for line in lines)
