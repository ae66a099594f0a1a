"""The command line: listings, help, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def flowmesh(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_list_names_every_plugin_with_state_and_task_types() -> None:
    done = flowmesh("plugins", "list")
    assert done.returncode == 0, done.stderr
    assert "PLUGIN" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("echo ")]
    told = ["echo", "flowmesh-core", "0.1.0", "loaded", "ms", "echo", "(echo)"]
    assert [word for word in row.split() if not word.isdecimal()] == told


def test_the_json_list_holds_the_declarations() -> None:
    reports = json.loads(flowmesh("plugins", "list", "--json").stdout)
    echo = next(report for report in reports if report["name"] == "echo")
    assert echo["state"] == "loaded"
    assert echo["executors"][0]["task_types"] == ["echo"]
    assert echo["hooks"] == ["flowmesh_register_executors"]


def test_show_prints_one_plugin_and_refuses_a_stranger() -> None:
    shown = json.loads(flowmesh("plugins", "show", "echo", "--json").stdout)
    assert shown["distribution"] == "flowmesh-core"
    assert "task_types: echo" in flowmesh("plugins", "show", "echo").stdout
    done = flowmesh("plugins", "show", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: plugin 'nothing' is not installed; installed are ")
    assert "echo" in done.stderr


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_plugin_can_be_left_out_of_a_local_run(tmp_path: Path, command: str) -> None:
    for name in ("acme", "other"):
        info = tmp_path / f"{name}_raises-1.2.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}-raises\nVersion: 1.2\n"
        (info / "METADATA").write_text(head)
        (info / "entry_points.txt").write_text(f"[flowmesh]\n{name} = {name}_raises\n")
        (tmp_path / f"{name}_raises.py").write_text("raise RuntimeError('it was imported')\n")
    document = tmp_path / "echo.yaml"
    document.write_text("spec: {taskType: echo}\n")
    arguments = [command, str(document), *(["--out", str(tmp_path)] if command == "run" else [])]
    environ = {
        "PYTHONPATH": str(tmp_path),
        "FLOWMESH_ONLY_PLUGINS": "acme,echo,other",
        "FLOWMESH_DISABLE_PLUGINS": "other",
        "FLOWMESH_STRICT_PLUGINS": "1",
    }
    done = flowmesh(*arguments, **environ)
    assert done.returncode == 2
    assert "is broken: RuntimeError: it was imported" in done.stderr
    done = flowmesh(*arguments, "--no-plugin", "acme", "--no-plugin", "trl", **environ)
    assert done.returncode == 0, done.stderr
    done = flowmesh(*arguments, "--no-plugin", "echo", "--no-plugin", "acme", **environ)
    assert done.returncode == 2
    assert "task type 'echo' is not known here; known are none" in done.stderr


@pytest.mark.parametrize("command", ["run", "check", "worker", "plugins"])
def test_every_command_has_help(command: str) -> None:
    done = flowmesh(command, "--help")
    assert done.returncode == 0
    assert "Usage: flowmesh" in done.stdout
    assert command in flowmesh("--help").stdout


def test_the_version_is_that_of_the_distribution() -> None:
    assert flowmesh("--version").stdout.strip() == "flowmesh-core 0.1.0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "must be a YAML document"),
        ("a: 1\n---\nb: 2", "must hold one YAML document, got 2"),
        ("- 1", "must be a mapping, got list"),
        ("spec: {taskType: nothing}", "task type 'nothing' is not known here; known are "),
        ("spec: {}", "spec.taskType is required"),
        (
            "spec: {taskType: echo, stages: [{name: a, dependsOn: [b]}, {name: a}]}",
            "a",
        ),
    ],
    ids=["yaml", "two", "list", "type", "no-type", "names"],
)
def test_a_bad_file_is_explained_with_exit_code_two(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for command in ("check", "run"):
        done = flowmesh(command, str(file))
        assert done.returncode == 2, done.stdout
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_a_worker_refuses_a_plugin_file_that_does_not_load(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import nothing_of_that_name\n")
    done = flowmesh("worker", "--plugin", str(file))
    assert done.returncode == 2
    assert "nothing_of_that_name" in done.stderr
