from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, requires

import pytest
from flowmesh_trl import examples, plugin
from flowmesh_trl.spec import SPECS

from flowmesh_core import Capability, ExecutorInfo

INFOS = plugin.flowmesh_register_executors()
BY_TYPE = {task_type: info for info in INFOS for task_type in info.task_types}


def test_each_task_type_has_an_executor_of_its_own() -> None:
    assert {info.name for info in INFOS} == {f"trl.{task_type}" for task_type in SPECS}
    assert BY_TYPE.keys() == SPECS.keys()
    assert len(INFOS) == len(SPECS)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_the_declaration_survives_the_trip_to_another_process(info: ExecutorInfo) -> None:
    assert ExecutorInfo.from_dict(info.to_dict()) == info


@pytest.mark.parametrize("task_type", SPECS)
def test_the_declared_spec_is_that_of_the_type(task_type: str) -> None:
    module, name = BY_TYPE[task_type].spec.split(":")
    assert getattr(__import__(module, fromlist=[name]), name) is SPECS[task_type]


@pytest.mark.parametrize("task_type", SPECS)
def test_the_declared_example_is_of_the_type(task_type: str) -> None:
    assert BY_TYPE[task_type].example == f"flowmesh_trl.examples:{task_type}"
    assert hasattr(examples, task_type)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_it_trains_on_cpu_and_gpu_in_a_process_of_its_own(info: ExecutorInfo) -> None:
    assert info.capabilities == {Capability.CPU, Capability.GPU, Capability.SHRINK}
    assert info.places == ("process",)
    assert info.inputs == {"rows", "eval_rows", "model", "checkpoint"}
    assert not info.engine_key
    assert not info.default_model


def test_a_reward_model_is_gathered_where_answers_are_scored() -> None:
    models = {task_type: info.models for task_type, info in BY_TYPE.items() if info.models}
    assert models == {"ppo": ("reward_model",), "grpo": ("reward_model",)}
    for task_type, info in BY_TYPE.items():
        assert bool(info.models) == ("reward_model" in SPECS[task_type].reads)


def test_only_ppo_needs_what_left_trl() -> None:
    needing = [name for name, info in BY_TYPE.items() if "trl.experimental.ppo" in info.needs]
    assert needing == ["ppo"]
    assert BY_TYPE["ppo"].install == f"{BY_TYPE['sft'].install} 'trl<1.13'"


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="trl")
    assert found.load() is plugin


def test_the_install_command_installs_all_that_is_needed() -> None:
    extra = [line for line in requires("flowmesh-trl") or [] if "extra == 'engine'" in line]
    names = {line.partition(">")[0] for line in extra}
    assert names >= {need.partition(".")[0] for info in INFOS for need in info.needs}


def test_declaring_and_checking_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_trl.plugin as p\n"
        "p.flowmesh_register_executors()\n"
        "assert 'flowmesh_trl.executor' not in sys.modules\n"
        "assert 'pydantic' not in sys.modules\n"
        "import flowmesh_trl.spec as s\n"
        "s.SftSpec.model_validate({'data': {'prompts': ['a']}, 'training': {'weight_decay': 0}})\n"
        "engine = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'}\n"
        "assert not engine & set(sys.modules), engine & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
