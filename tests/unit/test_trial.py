"""Calls in a Python of their own, real ones, that end in every way there is."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flowmesh_core.errors import PluginError
from flowmesh_core.places.trial import Trial, try_call
from flowmesh_core.testing import wait_for

Try = Callable[..., Trial]
ENDLESS = "threading.Event().wait()"


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Try:
    """Call ``call`` with a body of the test's own."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(body: str, limit_s: float = 60.0, **arguments: object) -> Trial:
        source = "import os, signal, subprocess, sys, threading\n\n\ndef call(**given):\n"
        (tmp_path / "acme_trial.py").write_text(source + textwrap.indent(body, "    "))
        return try_call("acme_trial:call", arguments, limit_s=limit_s)

    return run


def test_an_answer_comes_back_whatever_is_printed(attempt: Try) -> None:
    trial = attempt("print('hello', flush=True)\nreturn {'got': given}", a=1, b=["ü"])
    assert trial == Trial(answer={"got": {"a": 1, "b": ["ü"]}}, output="hello")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("sys.exit(3)", "its process ended with exit code 3: it said nothing"),
        ("print('bye', flush=True)\nos._exit(4)", "its process ended with exit code 4: bye"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL"),
        (
            "from flowmesh_core.errors import PluginError\nraise PluginError('ours')",
            "ours",
        ),
    ],
    ids=["raises", "exits", "leaves", "killed", "ours"],
)
def test_how_it_ended_is_one_line(attempt: Try, body: str, problem: str) -> None:
    trial = attempt(body)
    assert (trial.problem, trial.answer, trial.hung) == (problem, None, False)


def test_a_crash_in_native_code_leaves_its_stack(attempt: Try) -> None:
    trial = attempt("import ctypes\nctypes.string_at(0)")
    assert trial.problem == "its process was killed by SIGSEGV"
    assert "acme_trial.py" in trial.output


def test_what_hangs_is_ended_and_says_where(attempt: Try, tmp_path: Path) -> None:
    trial = attempt(ENDLESS, limit_s=0.3)
    assert trial.hung
    where = f"{tmp_path / 'acme_trial.py'}:5"  # not in threading.py, where that waits
    assert trial.problem == f"hangs: it did not end within 0.3 s, at {where}"
    assert f'File "{tmp_path / "acme_trial.py"}", line 5 in call' in trial.output
    assert "flowmesh_core" not in trial.output


def test_what_holds_the_interpreter_is_ended_too(attempt: Try, tmp_path: Path) -> None:
    # PyDLL keeps the lock, so that no Python code runs beside it.
    trial = attempt("import ctypes\nctypes.PyDLL(None).pause()", limit_s=0.3)
    assert trial.hung
    assert f"{tmp_path / 'acme_trial.py'}:6" in trial.problem


def test_nothing_is_left_of_what_it_started(attempt: Try) -> None:
    trial = attempt("return subprocess.Popen(['sleep', '600']).pid")
    wait_for(lambda: not psutil.pid_exists(trial.answer) or is_zombie(trial.answer), 20)


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_another_python_brings_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_trial.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"name": "acme_trial"}
    target = "flowmesh_core.importing:is_importable"
    assert try_call(target, arguments, limit_s=60).answer is True
    other = try_call(target, arguments, limit_s=60, python=Path(sys.executable))
    assert other.answer is False


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    with pytest.raises(PluginError, match=r"python cannot be started: No such file"):
        try_call("os:getpid", {}, limit_s=1, python=python)
