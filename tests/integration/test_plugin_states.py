"""A real worker among plugins that are wrong in every way: it starts, serves, and says so.

What the orchestrator sees, what the log says, and that no plugin holds the start up.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core.testing import StandInOrchestrator, WorkerProcess

HEAD = """
from flowmesh_core import Executor, ExecutorInfo, hookimpl

def register(name, **fields):
    @hookimpl
    def flowmesh_register_executors():
        return [ExecutorInfo(name=name, task_types=[name], target="acme_engine:Tts", **fields)]
    return flowmesh_register_executors

"""
HOOK = "flowmesh_register_executors = register({})\n"
# Distribution: name of its plugin, its source.
WRONG = {
    "acme-raises": ("acme-raises", "raise RuntimeError('no licence')"),
    "acme-hangs": ("acme-hangs", "import threading\nthreading.Event().wait()\n"),
    "acme-next": ("acme-next", HOOK.format("'acme.next', api_version='2.0'")),
    "acme-needs": ("acme-needs", "import acme_gone"),
    "acme-one": ("acme-twice", HOOK.format("'acme.one'")),
    "acme-two": ("acme-twice", HOOK.format("'acme.two'")),
    "acme-blocked": ("acme-blocked", "raise AssertionError('imported')"),
    "acme-well": ("acme-well", HOOK.format("'acme.well'")),
}
STATES = {
    "acme-raises": "broken",
    "acme-hangs": "slow",
    "acme-next": "broken",
    "acme-needs": "missing",
    "acme-one": "conflict",
    "acme-two": "conflict",
    "acme-blocked": "disabled",
    "acme-well": "loaded",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with every one of them installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "acme_engine.py").write_text(
        HEAD + "class Tts(Executor):\n    def run(self, ctx):\n        return {'spoken': True}\n"
    )
    for distribution, (point, source) in WRONG.items():
        module = f"{distribution.replace('-', '_')}_plugin"
        (folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source))
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        )
        (info / "entry_points.txt").write_text(f"[flowmesh]\n{point} = {module}\n")
    return folder


@pytest.fixture
def worker(
    flowmesh_orchestrator: StandInOrchestrator, flowmesh_redis_url: str, site: Path, tmp_path: Path
) -> Iterator[WorkerProcess]:
    names = ",".join(sorted({point for point, _ in WRONG.values()} | {"echo"}))
    with WorkerProcess(
        flowmesh_redis_url,
        tmp_path / "results",
        environ={
            "PYTHONPATH": str(site),
            "FLOWMESH_ENVS": str(tmp_path / "envs"),
            "FLOWMESH_ONLY_PLUGINS": names,
            "FLOWMESH_PLUGIN_TIMEOUT_S": "1",
            "FLOWMESH_STRICT_PLUGINS": "0",
            "FLOWMESH_TRACE_HOOKS": "1",
            "LOG_LEVEL": "WARNING",
        },
        arguments=("--no-plugin", "acme-blocked"),
    ) as process:
        flowmesh_orchestrator.wait_workers(1, timeout_s=30)
        yield process


def registration(host: StandInOrchestrator) -> dict[str, Any]:
    def find() -> list[dict[str, Any]]:
        return [event["payload"] for event in host.events if event.get("type") == "REGISTER"]

    return host.wait_for(find)[0]


def test_the_worker_serves_and_registers_what_became_of_every_plugin(
    flowmesh_orchestrator: StandInOrchestrator, worker: WorkerProcess, site: Path
) -> None:
    host = flowmesh_orchestrator
    task = host.submit({"spec": {"taskType": "acme.well"}})
    assert host.wait_task(task, timeout_s=30).status == "DONE", worker.stderr

    payload = registration(host)
    rows = {row["distribution"]: row for row in payload["plugins"]}
    assert {name: rows[name]["state"] for name in WRONG} == STATES
    assert sorted(info["name"] for info in payload["executors"]) == ["acme.well", "echo"]
    assert rows["acme-raises"] == {
        "name": "acme-raises",
        "distribution": "acme-raises",
        "version": "1.2",
        "entry_point": "acme_raises_plugin",
        "environment": "",
        "state": "broken",
        "reason": "RuntimeError: no licence",
        "hint": "run: flowmesh plugins doctor acme-raises",
    }
    assert f"{site / 'acme_hangs_plugin.py'}" in rows["acme-hangs"]["reason"]
    assert (
        "acme-next 1.2 wrote executor 'acme.next' for executor API 2.0"
        in (rows["acme-next"]["reason"])
    )
    assert "claimed by acme-one, acme-two" in rows["acme-one"]["reason"]

    errors = [line for line in worker.stderr.splitlines() if " ERROR " in line]
    for name, state in STATES.items():
        told = [line for line in errors if f"({name} 1.2, entry point " in line]
        assert len(told) == (state not in ("loaded", "disabled")), name
        assert all(f" is {state}: " in line for line in told)
    trace = [
        line for line in worker.stderr.splitlines() if " INFO flowmesh_core.hook_trace " in line
    ]
    assert any("plugin acme-well: ['acme.well'] in " in line for line in trace)
    assert worker.stop() == 0, "a plugin that hangs does not keep the worker from its end"
