from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

from flowmesh_llamacpp import plugin

from flowmesh_core import Capability


def test_the_declaration_survives_the_trip_to_another_process() -> None:
    (info,) = plugin.flowmesh_register_executors()
    assert type(info).from_dict(info.to_dict()) == info


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="llamacpp")
    assert found.load() is plugin


def test_declared_paths_can_be_imported() -> None:
    (info,) = plugin.flowmesh_register_executors()
    for path in (info.target, info.spec):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_only_what_was_measured_is_promised() -> None:
    (info,) = plugin.flowmesh_register_executors()
    assert info.capabilities == {Capability.CPU, Capability.CONCURRENT}
    assert info.model_formats == {"gguf"}
    assert "OMP_WAIT_POLICY" in info.variables


def test_declaring_checking_and_importing_the_executor_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_llamacpp.plugin as p, flowmesh_llamacpp.spec as s\n"
        "p.flowmesh_register_executors()\n"
        "assert 'flowmesh_llamacpp.executor' not in sys.modules\n"
        "s.LlamacppSpec.model_validate({})\n"
        "import flowmesh_llamacpp.executor\n"
        "assert 'xllamacpp' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
