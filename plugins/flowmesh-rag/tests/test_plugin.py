from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from flowmesh_rag import plugin

from flowmesh_core import Capability, ExecutorInfo, ExecutorRegistry

INFOS = {info.name: info for info in plugin.flowmesh_register_executors()}
EACH = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


@EACH
def test_a_declaration_survives_the_trip_to_another_process(info: ExecutorInfo) -> None:
    assert ExecutorInfo.from_dict(info.to_dict()) == info


def test_the_entry_point_leads_to_the_declarations() -> None:
    (found,) = entry_points(group="flowmesh", name="rag")
    assert found.load() is plugin


@EACH
def test_declared_paths_can_be_imported(info: ExecutorInfo) -> None:
    for path in filter(None, (info.target, info.spec, info.settings, info.result, info.example)):
        module, name = path.split(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_each_task_type_has_its_executor() -> None:
    served = {name: info.task_types for name, info in INFOS.items()}
    assert served == {"rag": {"rag"}, "rag.index": {"rag_index"}, "rag.embedding": {"embedding"}}


@EACH
def test_all_run_with_and_without_a_gpu_in_smaller_batches_if_need_be(info: ExecutorInfo) -> None:
    assert {Capability.CPU, Capability.GPU, Capability.SHRINK} <= info.capabilities
    assert not info.needs_gpu
    grouped = info.name != "rag.index"
    assert (Capability.GROUP in info.capabilities) is grouped
    assert bool(info.group_key) is grouped


def test_queries_of_one_group_have_all_but_the_queries_in_common() -> None:
    from flowmesh_rag.spec import RagSpec

    own = {"task_type", "query"}
    assert set(INFOS["rag"].group_key) == set(RagSpec.model_fields) - own
    assert set(INFOS["rag"].engine_key) <= set(INFOS["rag"].group_key)


def test_an_engine_is_shared_whatever_the_collection() -> None:
    for info in INFOS.values():
        assert not {"qdrant", "store", "search", "generate"} & set(info.engine_key)


def test_the_models_of_a_task_are_gathered_by_the_core() -> None:
    assert INFOS["rag"].models == ("embedding.model", "rerank.model")
    assert INFOS["rag.index"].models == ("embedding.model",)
    assert INFOS["rag.embedding"].inputs == {"rows", "model"}
    assert INFOS["rag.index"].inputs == {"rows", "files"}


def test_engines_that_were_there_first_keep_their_embedding_documents() -> None:
    other = ExecutorInfo(
        name="zzz", task_types={"embedding"}, target="a:B", model_formats={"hf"}, priority=-1
    )
    mine = ExecutorInfo.from_dict({**INFOS["rag.embedding"].to_dict(), "needs": []})
    spec = {"model": {"source": {"identifier": "acme/small"}}}
    assert ExecutorRegistry([mine, other]).resolve("embedding", spec).name == "zzz"
    assert ExecutorRegistry([mine]).resolve("embedding", spec).name == "rag.embedding"


@EACH
def test_threads_that_wait_do_not_spin_unless_the_operator_says_so(info: ExecutorInfo) -> None:
    assert "OMP_WAIT_POLICY=PASSIVE" in info.variables
    assert "FLOWMESH_RAG_*" in info.variables


def test_the_three_stores_are_declared_as_any_third_partys_would_be() -> None:
    found = {point.name: point.value for point in entry_points(group="flowmesh.rag.stores")}
    assert found["qdrant"] == "flowmesh_rag.stores.qdrant:QdrantStore"
    assert found["edge"] == "flowmesh_rag.stores.edge:EdgeStore"
    assert found["sqlite"] == "flowmesh_rag.stores.sqlite:SqliteStore"


def test_declaring_and_checking_load_no_engine() -> None:
    code = (
        "import sys, flowmesh_rag.plugin as p, flowmesh_rag.spec as s\n"
        "p.flowmesh_register_executors()\n"
        "s.RagSpec.model_validate({'store': {'type': 'edge', 'collection': 'a'}, 'query': 'b'})\n"
        "import flowmesh_rag.stores.base, flowmesh_rag.embedder\n"
        "engines = {'torch', 'sentence_transformers', 'qdrant_client', 'qdrant_edge', 'numpy'}\n"
        "assert not engines & set(sys.modules), engines & set(sys.modules)\n"
        "assert 'flowmesh_rag.retrieval' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
