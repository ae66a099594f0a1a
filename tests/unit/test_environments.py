"""Environments beside the worker's own: found, asked, remembered, built, linked, removed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

import flowmesh_core
from flowmesh_core.checking import check_workflow
from flowmesh_core.config import Settings, load_settings
from flowmesh_core.errors import ConfigError, PluginError
from flowmesh_core.places import environments
from flowmesh_core.places.environments import (
    Environment,
    check_there,
    list_environments,
    mark_of,
    read_offer,
)
from flowmesh_core.places.installer import (
    build_environment,
    link_environment,
    remove_environment,
)
from flowmesh_core.plugins import load_plugins
from flowmesh_core.workflow import expand_workflow

PLUGIN = """
import os
import re
from flowmesh_core import ExecutorInfo, hookimpl

with open({log!r}, "a") as file:
    file.write("asked\\n")

{more}

@hookimpl
def flowmesh_register_executors():
    info = {{"name": "acme", "task_types": ["tts"], "target": "acme:X", "spec": "acme_spec:Spec"}}
    return [ExecutorInfo(**info, needs=["acme_engine"])]
"""
SPEC = """
from pydantic import Field
from flowmesh_core import TaskSpec

class Spec(TaskSpec):
    speed: int = Field(default=1, ge=1)
"""


def make_venv(folder: Path) -> Path:
    """Make an environment that sees this one's core and libraries; return its site-packages."""
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    core = Path(flowmesh_core.__file__).parents[1]
    (packages / "seen.pth").write_text(f"{core}\n{sysconfig.get_path('purelib')}\n")
    return packages


def write_plugin(packages: Path, log: Path, more: str = "") -> None:
    (packages / "acme_plugin.py").write_text(PLUGIN.format(log=str(log), more=more))
    (packages / "acme_spec.py").write_text(SPEC)
    info = packages / "acme-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[flowmesh]\nacme = acme_plugin\n")


@attrs.define
class Acme:
    """An environment with one plugin, which notes each time that it is imported."""

    folder: Path
    packages: Path
    log: Path

    def write(self, more: str = "") -> None:
        write_plugin(self.packages, self.log, more)

    def read(self, **settings: Any) -> environments.Offer:
        chosen = Settings(**{"only_plugins": ("acme",), **settings})
        return read_offer(Environment(name="acme", folder=self.folder), chosen)

    @property
    def asked(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def acme(tmp_path: Path) -> Acme:
    folder = tmp_path / "envs" / "acme"
    made = Acme(folder, make_venv(folder), tmp_path / "imports.log")
    made.write()
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(envs_dir=tmp_path / "envs", only_plugins=("acme",))


def script(path: Path, text: str, *, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)
    return path


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(what: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


# Which there are.


def test_every_subfolder_or_link_with_an_interpreter_is_an_environment(tmp_path: Path) -> None:
    envs = tmp_path / "envs"
    for name in ("b", "a-1.2_x", ".hidden", "no good", "half"):
        script(envs / name / "bin" / "python", "")
    mark_of(envs, "half").touch()
    (envs / "empty").mkdir()
    (envs / "file").touch()
    (envs / "linked").symlink_to(envs / "b")
    (envs / "lost").symlink_to(tmp_path / "gone")
    (envs / "old" / "bin").mkdir(parents=True)
    (envs / "old" / "bin" / "python").symlink_to(tmp_path / "gone")
    found = list_environments(envs)
    assert [each.name for each in found] == ["a-1.2_x", "b", "linked", "lost", "old"]
    assert found[1].python == envs / "b" / "bin" / "python"


def test_a_relative_folder_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "envs" / "a" / "bin" / "python", "")
    monkeypatch.chdir(tmp_path)
    (found,) = list_environments(Path("envs"))
    assert found.folder == tmp_path / "envs" / "a"


def test_no_folder_means_no_environments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list_environments(None) == ()
    assert list_environments(tmp_path / "gone") == ()
    assert not caplog.records
    (tmp_path / "file").touch()
    assert list_environments(tmp_path / "file") == ()
    (record,) = caplog.records
    expected = f"environments are left out: FLOWMESH_ENVS {tmp_path}/file: Not a directory"
    assert record.getMessage() == expected


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"FLOWMESH_ENVS": "/e"}, "/e"),
        ({"FLOWMESH_ENVS": "", "HOME": "/h"}, "/h/.local/share/flowmesh/envs"),
        ({"XDG_DATA_HOME": "/d", "HOME": "/h"}, "/d/flowmesh/envs"),
        ({"XDG_DATA_HOME": "relative", "HOME": "/h"}, "/h/.local/share/flowmesh/envs"),
        ({}, None),
    ],
)
def test_the_folder_is_named_by_variables(environ: dict[str, str], folder: str | None) -> None:
    assert load_settings(environ).envs_dir == (folder and Path(folder))


