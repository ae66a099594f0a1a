"""``flowmesh new``: names, files, and single-file plugins taken apart."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowmesh_core.errors import ConfigError, PluginError
from flowmesh_core.scaffold.build import build_from_file, build_new
from flowmesh_core.scaffold.files import write_files
from flowmesh_core.scaffold.names import core_bounds, parse_names
from flowmesh_core.scaffold.requirements import find_requirements

ROOT = Path(__file__).parents[2]
WORDS = st.lists(st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True), min_size=2, max_size=5)
LONGEST = (["flowmesh", "acme", *["long"] * 5, "b"], ["a", "b" * 38])

LIGHT = """\
from flowmesh_core import Executor, ExecutorInfo, hookimpl


@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="acme.shout", task_types="acme.shout", target=f"{__name__}:Shout")]


class Shout(Executor):
    def run(self, ctx):
        return {"ok": True}
"""

HEAVY = '''\
"""Counts."""

from __future__ import annotations

import hypothesis  # the engine
from flowmesh_core import Executor, ExecutorInfo, TaskSpec, hookimpl

# As far as it goes.
LIMIT = 10


class CountSpec(TaskSpec):
    upto: int = LIMIT


def double(value: int) -> int:
    return 2 * value


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    return [
        ExecutorInfo(
            name="acme.count",
            task_types="acme.count",
            target=f"{__name__}:Count",
            spec=f"{__name__}:CountSpec",
        )
    ]


# The work.
class Count(Executor):
    def run(self, ctx):
        spec: CountSpec = ctx.spec
        counts = [double(n) for n in range(min(spec.upto, LIMIT))]
        return {"ok": True, "by": hypothesis.__name__, "counts": counts}
'''


def flowmesh(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def build_one(tmp_path: Path, text: str, name: str = "acme-one") -> dict[str, str]:
    """Return the files made of a single-file plugin, by path."""
    file = write(tmp_path / f"{tmp_path.name}_plugin.py", text)
    project = build_from_file(parse_names(name), file)
    return {path.as_posix(): content for path, content in project.files.items()}


# Names.


@settings(max_examples=30, deadline=None)
@example(LONGEST[0])
@example(LONGEST[1])
@given(WORDS)
def test_every_good_name_gives_python_that_parses(words: list[str]) -> None:
    name = "-".join(words)
    names = parse_names(name)
    files = build_new(names).files
    modules = [text for path, text in files.items() if path.suffix == ".py"]
    assert len(modules) == 7
    assert all(ast.parse(text) for text in modules)
    lines = [line for text in modules for line in text.splitlines() if " " in line.strip()]
    assert max(map(len, lines)) <= 100  # what cannot be broken may be longer, as ruff has it
    assert names.executor.replace(".", "-") == name.removeprefix("flowmesh-")
    assert names.package.isidentifier()
    workflow = yaml.safe_load(files[Path("examples/example.yaml")])
    assert workflow["spec"]["taskType"] == names.executor
    assert not [text for text in files.values() if "$pack" in text or "${cls" in text]


@settings(deadline=None)
@given(st.text("abz09-_. /\n", max_size=45) | st.text(max_size=10))
def test_any_text_is_a_good_name_or_is_refused(name: str) -> None:
    try:
        names = parse_names(name)
    except ConfigError:
        return
    assert names.name == name
    assert name.isascii()
    assert names.package.isidentifier()


@pytest.mark.parametrize(
    "name",
    [
        *("tts", "flowmesh-tts", "Acme-tts", "acme_tts", "acme--tts", "acme-", "-tts", "3d-tts"),
        *("acme-tts\n", "acme-../tts", "a-" + "b" * 39),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name must be vendor-what, such as acme-tts: .* got '"):
        parse_names(name)


def test_the_name_of_an_installed_package_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a package pydantic_core is installed already"):
        parse_names("pydantic-core")


def test_the_vendor_stands_behind_flowmesh_and_words_that_follow_stay_together() -> None:
    names = parse_names("flowmesh-acme-big-tts")
    assert names.package == "flowmesh_acme_big_tts"
    assert (names.executor, names.task_type) == ("acme.big-tts", "acme.big-tts")
    assert names.cls == "AcmeBigTts"


def test_a_task_type_must_have_a_vendor_and_both_faults_are_told() -> None:
    assert parse_names("acme-tts", "acme.speech").task_type == "acme.speech"
    with pytest.raises(ConfigError, match=r"name must be .* task type must be .* got 'inference'"):
        parse_names("tts", "inference")


# Bounds.


def test_bounds_are_those_that_the_core_has() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found, unknown = find_requirements(["pydantic", "yaml", "httpx", "no_such_package"])
    assert unknown == ["no_such_package"]
    assert sorted(found, key=str.lower) == ["httpx>=0.27,<1", "pydantic>=2.10,<3", "PyYAML>=6.0.1"]
    for requirement in found:
        assert f'"{requirement.lower()}"' in text.lower()
    assert core_bounds() == ">=0.1,<0.2"


# Files.


def test_a_folder_that_exists_is_never_written_to(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.txt", "mine")
    with pytest.raises(ConfigError, match=r"exists; nothing is overwritten"):
        write_files(tmp_path, {Path("mine.txt"): "theirs"})
    with pytest.raises(ConfigError, match=r"cannot write .*: Not a directory"):
        write_files(mine / "inside", {Path("a"): "b"})
    assert mine.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_writes_a_project_once_and_says_what_comes_next(tmp_path: Path) -> None:
    done = flowmesh("new", "executor", "acme-tts", "--task-type", "acme.speech", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "acme-tts: 15 files; what to do now:" in done.stdout
    assert "flowmesh run examples/example.yaml" in done.stdout
    plugin = (tmp_path / "acme-tts/src/acme_tts/plugin.py").read_text()
    assert 'task_types={"acme.speech"}' in plugin
    assert (tmp_path / "acme-tts/.github/workflows/test.yml").exists()
    assert (tmp_path / "acme-tts/src/acme_tts/py.typed").read_text() == ""
    again = flowmesh("new", "executor", "acme-tts", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == (
        "error: acme-tts exists; nothing is overwritten, choose another --dir\n"
    )
    assert (tmp_path / "acme-tts/src/acme_tts/plugin.py").read_text() == plugin


def test_bad_arguments_end_with_one_line_and_write_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "shout.py", LIGHT)
    bad = flowmesh("new", "executor", "TTS", cwd=tmp_path)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    both = flowmesh(
        "new", "executor", "acme-tts", "--task-type", "a.b", "--from", str(file), cwd=tmp_path
    )
    assert both.returncode == 2
    assert "--task-type is what FILE.py declares" in both.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["shout.py"]


def test_the_workflow_of_continuous_integration_runs_every_check() -> None:
    text = build_new(parse_names("acme-tts")).files[Path(".github/workflows/test.yml")]
    job = yaml.safe_load(text)["jobs"]["test"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps[0] == "uv venv --python ${{ matrix.python }}"
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest", "uv build"):
        assert any(tool in step for step in steps), tool
    assert job["env"] == {"FLOWMESH_STRICT_PLUGINS": "1"}


# Single-file plugins.


def test_a_light_file_stays_as_it_is(tmp_path: Path) -> None:
    files = build_one(tmp_path, LIGHT)
    assert files["src/acme_one/plugin.py"] == LIGHT
    assert "src/acme_one/executor.py" not in files
    assert '"flowmesh-core>=0.1,<0.2",\n]' in files["pyproject.toml"]


def test_what_imports_an_engine_is_taken_apart(tmp_path: Path) -> None:
    files = build_one(tmp_path, HEAVY)
    plugin, executor = (files[f"src/acme_one/{name}.py"] for name in ("plugin", "executor"))
    assert "hypothesis" not in plugin
    assert 'target="acme_one.executor:Count"' in plugin
    assert 'spec=f"{__name__}:CountSpec"' in plugin
    assert "# As far as it goes.\nLIMIT = 10\n" in plugin
    assert plugin.startswith('"""Counts."""\n')
    assert "import hypothesis  # the engine\n" in executor
    assert "from acme_one.plugin import CountSpec, LIMIT\n" in executor
    assert "def double(" in executor
    assert "def double(" not in plugin
    assert "# The work.\nclass Count(Executor):" in executor
    assert '"hypothesis>=6.100",' in files["pyproject.toml"]
    assert 'module = ["hypothesis.*"]' in files["pyproject.toml"]


def test_an_import_that_nobody_uses_stays_with_the_work(tmp_path: Path) -> None:
    text = HEAVY.replace(
        "from flowmesh_core", "import hypothesis.stateful as _plays\nfrom flowmesh_core"
    )
    files = build_one(tmp_path, text)
    assert "import hypothesis.stateful as _plays\n" in files["src/acme_one/executor.py"]


def test_what_cannot_be_taken_apart_stays_whole_and_says_so(tmp_path: Path) -> None:
    text = HEAVY.replace("upto: int = LIMIT", "upto: int = len(hypothesis.__name__)")
    file = write(tmp_path / "tangled.py", text)
    project = build_from_file(parse_names("acme-one"), file)
    assert project.files[Path("src/acme_one/plugin.py")] == text
    assert Path("src/acme_one/executor.py") not in project.files
    assert any("could not be taken apart" in note for note in project.notes)


def test_statements_that_share_a_line_are_not_torn_apart(tmp_path: Path) -> None:
    text = HEAVY.replace("LIMIT = 10", "LIMIT = 10; MORE = 11")
    assert build_one(tmp_path, text)["src/acme_one/plugin.py"] == text


def test_an_import_inside_a_function_loads_nothing(tmp_path: Path) -> None:
    text = LIGHT.replace("        return {", "        import hypothesis\n\n        return {")
    files = build_one(tmp_path, text)
    assert files["src/acme_one/plugin.py"] == text
    assert '"hypothesis>=6.100",' in files["pyproject.toml"]


def test_the_name_under_which_a_file_was_imported_is_replaced(tmp_path: Path) -> None:
    module = f"flowmesh_plugin_{tmp_path.name}_plugin"
    text = LIGHT.replace('f"{__name__}:Shout"', f'"{module}:Shout"')
    plugin = build_one(tmp_path, text)["src/acme_one/plugin.py"]
    assert 'target="acme_one.plugin:Shout"' in plugin


def test_the_document_beside_a_file_becomes_its_example(tmp_path: Path) -> None:
    write(tmp_path / "shout.py", LIGHT)
    text = "spec: {taskType: acme.shout, loud: true} # as written\n"
    write(tmp_path / "shout.yaml", text)
    done = flowmesh("new", "executor", "acme-shout", "--from", "shout.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shout.py is now src/acme_shout/plugin.py" in done.stdout
    assert "a guess" not in done.stdout
    assert (tmp_path / "acme-shout/examples/example.yaml").read_text() == text
    suite = (tmp_path / "acme-shout/tests/test_conformance.py").read_text()
    assert 'executor = "acme.shout"\n    spec = SPEC\n' in suite


def test_without_a_document_the_example_is_a_guess_and_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "guessed.py", LIGHT.replace("target=", 'inputs="rows", target='))
    project = build_from_file(parse_names("acme-one"), file, {"stages": []})
    spec = json.loads(project.files[Path("examples/example.yaml")])["spec"]
    assert spec["taskType"] == "acme.shout"
    assert spec["data"]["items"] == ["hello", "world"]
    assert any("is a guess" in note for note in project.notes)


def test_a_declared_example_is_no_guess(tmp_path: Path) -> None:
    text = LIGHT.replace("target=", 'example=f"{__name__}:EXAMPLE", target=')
    file = write(tmp_path / "exemplary.py", text + '\n\nEXAMPLE = {"loud": True}\n')
    project = build_from_file(parse_names("acme-one"), file)
    spec = json.loads(project.files[Path("examples/example.yaml")])["spec"]
    assert spec == {"taskType": "acme.shout", "loud": True}
    assert "spec = SPEC" not in project.files[Path("tests/test_conformance.py")]
    assert not any("is a guess" in note for note in project.notes)


def test_what_a_file_needs_and_is_not_known_here_is_asked_for(tmp_path: Path) -> None:
    text = LIGHT.replace("        return {", "        import no_such_engine\n\n        return {")
    file = write(tmp_path / "lacking.py", text)
    project = build_from_file(parse_names("acme-one"), file)
    assert any("what brings no_such_engine" in note for note in project.notes)
    assert "no_such_engine>" not in project.files[Path("pyproject.toml")]


def test_a_file_that_declares_nothing_or_breaks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"empty\.py declares no executor"):
        build_from_file(parse_names("acme-one"), write(tmp_path / "empty.py", "X = 1\n"))
    broken = write(tmp_path / "broken.py", "import no_such_engine\n")
    with pytest.raises(PluginError, match=r"no_such_engine"):
        build_from_file(parse_names("acme-one"), broken)


def test_the_readme_examines_the_executor_with_what_the_project_has(tmp_path: Path) -> None:
    command = "flowmesh kit acme.shout --spec examples/example.yaml\n"
    assert command in build_one(tmp_path, LIGHT)["README.md"]
    text = LIGHT.replace("target=", 'example=f"{__name__}:EXAMPLE", target=')
    declared = build_one(tmp_path, text + "\n\nEXAMPLE = {}\n")["README.md"]
    assert "flowmesh kit acme.shout\n" in declared
    assert "flowmesh kit acme.tts\n" in build_new(parse_names("acme-tts")).files[Path("README.md")]


def test_of_several_executors_the_readme_examines_the_one_that_the_example_runs(
    tmp_path: Path,
) -> None:
    second = 'ExecutorInfo(name="acme.b", task_types="acme.b", target=f"{__name__}:Shout")]'
    file = write(tmp_path / "pair.py", LIGHT.replace('Shout")]', f'Shout"), {second}'))
    project = build_from_file(parse_names("acme-one"), file, {"spec": {"taskType": "acme.b"}})
    readme = project.files[Path("README.md")]
    assert "flowmesh kit acme.b --spec examples/example.yaml\n" in readme
