from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from flowmesh_sim import plugin

from flowmesh_core import Capability, ExecutorInfo, ExecutorRegistry

INFOS = {info.name: info for info in plugin.flowmesh_register_executors()}
each_executor = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


@each_executor
def test_the_declaration_survives_the_trip_to_another_process(info: ExecutorInfo) -> None:
    assert ExecutorInfo.from_dict(info.to_dict()) == info


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="sim")
    assert found.load() is plugin


@each_executor
def test_declared_paths_can_be_imported(info: ExecutorInfo) -> None:
    for path in (info.target, info.spec, info.result, info.example):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


@each_executor
def test_a_crash_on_demand_is_never_the_workers(info: ExecutorInfo) -> None:
    assert info.places == ("process",)


def test_only_one_shares_its_process_and_only_when_it_is_named() -> None:
    assert INFOS["sim"].capabilities == {Capability.CPU}
    assert INFOS["sim.shared"].capabilities == {Capability.CPU, Capability.CONCURRENT}
    registry = ExecutorRegistry([INFOS["sim.shared"], INFOS["sim"]])
    assert registry.resolve("simulate", {}).name == "sim"
    assert registry.resolve("simulate", {}, executor="sim.shared").name == "sim.shared"


def test_declaring_loads_neither_the_executor_nor_the_spec() -> None:
    code = (
        "import sys, flowmesh_sim.plugin as p\n"
        "p.flowmesh_register_executors()\n"
        "assert 'pydantic' not in sys.modules\n"
        "assert 'flowmesh_sim.executor' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