# Asking.


def test_an_environment_tells_its_versions_its_plugins_and_what_they_lack(acme: Acme) -> None:
    offer = acme.read()
    assert offer.core == flowmesh_core.__version__
    assert offer.api == flowmesh_core.API_VERSION
    assert offer.python == ".".join(map(str, sys.version_info[:3]))
    (row,) = (row for row in offer.plugins if row["name"] == "acme")
    assert (row["distribution"], row["version"], row["state"]) == ("acme", "1.2", "loaded")
    assert row["executors"][0]["missing"] == ["acme_engine"]
    assert "flowmesh-core" not in {row["distribution"] for row in offer.plugins}


LOUD = """
import sys, threading, time
print("not json" * 50_000)
os.write(1, b"nor this")
print("noise", file=sys.stderr)
threading.Thread(target=time.sleep, args=(600,)).start()
assert sys.stdin.read() == "" and "" not in sys.path and os.getcwd() not in sys.path
assert "/from/pythonpath" not in sys.path
"""


def test_nothing_that_a_plugin_prints_starts_or_waits_for_disturbs_the_answer(
    acme: Acme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/from/pythonpath")
    monkeypatch.chdir(acme.folder)
    acme.write(LOUD)
    (row,) = (row for row in acme.read().plugins if row["name"] == "acme")
    assert (row["state"], row["reason"]) == ("loaded", "")


def test_a_process_that_a_plugin_leaves_behind_is_ended(acme: Acme, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    acme.write(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
    )
    acme.read()
    wait_until(lambda: gone(int(pid.read_text())))


def test_block_lists_hold_before_import(acme: Acme) -> None:
    acme.write("os._exit(7)")
    with pytest.raises(PluginError, match="its Python ended with exit code 7: it said nothing"):
        acme.read()
    (row,) = (row for row in acme.read(disable_plugins=("acme",)).plugins if row["name"] == "acme")
    assert (row["state"], row["reason"]) == ("disabled", "named in FLOWMESH_DISABLE_PLUGINS")


GOOD = '{"core": "0.1.0", "api": "%s", "python": "3.12.1", "plugins": [], "paths": []}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "echo first >&2; echo last >&2; echo >&2; exit 3",
            "its Python ended with exit code 3: last",
        ),
        ("kill -SEGV $$", "its Python ended with SIGSEGV: it said nothing"),
        ("echo hello", "its answer is no JSON"),
        ("", "its answer is no JSON"),
        ("echo '{}'", "its answer cannot be read: KeyError('core')"),
        ("echo '[1]'", "its answer cannot be read: TypeError("),
        (
            f"echo '{GOOD % '9.1'}'",
            "its flowmesh-core 0.1.0 has executor API 9.1, this one 1.0; install versions",
        ),
    ],
)
def test_an_environment_that_gives_no_proper_answer_says_why(
    tmp_path: Path, text: str, reason: str
) -> None:
    script(tmp_path / "x" / "bin" / "python", text)
    environment = Environment(name="x", folder=tmp_path / "x")
    with pytest.raises(PluginError, match=r"^environment x: ") as caught:
        read_offer(environment, Settings())
    assert str(caught.value).startswith(f"environment x: {reason}")
    assert not (environment.folder / ".flowmesh.json").exists()


