"""One suite per broken executor, run by ``test_broken_executors.py``; most of them must fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowmesh_core.importing import import_plugin_file
from flowmesh_core.testing import ExecutorSuite

HERE = Path(__file__).parent
SOUND, EXECUTORS = HERE / "sound.py", HERE / "executors.py"
GIVEN = {
    "long_spec": {"steps": 10**6, "data": {"type": "list", "items": ["a"]}},
    "refused": [{"voice": {"pitsh": 1}}, {"data": {"type": "list", "items": ["bad"]}}],
    "grace_s": 1.0,
}


def define(name: str, files: list[Path], **given: Any) -> None:
    suite = "TestBroken" + name.rpartition(".")[2]
    globals()[suite] = type(
        suite, (ExecutorSuite,), {"executor": name, "plugin_files": files, **given}
    )


import_plugin_file(SOUND)
for case in import_plugin_file(EXECUTORS).CASES:
    given = {"expected": case.clause, **GIVEN, **case.suite}
    define(case.info.name, [SOUND, EXECUTORS], **given)
define("broken.Heavy", [HERE / "heavy.py"], spec={}, expected="light")
define("broken.Bulky", [HERE / "bulky.py"], spec={}, import_budget=10, expected="light")
define("broken.Newer", [HERE / "newer_api.py"], spec={}, expected="installed")
