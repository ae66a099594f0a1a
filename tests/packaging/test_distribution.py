"""What is shipped: wheels and source archives of every distribution, built here and looked into."""

from __future__ import annotations

import ast
import email
import email.message
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import attrs
import hatchling  # noqa: F401 - the builder; without it nothing here may pass
import pytest

import flowmesh_core

ROOT = Path(__file__).parents[2]
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".hypothesis"}
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]


@attrs.frozen
class Built:
    """Wheel and source archive of one distribution."""

    folder: Path
    wheel: Path
    sdist: Path

    @property
    def package(self) -> Path:
        """Where the sources of its one package are."""
        return next(iter(self.folder.glob("src/flowmesh_*")), ROOT / "flowmesh_core")

    def names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def read(self, suffix: str) -> str:
        (name,) = [name for name in self.names() if name.endswith(suffix)]
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(name).decode()

    @property
    def metadata(self) -> email.message.Message:
        return email.message_from_string(self.read(".dist-info/METADATA"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda path: path.name)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=request.param,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(request.param, wheel, sdist)


def test_the_wheel_holds_the_whole_package_and_nothing_else(built: Built) -> None:
    sources = {
        path.relative_to(built.package.parent).as_posix()
        for path in built.package.rglob("*")
        if path.is_file() and not CACHES & set(path.parts)
    }
    shipped = {name for name in built.names() if ".dist-info/" not in name}
    assert shipped == sources
    assert f"{built.package.name}/py.typed" in shipped
    assert not [name for name in shipped if "/tests/" in name or name.startswith("tests")]


def test_the_source_archive_can_be_built_and_carries_no_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "PKG-INFO"} <= names
    assert f"{built.package.relative_to(built.folder).as_posix()}/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", ".ci", "results"))]


def test_the_core_carries_its_licence(built: Built) -> None:
    if built.folder != ROOT:
        assert built.metadata["License-Expression"] == "Apache-2.0"
        return
    assert "Apache License" in built.read("licenses/LICENSE")
    with tarfile.open(built.sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())


def test_metadata_says_what_a_package_index_shows(built: Built) -> None:
    metadata = built.metadata
    assert metadata["Name"].startswith("flowmesh-")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(
        classifiers
    )


def test_a_plugin_pins_the_core_to_one_minor_version(built: Built) -> None:
    required = built.metadata.get_all("Requires-Dist") or []
    core = [entry for entry in required if entry.startswith("flowmesh-core")]
    if built.folder == ROOT:
        assert core == []
        assert built.metadata["Version"] == flowmesh_core.__version__
    else:
        assert [sorted(entry.removeprefix("flowmesh-core").split(",")) for entry in core] == [
            ["<0.2", ">=0.1"]
        ]


def entry_points(text: str) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            group = groups.setdefault(line.strip("[]"), {})
        else:
            name, _, target = line.partition(" = ")
            group[name] = target
    return groups


def test_every_entry_point_leads_somewhere(built: Built) -> None:
    groups = entry_points(built.read("entry_points.txt"))
    assert groups["flowmesh"]
    for points in groups.values():
        for name, target in points.items():
            module, _, attribute = target.partition(":")
            file = module.replace(".", "/")
            (source,) = {f"{file}.py", f"{file}/__init__.py"} & built.names()
            tree = ast.parse((built.package.parent / source).read_text(encoding="utf-8"))
            defined = {getattr(node, "name", "") for node in tree.body} | {""}
            assert attribute in defined, f"{name} = {target}"


def test_the_core_offers_its_command_fixtures_and_drivers(built: Built) -> None:
    groups = entry_points(built.read("entry_points.txt"))
    if built.folder != ROOT:
        foreign = {group for group in groups if not group.startswith("flowmesh.")}
        assert foreign - {"vllm.general_plugins"} == {"flowmesh"}
        return
    assert groups["console_scripts"] == {"flowmesh": "flowmesh_core.cli:main"}
    assert set(groups["flowmesh.transports"]) >= {"local", "redis_pubsub"}
    assert set(groups["flowmesh.stores"]) >= {"local", "http"}
    assert set(groups["flowmesh.places"]) >= {"inline"}
    assert groups["pytest11"] == {"flowmesh": "flowmesh_core.testing.fixtures"}


def test_the_shipped_files_alone_run_a_document(built: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "echo.yaml").write_text("spec: {taskType: echo, message: hi}")
    plugin = next(iter(entry_points(built.read("entry_points.txt"))["flowmesh"]))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    environ.pop("FLOWMESH_ONLY_PLUGINS", None)

    def flowmesh(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flowmesh_core", *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (report,) = json.loads(flowmesh("run", "echo.yaml", "--json"))
    assert report["result"]["echo"]["message"] == "hi"
    rows = json.loads(flowmesh("plugins", "list", "--json"))
    assert plugin in {row["name"] for row in rows}


# The names that the core shows.


def block_names() -> dict[str, str]:
    """Return name and module of every import under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "flowmesh_core" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_all_names_what_type_checkers_see_and_each_resolves() -> None:
    assert len(flowmesh_core.__all__) == len(set(flowmesh_core.__all__))
    assert set(flowmesh_core.__all__) == set(block_names())
    for name, module in block_names().items():
        value = getattr(flowmesh_core, name)
        home = f"flowmesh_core.{flowmesh_core._HOME[name]}"
        assert module == home, f"{name} is loaded from {home} and typed from {module}"
        if isinstance(value, type):
            assert value.__name__ == name


def test_a_name_that_is_not_there_says_so_and_dir_lists_the_rest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = flowmesh_core.Nothing
    assert set(flowmesh_core.__all__) <= set(dir(flowmesh_core))


def test_the_version_is_written_alike_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(flowmesh_core.__version__)}"$', text, re.MULTILINE)
    assert f"## {flowmesh_core.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
