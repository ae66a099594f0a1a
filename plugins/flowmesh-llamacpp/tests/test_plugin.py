from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from flowmesh_llamacpp import plugin

from flowmesh_core import Capability, ExecutorInfo

INFOS = {info.name: info for info in plugin.flowmesh_register_executors()}
each_executor = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


@each_executor
def test_the_declaration_survives_the_trip_to_another_process(info: ExecutorInfo) -> None:
    assert ExecutorInfo.from_dict(info.to_dict()) == info


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="llamacpp")
    assert found.load() is plugin


@each_executor
def test_declared_paths_can_be_imported(info: ExecutorInfo) -> None:
    for path in filter(None, (info.target, info.spec, info.settings)):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


@each_executor
def test_both_executors_load_gguf_and_keep_the_variables_of_openmp(info: ExecutorInfo) -> None:
    assert info.model_formats == {"gguf"}
    assert info.needs == ("xllamacpp",)
    assert "OMP_WAIT_POLICY" in info.variables
    assert {"model", "adapters", "checkpoint"} <= info.inputs


def test_only_what_was_measured_is_promised() -> None:
    assert INFOS["llamacpp"].capabilities == {Capability.CPU, Capability.CONCURRENT}


def test_a_service_shares_its_process_with_no_other() -> None:
    serve = INFOS["llamacpp.serve"]
    assert serve.task_types == {"serve"}
    assert serve.capabilities == {Capability.CPU, Capability.SERVICE}
    assert {"serve", *INFOS["llamacpp"].engine_key} == set(serve.engine_key)


def test_declaring_checking_and_importing_the_executor_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_llamacpp.plugin as p, flowmesh_llamacpp.spec as s\n"
        "p.flowmesh_register_executors()\n"
        "assert 'flowmesh_llamacpp.executor' not in sys.modules\n"
        "assert 'flowmesh_llamacpp.serve' not in sys.modules\n"
        "s.LlamacppSpec.model_validate({})\n"
        "s.LlamacppServeSpec.model_validate({})\n"
        "import flowmesh_llamacpp.executor, flowmesh_llamacpp.serve\n"
        "assert 'xllamacpp' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
