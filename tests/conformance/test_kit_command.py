"""``flowmesh kit``, as a user calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOUND = Path(__file__).parent / "broken" / "sound.py"
EXECUTORS = Path(__file__).parent / "broken" / "executors.py"


def kit(
    *arguments: str, cwd: Path, stdin: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", "kit", *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_declared_example_is_enough(tmp_path: Path) -> None:
    done = kit("echo", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("echo of flowmesh-core ")
    assert "executor API 1.0 x kit 1.0, flowmesh-core " in first
    assert "  passed   its example succeeds [example]" in lines
    at = lines.index("  skipped  what it refuses is not tried again [final]")
    assert lines[at + 1].strip() == "give refused: specs that it must refuse"
    counts, unchecked = last.split("; not checked: ")
    assert re.fullmatch(r"\d+ passed, \d+ skipped", counts)
    assert {"refused", "final", "cancel", "deadline"} < {*unchecked.split(", ")}
    assert "shrink" not in unchecked  # it does not promise that
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_shown_by_its_first_line_and_ends_it_with_1(tmp_path: Path) -> None:
    files = ("--plugin", str(SOUND), "--plugin", str(EXECUTORS))
    done = kit("broken.AnswersNaN", *files, "-k", "example or result", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    at = lines.index("  failed   its result is json of the declared model [result]")
    assert lines[at + 1].strip() == "result.score is nan, which JSON has no number for"
    assert lines[-1] == "1 failed, 1 passed"


def test_the_report_as_json_says_everything(tmp_path: Path) -> None:
    report = report_of(kit("echo", "--json", "-k", "succeeds", cwd=tmp_path))
    checks = report.pop("checks")
    assert report.keys() == {
        *("executor", "distribution", "version"),
        *("core_version", "api_version", "kit_version"),
    }
    assert (report["executor"], report["distribution"]) == ("echo", "flowmesh-core")
    assert [(check["clause"], check["outcome"]) for check in checks] == [
        ("example", "passed"),
        ("retry", "passed"),
    ]


@pytest.mark.parametrize("form", ["document", "spec"])
def test_a_document_of_standard_input_can_be_changed(form: str, tmp_path: Path) -> None:
    spec = {"data": {"type": "list", "items": ["a"]}, "steps": 2}
    document = {"spec": spec} if form == "document" else spec
    change = "spec.steps=many" if form == "document" else "steps=many"
    arguments = ("sound", "--plugin", str(SOUND), "--spec", "-", "-k", "succeeds", "--json")
    good = report_of(kit(*arguments, cwd=tmp_path, stdin=json.dumps(document)))
    assert good["checks"][0]["outcome"] == "passed"
    done = kit(*arguments, "--set", change, cwd=tmp_path, stdin=json.dumps(document))
    assert done.returncode == 1
    fault = report_of(done)["checks"][0]["reason"]
    assert "spec.steps must be a whole number, got 'many'" in fault


def test_without_its_engine_what_needs_none_is_checked(tmp_path: Path) -> None:
    arguments = ("sound.absent", "--plugin", str(SOUND), "--json", "-k")
    done = kit(*arguments, "engine or example or attempt", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    checks = {check["clause"]: check for check in report_of(done)["checks"]}
    assert {name: check["outcome"] for name, check in checks.items()} == {
        "light": "passed",
        "example": "skipped",
        "retry": "skipped",
    }
    assert "needs the package acme_no_engine, not installed here" in checks["example"]["reason"]


def test_what_is_given_by_files_is_checked(tmp_path: Path) -> None:
    rows = {"type": "list", "items": ["a"]}
    specs = {
        "long": {"spec": {"steps": 10**6, "data": rows}},
        "unknown": {"voice": {"pitsh": 1}},
        "good": {"data": rows},
    }
    for name, spec in specs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    files = ["--long", "long.json", "--refused", "unknown.json", "--refused", "good.json"]
    expression = "cancel or refused_by or refuses"
    done = kit("sound", "--plugin", str(SOUND), *files, "-k", expression, "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    checks = {check["clause"]: check for check in report_of(done)["checks"]}
    assert {clause: check["outcome"] for clause, check in checks.items()} == {
        "refused": "failed",
        "final": "passed",
        "cancel": "passed",
        "cold": "skipped",
        "service-end": "skipped",
    }
    assert checks["refused"]["reason"].startswith("refused[1] must fail with one of ")


def test_a_task_over_the_limit_ends(tmp_path: Path) -> None:
    document = json.dumps({"steps": 10**6, "data": {"type": "list", "items": ["a"]}})
    arguments = ("--spec", "-", "--limit", "1", "-k", "its_example", "--json")
    done = kit("sound", "--plugin", str(SOUND), *arguments, cwd=tmp_path, stdin=document)
    (check,) = report_of(done)["checks"]
    assert check["outcome"] == "failed"
    assert check["reason"].startswith("the example failed with deadline: ")


def test_each_check_is_told_as_it_ends(tmp_path: Path) -> None:
    document = tmp_path / "long.json"
    document.write_text(json.dumps({"steps": 10**6, "data": {"type": "list", "items": ["a"]}}))
    command = [sys.executable, "-m", "flowmesh_core", "kit", "sound", "--plugin", str(SOUND)]
    command += ["--spec", str(document), "--limit", "60", "-k", "installed or example_succeeds"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(2)]
            running = process.poll() is None
        finally:
            process.kill()
    assert told[1] == "  passed   it is installed [installed]\n"
    assert running


def test_the_result_of_an_example_that_failed_is_not_judged(tmp_path: Path) -> None:
    files = ("--plugin", str(SOUND), "--plugin", str(EXECUTORS))
    done = kit("broken.Exits", *files, "-k", "result_is or its_example", "--json", cwd=tmp_path)
    checks = {check["clause"]: check["outcome"] for check in report_of(done)["checks"]}
    assert checks == {"example": "failed", "result": "skipped"}


def test_an_unknown_executor_is_an_error_that_names_the_known(tmp_path: Path) -> None:
    done = kit("acme.gone", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: executor 'acme.gone' is not installed; installed are " in done.stderr
    assert "echo" in done.stderr


def test_an_expression_that_picks_nothing_is_an_error(tmp_path: Path) -> None:
    done = kit("echo", "-k", "nothing_like_it", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: no check was run (pytest ended with 5)" in done.stderr


def test_without_pytest_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; from importlib.machinery import PathFinder; real = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *a: None if name == 'pytest' else real(name, *a)\n"
        "sys.argv = ['flowmesh', 'kit', 'echo']; from flowmesh_core.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "the kit needs pytest; run: pip install 'flowmesh-core[testing]'" in done.stderr


def test_a_change_without_a_document_is_refused(tmp_path: Path) -> None:
    done = kit("echo", "--set", "a=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "--set changes a document; name it with --spec" in done.stderr


KEEPER = """
from pathlib import Path
from pydantic import BaseModel
from flowmesh_core import Executor, ExecutorInfo, hookimpl