def test_a_later_minor_api_version_is_accepted(tmp_path: Path) -> None:
    script(tmp_path / "x" / "bin" / "python", f"echo '{GOOD % '1.9'}'")
    offer = read_offer(Environment(name="x", folder=tmp_path / "x"), Settings())
    assert (offer.api, offer.plugins) == ("1.9", ())


@pytest.mark.parametrize(
    ("mode", "reason"), [(None, "No such file or directory"), (0o644, "Permission denied")]
)
def test_an_interpreter_that_cannot_be_started_is_named(
    tmp_path: Path, mode: int | None, reason: str
) -> None:
    python = tmp_path / "x" / "bin" / "python"
    if mode:
        script(python, "", mode=mode)
    with pytest.raises(PluginError, match=f"{python} cannot be started: {reason}$"):
        read_offer(Environment(name="x", folder=tmp_path / "x"), Settings())


def test_an_environment_without_the_core_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "x", symlinks=True, with_pip=False)
    with pytest.raises(PluginError, match=r"exit code 1: .*No module named 'flowmesh_core'"):
        read_offer(Environment(name="x", folder=tmp_path / "x"), Settings())


def test_a_folder_of_the_cores_name_where_the_command_runs_is_not_the_core(
    acme: Acme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flowmesh_core").mkdir()
    (tmp_path / "flowmesh_core" / "__init__.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    assert acme.read().core == flowmesh_core.__version__


def test_whatever_gives_no_answer_in_time_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_ANSWER_S", 0.5)
    pids = tmp_path / "pids"
    text = f"sleep 600 & echo $! $$ > {pids}; echo loading >&2; wait"
    script(tmp_path / "x" / "bin" / "python", text)
    with pytest.raises(PluginError, match=r"gave no answer within 0\.5 s; loading"):
        read_offer(Environment(name="x", folder=tmp_path / "x"), Settings())
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: gone(int(pid)))  # type: ignore[misc]


# Remembering.


def settle(acme: Acme) -> None:
    """Read until the answer is kept: what changed a moment ago is not."""

    def is_kept() -> bool:
        acme.read()
        return (acme.folder / ".flowmesh.json").exists()

    wait_until(is_kept)
    acme.log.unlink()


def test_an_answer_is_asked_for_once(acme: Acme) -> None:
    settle(acme)
    assert acme.read() == acme.read()
    assert "acme" in {row["name"] for row in acme.read().plugins}
    assert acme.asked == 0


def install_another(acme: Acme) -> None:
    (acme.packages / "more-1.dist-info").mkdir()


def reinstall(acme: Acme) -> None:
    os.utime(acme.packages / "acme-1.2.dist-info")


def add_a_path(acme: Acme) -> None:
    pth = acme.packages / "seen.pth"
    pth.write_text(pth.read_text() + "/nowhere\n")


def change_the_interpreter(acme: Acme) -> None:
    os.utime(acme.folder / "pyvenv.cfg")


def spoil_the_file(acme: Acme) -> None:
    (acme.folder / ".flowmesh.json").write_text("{")


def empty_the_file(acme: Acme) -> None:
    (acme.folder / ".flowmesh.json").write_text("[]")


@pytest.mark.parametrize(
    "change",
    [
        install_another,
        reinstall,
        add_a_path,
        change_the_interpreter,
        spoil_the_file,
        empty_the_file,
    ],
    ids=lambda change: change.__name__,
)
def test_an_answer_is_forgotten_when_something_changes(
    acme: Acme, change: Callable[[Acme], None]
) -> None:
    settle(acme)
    change(acme)
    acme.read()
    assert acme.asked == 1


def test_an_answer_to_other_block_lists_is_not_used(acme: Acme) -> None:
    settle(acme)
    assert not [r for r in acme.read(disable_plugins=("acme",)).plugins if r["state"] == "loaded"]


def test_code_outside_the_environment_is_watched_itself(acme: Acme, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("acme_plugin.py", "acme_spec.py"):
        (acme.packages / name).rename(source / name)
    (acme.packages / "editable.pth").write_text(str(source))
    settle(acme)
    acme.read()
    assert acme.asked == 0
    os.utime(source / "acme_plugin.py")
    acme.read()
    assert acme.asked == 1


def test_an_environment_that_cannot_be_written_is_asked_each_time(
    acme: Acme, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a folder in its place refuses the file whoever runs the test
    (acme.folder / ".flowmesh.json").mkdir()
    for count in (1, 2):
        time.sleep(0.15)
        assert acme.read().core == flowmesh_core.__version__
        assert acme.asked == count


# Checking documents.


def test_a_spec_is_checked_by_the_model_that_lives_there(acme: Acme, settings: Settings) -> None:
    (acme.packages / "acme_engine.py").touch()
    plugins = load_plugins(settings)
    registry = plugins.build_registry(settings, gpu_count=0)

    def check(**spec: Any) -> list[str]:
        numbers = itertools.count()
        document = {"metadata": {"name": "w"}, "spec": {"taskType": "tts", **spec}}
        workflow = expand_workflow(document, new_id=lambda: f"t{next(numbers)}")
        return check_workflow(workflow, registry)

    assert check(speed=2) == []
    problem = "spec.speed must be greater than or equal to 1, got 0"
    assert check(speed=0) == [problem]
    assert "acme_spec" not in sys.modules
    (acme.packages / "acme_spec.py").write_text("1 / 0")
    assert check(speed=2) == ["cannot import acme_spec:Spec: ZeroDivisionError: division by zero"]
    (acme.folder / "bin" / "python").unlink()
    (problem,) = check(speed=2)
    assert problem.startswith("environment acme: ")
    assert problem.endswith("cannot be started: No such file or directory")


def test_a_large_spec_with_dates_reaches_the_model(acme: Acme) -> None:
    import datetime

    python = acme.folder / "bin" / "python"
    spec = {"speed": 0, "when": datetime.date(2030, 1, 1), "text": "x" * 3_000_000}
    assert check_there("acme", python, "acme_spec:Spec", spec) == [
        "spec.speed must be greater than or equal to 1, got 0"
    ]


# Building.

UV = """
case $1 in
venv) {python} -c "import sys, venv; venv.create(sys.argv[-1], symlinks=True)" "$@" ;;
pip) echo "installing $*"; {then} ;;
esac
"""


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put an installer first on the path, which makes a bare environment and then does as told."""

    def make(then: str) -> Path:
        return script(tmp_path / "tools" / "uv", UV.format(python=sys.executable, then=then))

    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")
    return make


def seen(envs: Path) -> str:
    """Return the shell command that makes the core importable in the new environment."""
    core = Path(flowmesh_core.__file__).parents[1]
    lines = f"{core}\\n{sysconfig.get_path('purelib')}"
    return f"for p in {envs}/*/lib/python*/site-packages; do printf '{lines}' > $p/seen.pth; done"


def left_in(envs: Path) -> list[str]:
    return sorted(path.name for path in envs.iterdir() if path.name != ".lock")


def test_a_built_environment_is_listed_with_what_was_asked_for(
    uv: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    envs = tmp_path / "envs"
    uv(seen(envs))
    (tmp_path / "pins.txt").touch()
    lines: list[str] = []
    offer = build_environment(
        settings,
        "new",
        ["flowmesh-core", "acme[engine]"],
        constraints=[tmp_path / "pins.txt"],
        on_line=lines.append,
    )
    assert offer.core == flowmesh_core.__version__
    assert left_in(envs) == ["new"]
    assert [each.name for each in list_environments(envs)] == ["new"]
    assert lines == [
        f"installing pip install --python {envs}/new/bin/python --constraint {tmp_path}/pins.txt "
        "flowmesh-core acme[engine]"
    ]


def test_a_failed_build_shows_the_installers_last_lines_and_leaves_nothing(
    uv: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    uv("seq 100; echo 'no such package' >&2; exit 4")
    with pytest.raises(PluginError, match="environment new was not built: ") as caught:
        build_environment(settings, "new", ["acme"])
    first, *lines = str(caught.value).split("\n")
    assert first.endswith("new/bin/python acme ended with exit code 4")
    assert lines == [*map(str, range(87, 101)), "no such package"]
    assert left_in(tmp_path / "envs") == []


def test_a_build_without_a_usable_core_leaves_nothing(
    uv: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    uv("true")
    with pytest.raises(PluginError, match=r"environment new: .*No module named 'flowmesh_core'"):
        build_environment(settings, "new", ["acme"])
    assert left_in(tmp_path / "envs") == []


def flowmesh(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flowmesh_core", *arguments],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_build(envs: Path, pid: Path) -> subprocess.Popen[str]:
    adding = flowmesh("env", "add", "new", "acme", "--core", "x", FLOWMESH_ENVS=str(envs))
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    return adding


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_leaves_nothing_and_ends_the_installer(
    uv: Callable[[str], Path], tmp_path: Path, number: signal.Signals
) -> None:
    pid = tmp_path / "pid"
    uv(f"sleep 600 & echo $! > {pid}; wait")
    with start_build(tmp_path / "envs", pid) as adding:
        assert list_environments(tmp_path / "envs") == ()
        adding.send_signal(number)
        _, told = adding.communicate(timeout=30)
    assert (adding.returncode, told) == (130, "interrupted; nothing was kept\n")
    assert left_in(tmp_path / "envs") == []
    wait_until(lambda: gone(int(pid.read_text())))


def test_what_a_killed_build_left_is_hidden_and_gives_way_once_its_installer_has_ended(
    uv: Callable[[str], Path], settings: Settings, tmp_path: Path
) -> None:
    envs, pid = tmp_path / "envs", tmp_path / "pid"
    uv(f"sleep 600 & echo $! > {pid}; wait")
    with start_build(envs, pid) as adding:
        adding.kill()
        adding.communicate(timeout=30)
    (envs / "new" / "half").touch()
    assert list_environments(envs) == ()
    uv(seen(envs))
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)

    build_environment(settings, "new", ["acme"], on_line=note)
    assert lines[0] == "waiting for another process that works on environments"
    assert left_in(envs) == ["new"]
    assert not (envs / "new" / "half").exists()


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "-x", "a b", "é", "x" * 129, "a\n"])
def test_a_name_that_is_not_plain_is_refused(settings: Settings, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an environment's name must begin with a letter"):
        build_environment(settings, name, ["acme"])
    with pytest.raises(ConfigError, match="an environment's name must begin with a letter"):
        link_environment(settings, name, tmp_path)
    with pytest.raises(ConfigError, match=r"no environment .*; known are none"):
        remove_environment(settings, name)
    assert left_in(tmp_path / "envs") == []


def test_a_name_that_is_taken_is_refused(acme: Acme, settings: Settings) -> None:
    taken = "envs/acme is there already; remove it or take another name"
    with pytest.raises(ConfigError, match=taken):
        build_environment(settings, "acme", ["acme"])
    with pytest.raises(ConfigError, match=taken):
        link_environment(settings, "acme", acme.folder)
    assert acme.read().core


def test_without_a_folder_for_environments_none_can_be_added(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FLOWMESH_ENVS must name a folder"):
        build_environment(Settings(), "new", ["acme"])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="FLOWMESH_ENVS must be a folder that can be written"):
        build_environment(Settings(envs_dir=tmp_path / "file"), "new", ["acme"])


def test_without_uv_an_unknown_python_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.places.installer._find_uv", lambda: None)
    with pytest.raises(ConfigError, match="--python must be an interpreter or its version, got '9"):
        build_environment(settings, "new", ["acme"], python="9.9")
    assert left_in(tmp_path / "envs") == []


# Linking and removing.


def test_a_linked_environment_is_used_where_it_lies_and_only_unlinked(
    settings: Settings, tmp_path: Path
) -> None:
    packages = make_venv(tmp_path / "mine")
    write_plugin(packages, tmp_path / "log")
    offer = link_environment(settings, "acme", tmp_path / "mine")
    assert [row["name"] for row in offer.plugins if row["state"] == "loaded"] == ["acme"]
    assert load_plugins(settings).pythons == {"acme": tmp_path / "envs/acme/bin/python"}
    remove_environment(settings, "acme")
    assert left_in(tmp_path / "envs") == []
    assert (tmp_path / "mine" / "bin" / "python").exists()


def test_what_is_no_environment_is_not_linked(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"environment acme: .* cannot be started"):
        link_environment(settings, "acme", tmp_path)
    assert left_in(tmp_path / "envs") == []


def test_removing_deletes_a_built_one_and_what_a_killed_process_left(
    acme: Acme, settings: Settings, tmp_path: Path
) -> None:
    half = tmp_path / "envs" / "half"
    script(half / "bin" / "python", "")
    mark_of(tmp_path / "envs", "half").touch()
    (tmp_path / "envs" / "data").mkdir()
    for name in ("data", "other"):
        with pytest.raises(ConfigError, match=f"no environment '{name}'; known are acme$"):
            remove_environment(settings, name)
    remove_environment(settings, "half")
    remove_environment(settings, "acme")
    assert left_in(tmp_path / "envs") == ["data"]


# The command.


def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
    with flowmesh(*arguments, **environ) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_the_command_lists_links_and_removes(tmp_path: Path) -> None:
    envs = str(tmp_path / "envs")
    environ = {"FLOWMESH_ENVS": envs, "FLOWMESH_ONLY_PLUGINS": "acme"}
    packages = make_venv(tmp_path / "mine")
    write_plugin(packages, tmp_path / "log")
    python = ".".join(map(str, sys.version_info[:3]))
    version = flowmesh_core.__version__
    code, out, err = run("env", "add", "acme", "--path", str(tmp_path / "mine"), **environ)
    assert (code, err) == (0, "")
    assert out.startswith(f"environment acme: Python {python}, flowmesh-core {version}, plugins: ")
    script(tmp_path / "envs" / "bad" / "bin" / "python", "exit 1")
    _, out, _ = run("env", "list", **environ)
    assert out.splitlines()[0].split() == ["ENVIRONMENT", "STATE", "PYTHON", "CORE", "PLUGINS"]
    assert out.splitlines()[1].split()[:4] == ["acme", "ready", python, version]
    good, bad = json.loads(run("env", "list", "--json", **environ)[1])
    assert (good["state"], good["folder"], good["python"]) == ("ready", f"{envs}/acme", python)
    assert "acme" in good["plugins"]
    assert (bad["name"], bad["state"], bad["plugins"]) == ("bad", "broken", [])
    assert bad["reason"] == "environment bad: its Python ended with exit code 1: it said nothing"
    assert run("env", "remove", "acme", **environ)[:2] == (0, "environment acme: removed\n")
    code, _, err = run("env", "remove", "acme", **environ)
    assert (code, err) == (2, "error: no environment 'acme'; known are bad\n")


@pytest.mark.parametrize(
    "arguments", [["x"], ["x", "acme", "--path", "p"], ["x", "--core", "c"], []], ids=str
)
def test_the_command_needs_a_requirement_or_a_path(tmp_path: Path, arguments: list[str]) -> None:
    code, _, err = run("env", "add", *arguments, FLOWMESH_ENVS=str(tmp_path / "envs"))
    assert code == 2
    assert "Usage: flowmesh env add" in err
    assert not (tmp_path / "envs").exists()


def test_the_plugin_list_shows_the_environment(tmp_path: Path) -> None:
    environ = {"FLOWMESH_ENVS": str(tmp_path / "envs"), "FLOWMESH_ONLY_PLUGINS": "acme,echo"}
    write_plugin(make_venv(tmp_path / "envs" / "mine"), tmp_path / "log")
    _, out, _ = run("plugins", "list", **environ)
    (row,) = [line for line in out.splitlines() if line.startswith("acme ")]
    serves = "acme (tts) needs acme_engine:"
    told = re.sub(r"\s+(\d+ ms\s+)?", " ", row)
    assert told == f"acme acme 1.2 mine loaded {serves}"
    shown = run("plugins", "show", "acme", **environ)[1]
    assert "\nenvironment: mine\n" in shown
    (report,) = [
        report
        for report in json.loads(run("plugins", "list", "--json", **environ)[1])
        if report["name"] == "acme"
    ]
    assert report["environment"] == report["executors"][0]["environment"] == "mine"
