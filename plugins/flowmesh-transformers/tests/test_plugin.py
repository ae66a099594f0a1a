from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

from flowmesh_transformers import plugin

from flowmesh_core import Capability, ExecutorInfo, ExecutorRegistry, InferenceParams

(INFO,) = plugin.flowmesh_register_executors()


def test_the_declaration_survives_the_trip_to_another_process() -> None:
    assert ExecutorInfo.from_dict(INFO.to_dict()) == INFO


def test_the_entry_point_leads_to_the_declaration() -> None:
    (found,) = entry_points(group="flowmesh", name="transformers")
    assert found.load() is plugin


def test_declared_paths_can_be_imported() -> None:
    for path in (INFO.target, INFO.spec, INFO.settings, INFO.result, INFO.example):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_it_answers_prompts_and_embeds_texts_on_cpu_and_gpu() -> None:
    assert INFO.task_types == {"inference", "embedding"}
    assert INFO.needs == ("torch", "transformers")
    promised = {Capability.CPU, Capability.GPU, Capability.SHRINK, Capability.GROUP}
    assert INFO.capabilities == promised


def test_a_group_agrees_on_all_that_shapes_an_answer_but_the_prompt() -> None:
    sampling = {key.partition(".")[2] for key in INFO.group_key if key.startswith("inference.")}
    # The prompt's, two that are refused, and one that it need not heed.
    own = {"system_prompt", "logprobs", "response_format", "stream"}
    assert sampling == {*InferenceParams.model_fields, "max_new_tokens"} - own
    assert {*INFO.engine_key, "normalize"} <= {*INFO.group_key}
    assert "taskType" in INFO.engine_key


def test_an_engine_made_for_gguf_goes_before_it_without_a_gpu() -> None:
    other = ExecutorInfo(name="zzz", task_types={"inference"}, target="a:B", model_formats={"gguf"})
    registry = ExecutorRegistry([with_its_engine(INFO), other])
    gguf = {"model": {"source": {"type": "file", "path": "model.gguf"}}}
    hub = {"model": {"source": {"identifier": "acme/small"}}}
    assert registry.resolve("inference", gguf).name == "zzz"
    assert registry.resolve("inference", hub).name == "transformers"


def with_its_engine(info: ExecutorInfo) -> ExecutorInfo:
    """The declaration where its engine is installed, whatever is installed here."""
    return ExecutorInfo.from_dict({**info.to_dict(), "needs": []})


def test_declaring_checking_and_importing_the_executor_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_transformers.plugin as p, flowmesh_transformers.spec as s\n"
        "p.flowmesh_register_executors()\n"
        "assert 'flowmesh_transformers.executor' not in sys.modules\n"
        "s.TransformersSpec.model_validate({})\n"
        "import flowmesh_transformers.executor\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