class Options(BaseModel):
    folder: Path = Path("~/.local/share/acme")
    threads: int

class Keeper(Executor):
    def run(self, ctx):
        return {}

@hookimpl
def flowmesh_register_executors():
    name, target, settings = "acme.keeper", f"{__name__}:Keeper", f"{__name__}:Options"
    return [ExecutorInfo(name=name, task_types=name, target=target, settings=settings)]
"""


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "error: FLOWMESH_ACME_KEEPER_THREADS is required\n"),
        (
            {"THREADS": "2"},
            "error: FLOWMESH_ACME_KEEPER_FOLDER must name a folder or file for the kit: it is not "
            "set, and executor 'acme.keeper' would use ~/.local/share/acme, where the kit lets no "
            "task write\n",
        ),
        ({"THREADS": "2", "FOLDER": "/var/lib/acme"}, ""),
        ({"THREADS": "2", "FOLDER": "~/acme"}, ""),
    ],
    ids=["required", "home", "set", "meant"],
)
def test_settings_are_one_message_before_any_check(
    tmp_path: Path, variables: dict[str, str], told: str
) -> None:
    plugin = tmp_path / "keeper.py"
    plugin.write_text(KEEPER)
    environ = {f"FLOWMESH_ACME_KEEPER_{name}": value for name, value in variables.items()}
    arguments = ("acme.keeper", "--plugin", str(plugin), "-k", "installed")
    done = kit(*arguments, cwd=tmp_path, **environ)
    assert (done.returncode, done.stderr) == (2 if told else 0, told)
    assert ("[installed]" in done.stdout) is (told == "")
