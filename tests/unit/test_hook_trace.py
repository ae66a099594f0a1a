from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh_core.config import Settings, load_settings
from flowmesh_core.plugins import Plugins, load_plugins

SOURCE = """
from flowmesh_core import ExecutorInfo, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="acme.a", task_types=["a"], target="m:C"),
            ExecutorInfo(name="acme.b", task_types=["a"], target="m:C")]

@hookimpl
def flowmesh_after_task(task_id):
    raise ValueError(f"no {task_id}")

@hookimpl
def flowmesh_heartbeat_fields():
    return {"acme": 1, "api_key": "hunter2"}

@hookimpl
def flowmesh_choose_executor(candidates):
    return candidates[-1].name
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "acme.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("flowmesh_plugin_acme", None)


def load(file: Path, *, trace: bool) -> Plugins:
    return load_plugins(Settings(only_plugins=("acme",), trace_hooks=trace), files=[file])


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was traced, each without its time."""
    lines = [r.getMessage() for r in caplog.records if r.name == "flowmesh_core.hook_trace"]
    assert all(line.endswith(" ms") for line in lines), lines
    return [line.rpartition(" in ")[0] for line in lines]


def test_every_call_of_a_hook_is_told_with_plugin_answer_and_time(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)  # LOG_LEVEL holds it not back
    plugins = load(file, trace=True)
    plugins.observe("flowmesh_after_task", task_id="t1", task_type="a", outcome=None, runtime_s=0)
    assert plugins.heartbeat_fields() == {"acme": 1, "api_key": "hunter2"}
    registry = plugins.build_registry(Settings(), gpu_count=0)
    assert registry.resolve("a", {}).name == "acme.b"
    assert told(caplog) == [
        "hook flowmesh_register_executors: plugin acme: ['acme.a', 'acme.b']",
        "hook flowmesh_after_task: plugin acme: ValueError: no t1",
        "hook flowmesh_heartbeat_fields: plugin acme: {'acme': 1, 'api_key': '***'}",
        "hook flowmesh_choose_executor: plugin acme: 'acme.b'",
    ]


def test_nothing_is_told_unless_it_is_asked_for(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    load(file, trace=False).heartbeat_fields()
    assert told(caplog) == []


def test_a_long_answer_is_cut(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(SOURCE.replace('"hunter2"', '"x"').replace('"acme": 1', '"acme": "y" * 9999'))
    load(file, trace=True).heartbeat_fields()
    assert len(told(caplog)[-1]) < 400


def test_the_variable_asks_for_it() -> None:
    assert load_settings({"FLOWMESH_TRACE_HOOKS": "1"}).trace_hooks
    assert not load_settings({}).trace_hooks
