"""Who imports whom: the layers of the core, its single doors, and what a plugin may see.

Every import counts, wherever it stands: at the top, in a function, under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "flowmesh_core"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))

# Each line may import from the lines above it, and one way within itself.
LAYERS = (
    "errors",
    "wire validation quantities contract events config masking importing bounded_folder time_limit",
    "specs workflow templates rows data checkpoints files models inputs answers executor hookspecs"
    " hook_trace serving merge ledger echo",
    "task_log task_progress",
    "distributions plugins plugin_candidates plugin_reports registry artifacts stores transports"
    " places telemetry",
    "checking resources batches reservations members preparation result_cache runner presence"
    " housekeeping doctor doctor_child",
    "worker",
    "local_run cli testing scaffold __main__",
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

# Library: where it may be imported.
DOORS = {
    "redis": ("transports/", "testing/"),
    "httpx": ("artifacts/network.py", "artifacts/fetch.py", "stores/http.py", "testing/"),
    "isal": ("artifacts/",),
    "tarfile": ("artifacts/",),
    "zipfile": ("artifacts/",),
    "importlib.metadata": (
        *("distributions.py", "plugin_candidates.py", "plugins.py"),
        "scaffold/requirements.py",
    ),
    "packaging": ("distributions.py",),
    "stevedore": ("plugins.py",),
    "psutil": ("telemetry/", "places/", "testing/"),
    "pynvml": ("telemetry/",),
    "subprocess": ("places/", "artifacts/pigz.py", "testing/"),
    "click": ("cli/",),
    "rich": ("cli/",),
    "yaml": ("cli/",),
    # What unpickles runs whatever it is given.
    "pickle": (),
    "shelve": (),
    "marshal": (),
}
# Names that reach the environment: where they may stand.
ENVIRONMENT = ("config.py", "testing/fixtures.py", "testing/worker_process.py")
PUBLIC = {"transports", "places", "stores", "workflow", "testing"}
# The places that may catch everything; each says why beside it.
CATCHERS = {
    "members.py",
    "plugins.py",
    "places/child.py",
    "places/engine_process.py",
    "places/inline.py",
    "places/settle.py",
    "runner.py",
    "telemetry/heartbeat.py",
    "time_limit.py",
    "worker.py",
}


@attrs.frozen
class Import:
    """One imported name: ``flowmesh_core.artifacts.layout`` or ``redis.retry.Retry``."""

    file: str
    line: int
    name: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path, folder: Path) -> Iterator[Import]:
    file = path.relative_to(folder).as_posix()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import hides its layer"
            yield from (
                Import(file, node.lineno, f"{node.module}.{alias.name}") for alias in node.names
            )


def all_imports() -> list[Import]:
    return [found for path in sources(CORE) for found in imports(path, CORE)]


def layer_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def internal(found: Import) -> str:
    """Return the layer that is imported; empty for another package or the bare version."""
    parts = found.name.split(".")
    inside = parts[0] == "flowmesh_core" and parts[1:] and parts[1] != "__version__"
    return parts[1] if inside else ""


def is_below(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def test_every_module_has_its_layer() -> None:
    found = {layer_of(path.relative_to(CORE).as_posix()) for path in sources(CORE)}
    assert found - {"__init__"} == set(LEVELS)


def test_no_arrow_points_up() -> None:
    wrong = [
        found.place
        for found in all_imports()
        if found.file != "__init__.py"
        and internal(found)
        and LEVELS.get(internal(found), len(LAYERS)) > LEVELS[layer_of(found.file)]
    ]
    assert not wrong, wrong


def test_the_core_never_imports_itself_through_its_front_door() -> None:
    names = {path.stem for path in CORE.iterdir()} | {"__version__"}
    wrong = [
        found.place
        for found in all_imports()
        if found.file != "__init__.py"
        and found.name.startswith("flowmesh_core.")
        and found.name.split(".")[1] not in names
    ]
    assert not wrong, wrong


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_runs_in_a_circle() -> None:
    modules = {module_of(path): path for path in sources(CORE)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [found.name for found in imports(path, CORE)] if module != "flowmesh_core" else []
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = targets & modules.keys() - {module, "flowmesh_core"}
    assert [*TopologicalSorter(graph).static_order()]


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    wrong = [
        found.place
        for found in all_imports()
        if is_below(found.name, library) and not found.file.startswith(DOORS[library])
    ]
    assert not wrong, wrong


def environment_readers(tree: ast.Module) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")
        ):
            yield node


def test_the_environment_is_reached_in_one_file() -> None:
    files = {
        path.relative_to(CORE).as_posix()
        for path in sources(CORE)
        if any(environment_readers(parse(path)))
    }
    files |= {found.file for found in all_imports() if found.name in ("os.environ", "os.getenv")}
    assert files <= set(ENVIRONMENT)


def test_nobody_writes_the_environment() -> None:
    changes = re.compile(
        r"os\.(putenv|unsetenv)|os\.environ(\[[^]]*\] = |\.(pop|update|setdefault|clear)\()"
    )
    folders = [CORE, *(path / "src" for path in PLUGINS)]
    wrong = [
        str(path)
        for folder in folders
        for path in sources(folder)
        if changes.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


def catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
    swallows = not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return swallows and (handler.type is None or bool(names & {"Exception", "BaseException"}))


def test_only_named_places_catch_everything_and_each_says_why() -> None:
    found: set[str] = set()
    for path in sources(CORE):
        file, lines = path.relative_to(CORE).as_posix(), path.read_text("utf-8").splitlines()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler) and catches_everything(node):
                found.add(file)
                line = lines[node.lineno - 1]
                assert re.search(r"# noqa: BLE001 - \w+", line), f"{file}:{node.lineno}: {line}"
    assert found == CATCHERS


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_sees_the_public_api_alone(folder: Path) -> None:
    exported = exported_names()
    others = {f"flowmesh_{path.name.removeprefix('flowmesh-')}" for path in PLUGINS}
    others.discard(folder.name.replace("-", "_"))
    wrong = []
    for path in sources(folder / "src"):
        for found in imports(path, folder):
            parts = found.name.split(".")
            inner = parts[0] == "flowmesh_core" and parts[1] not in exported | PUBLIC
            if inner or parts[0] in others:
                wrong.append(found.place)
    assert not wrong, wrong


def exported_names() -> set[str]:
    """Return what the façade shows, without importing it."""
    block = next(node for node in parse(CORE / "__init__.py").body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name)
    assert block.test.id == "TYPE_CHECKING"
    return {alias.name for node in block.body for alias in getattr(node, "names", [])}


DISTRIBUTION_OF = {
    "attr": "attrs",
    "fastmcp": "fastmcp-slim",
    "pydantic_ai": "pydantic-ai-slim",
    "pynvml": "nvidia-ml-py",
    "qdrant_edge": "qdrant-edge-py",
    "yaml": "pyyaml",
}
# Asked for only when it is there, with a sentence that says how to install it.
OPTIONAL = {"datasets"}
# Specs are pydantic models and rows attrs classes: the core brings both for its plugins.
FROM_THE_CORE = {"attrs", "pydantic"}


def declared(folder: Path) -> set[str]:
    """Return the distributions that a pyproject.toml names, without its build system's."""
    text = (folder / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
    return {name.lower() for name in re.findall(r'"([A-Za-z0-9][A-Za-z0-9._-]*) ?[<>=\[;]', text)}


@pytest.mark.parametrize(
    ("folder", "source"),
    [(ROOT, CORE), *((path, path / "src") for path in PLUGINS)],
    ids=lambda path: path.name,
)
def test_every_imported_package_is_declared(folder: Path, source: Path) -> None:
    own = {path.name for path in [*source.iterdir(), source]}
    foreign = {
        found.name.split(".")[0]: found.place
        for path in sources(source)
        for found in imports(path, folder)
    }
    allowed = declared(folder) | OPTIONAL | (FROM_THE_CORE if folder != ROOT else set())
    wrong = [
        place
        for name, place in foreign.items()
        if name not in own | set(sys.stdlib_module_names)
        and DISTRIBUTION_OF.get(name, name).replace("_", "-") not in allowed
    ]
    assert not wrong, wrong


def test_the_checks_here_see_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import os\nfrom flowmesh_core.worker import Worker\n"
        "def f():\n    import redis.retry\n    os.environ\n"
        "    try:\n        f()\n    except (Exception, SystemExit):\n        pass\n"
    )
    names = [found.name for found in imports(path, tmp_path)]
    assert names == ["os", "flowmesh_core.worker.Worker", "redis.retry"]
    assert is_below("redis.retry", "redis")
    assert not is_below("redistool", "redis")
    assert len([*environment_readers(parse(path))]) == 1
    handlers: Iterable[ast.AST] = ast.walk(parse(path))
    assert any(catches_everything(n) for n in handlers if isinstance(n, ast.ExceptHandler))
    assert {"attrs", "pluggy", "hypothesis"} <= declared(ROOT)
    assert "hatchling" not in declared(ROOT)
    assert {"Executor", "Worker", "hookimpl"} <= exported_names()
