"""The files of a new distribution, from nothing or from a single-file plugin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import attrs

from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.scaffold.files import render
from flowmesh_core.scaffold.names import Names, core_bounds
from flowmesh_core.scaffold.one_file import LIGHT, loads_much, read_one_file, split_modules
from flowmesh_core.scaffold.requirements import find_requirements

__all__ = ["Project", "build_from_file", "build_new"]

_EXAMPLE = Path("examples", "example.yaml")
_ROWS = {"data": {"type": "list", "items": ["hello", "world"]}}
_NEW_LAYOUT = """\
| File | Holds |
|---|---|
| `plugin.py` | the declaration; imports nothing but the core |
| `spec.py` | what documents may say, what results hold, the example |
| `executor.py` | the work of one task |
| `engine.py` | alone imports the library that does the work: **begin here** |"""
_FILE_LAYOUT = """\
`plugin.py` is read by every command, so that it must not import what takes long to load."""
_UNTYPED = """
[[tool.mypy.overrides]]
module = ["$package.*"] # was a single file: remove this once its functions have types
check_untyped_defs = false
disallow_untyped_defs = false
disallow_incomplete_defs = false
disallow_untyped_calls = false
disallow_untyped_decorators = false
disallow_any_generics = false
warn_return_any = false
"""
_FOREIGN = """
[[tool.mypy.overrides]]
module = [{0}]
ignore_missing_imports = true
"""


@attrs.frozen(kw_only=True)
class Project:
    """What to write, and what its author must know.

    Attributes:
        files: Text by path in the project.
        notes: One sentence each.
    """

    files: Mapping[Path, str]
    notes: tuple[str, ...] = ()


def build_new(names: Names) -> Project:
    """Return a project with an executor to start from."""
    values = _values(names, ["pydantic"])
    values |= {"dev": "", "mypy_overrides": "", "layout": _NEW_LAYOUT}
    values["kit"] = f"flowmesh kit {names.executor}"
    begin = f"put your engine into src/{names.package}/engine.py, its options into spec.py"
    return Project(files=render("new", values), notes=(begin,))


def build_from_file(names: Names, path: Path, workflow: Any = None, text: str = "") -> Project:
    """Return a project that holds a single-file plugin.

    Args:
        names: The executor's own are taken from the file.
        path: The plugin.
        workflow: A document that runs it, if there is one.
        text: That as its author wrote it.

    Raises:
        PluginError: It cannot be loaded, or declares no executor.
    """
    one = read_one_file(path)
    first = one.infos[0]
    names = attrs.evolve(names, executor=first.name, task_type=min(first.task_types))
    given = isinstance(workflow, Mapping) and isinstance(workflow.get("spec"), Mapping)
    if not given:
        workflow = {"metadata": {"name": names.name}, "spec": _guess_spec(first)}
        text = json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
    task_type = workflow["spec"].get("taskType", names.task_type)
    modules = split_modules(path, one, names.package)
    values = _values(names, one.imports) | {
        "dev": '    "types-PyYAML",\n',
        "mypy_overrides": _overrides(names, one.imports),
        "layout": _FILE_LAYOUT,
        "kit": _kit_command(one.infos, task_type),
        "suites": "".join(_suite(info, task_type) for info in one.infos),
        "executors": "".join(f"        {json.dumps(info.name)},\n" for info in one.infos),
    }
    files = render("from_file", values)
    files |= {Path("src", names.package, name): text for name, text in modules.items()}
    notes = [*_advise(names, path, modules), *_ask_for_dependencies(one.imports)]
    if not given and not first.example:
        notes.append(f"{_EXAMPLE} is a guess: let it say what {first.name} does within seconds")
    return Project(files={**files, _EXAMPLE: text}, notes=tuple(notes))


def _values(names: Names, imports: Iterable[str]) -> dict[str, str]:
    found, _ = find_requirements(imports)
    entries = sorted([f"flowmesh-core{core_bounds()}", *found], key=str.lower)
    return {
        **attrs.asdict(names),
        "core": core_bounds(),
        "dependencies": "\n".join(f'    "{entry}",' for entry in entries),
        "example": _EXAMPLE.as_posix(),
    }


def _kit_command(infos: Sequence[ExecutorInfo], task_type: str) -> str:
    """Return what examines the executor that the example runs."""
    info = next((info for info in infos if task_type in info.task_types), infos[0])
    return f"flowmesh kit {info.name}" + ("" if info.example else f" --spec {_EXAMPLE.as_posix()}")


def _overrides(names: Names, imports: Iterable[str]) -> str:
    foreign = ", ".join(f'"{package}.*"' for package in imports if package not in LIGHT)
    untyped = Template(_UNTYPED).substitute(package=names.package)
    return untyped + (_FOREIGN.format(foreign) if foreign else "")


def _guess_spec(info: ExecutorInfo) -> dict[str, Any]:
    """Return the declared example, or what may do."""
    example = import_target(info.example) if info.example else None
    if isinstance(example, Mapping):
        return {"taskType": min(info.task_types), **example}
    return {"taskType": min(info.task_types), **(_ROWS if "rows" in info.inputs else {})}


def _suite(info: ExecutorInfo, task_type: str) -> str:
    name = "".join(word.capitalize() for word in re.split(r"\W|_", info.name))
    spec = "    spec = SPEC\n" if task_type in info.task_types and not info.example else ""
    return f"\n\nclass Test{name}(ExecutorSuite):\n    executor = {json.dumps(info.name)}\n{spec}"


def _advise(names: Names, path: Path, modules: Mapping[str, str]) -> Iterator[str]:
    source = f"src/{names.package}"
    yield f"{path.name} is now {' and '.join(f'{source}/{name}' for name in sorted(modules))}"
    if len(modules) == 1 and loads_much(modules["plugin.py"]):
        yield (
            f"{source}/plugin.py imports more than the core when a command reads it, and could not "
            "be taken apart: import that inside run, or move the class to a module of its own"
        )


def _ask_for_dependencies(imports: Iterable[str]) -> Iterator[str]:
    _, unknown = find_requirements(imports)
    if unknown:
        yield (
            f"add to the dependencies in pyproject.toml what brings {', '.join(unknown)}: it is "
            "not installed here, or by several distributions"
        )
