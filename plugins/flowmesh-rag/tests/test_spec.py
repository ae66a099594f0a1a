from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.blocks import SentenceOptions, StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.spec import IndexSpec, RagSpec, VectorSpec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from flowmesh_core import ConfigError, ContractError
from flowmesh_core.config import load_plugin_settings
from flowmesh_core.validation import validate_model

QDRANT = {"url": "http://qdrant:6333", "collection": "docs"}
RAG = {"taskType": "rag", "qdrant": QDRANT, "query": "What is a fabric?"}
INDEX = {
    "taskType": "rag_index",
    "store": {"type": "edge", "collection": "docs"},
    "files": {"paths": ["docs"]},
}
MODELS: dict[str, type[RagSpec] | type[IndexSpec]] = {"rag": RagSpec, "rag_index": IndexSpec}


def parse(base: dict[str, Any], changes: dict[str, Any]) -> Any:
    return validate_model(
        MODELS[base["taskType"]], {**base, **changes}, where="task 1", prefix="spec"
    )


def test_a_document_of_the_contract_is_taken_with_its_defaults() -> None:
    spec = parse(RAG, {"embedding": None, "search": None, "data": None})
    assert spec.target == StoreBlock(
        type="qdrant", url="http://qdrant:6333", collection="docs", timeout_s=60
    )
    assert (spec.query, spec.search.top_k) == (["What is a fabric?"], 5)
    assert spec.embedding.model is None
    assert (spec.search.mode, spec.rerank, spec.generate) == ("dense", None, None)


def test_qdrant_is_short_for_a_store_of_that_type() -> None:
    block = {**QDRANT, "api_key": "k3y", "timeout_s": 5}
    short = parse(RAG, {"qdrant": block}).target
    assert short == parse(RAG, {"qdrant": None, "store": {"type": "qdrant", **block}}).target
    assert short.api_key.get_secret_value() == "k3y"


@pytest.mark.parametrize(
    ("model", "identifier"),
    [
        ("acme/small", "acme/small"),
        ({"source": {"identifier": "acme/small"}}, "acme/small"),
        ({"source": {"type": "package", "package": "weights", "file": "model"}}, None),
    ],
)
def test_a_model_may_be_a_name_or_a_block(model: Any, identifier: str | None) -> None:
    assert parse(RAG, {"embedding": {"model": model}}).embedding.model.source.identifier == (
        identifier
    )


def test_queries_may_be_rows_one_text_or_several() -> None:
    assert parse(RAG, {"query": ["a", "b"]}).query == ["a", "b"]
    data = {"type": "list", "items": ["a"]}
    assert parse(RAG, {"query": None, "data": data}).has_data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qdrant": None}, "spec: one of qdrant, store is required"),
        ({"store": {"type": "edge", "collection": "a"}}, "spec: one of qdrant, store is required"),
        ({"query": None}, "spec: one of data, query is required"),
        ({"query": 3}, "spec.query must be a list, got 3"),
        ({"query": ["a", " "]}, r"spec.query\[1\] must not be blank"),
        ({"qdrant": {"url": "http://q"}}, "spec.qdrant.collection is required"),
        ({"qdrant": {"collection": "a"}}, "spec.qdrant.url is required"),
        ({"qdrant": {**QDRANT, "grpc": True}}, "spec.qdrant: unknown key 'grpc'"),
        ({"qdrant": {**QDRANT, "timeout_s": 0}}, "spec.qdrant.timeout_s"),
        ({"embedding": {"model": ""}}, "spec.embedding.model must not be blank"),
        ({"embedding": {"model": {}}}, "spec.embedding.model must be a hub id, a folder"),
        ({"embedding": {"batchsize": 1}}, "unknown key 'batchsize', did you mean 'batch_size'"),
        ({"embedding": {"remote_model": "m"}}, "remote_model has no meaning without endpoint"),
        ({"embedding": {"endpoint": "http://e"}}, "remote_model is required with endpoint"),
        ({"embedding": {"server": True}}, "remote_model is required with endpoint or server"),
        (
            {"embedding": {"server": True, "remote_model": "m", "model": "acme/small"}},
            "spec.embedding: model is for this worker; name the remote one in remote_model",
        ),
        (
            {"embedding": {"server": True, "remote_model": "m", "endpoint": "http://e"}},
            "server excludes endpoint and api_key",
        ),
        ({"search": {"top_k": True, "mode": "both"}}, "spec.search.mode must be 'dense'"),
        ({"search": {"with_payload": 3}}, "spec.search.with_payload must be true, false or a list"),
        ({"search": {"score_threshold": float("nan")}}, "spec.search.score_threshold"),
        ({"rerank": {}}, "spec.rerank: one of model, endpoint is required"),
        (
            {"rerank": {"model": "a/b", "endpoint": "http://e"}},
            "spec.rerank: one of model, endpoint is required",
        ),
        ({"generate": {}}, "spec.generate: one of task, endpoint is required"),
        ({"generate": {"endpoint": "http://e"}}, "spec.generate: remote_model is required"),
        (
            {"generate": {"task": {"taskType": "rag"}}},
            "spec.generate.task.taskType must be 'inference' or 'vllm', got 'rag'",
        ),
        ({"generate": {"task": {"data": {}}}}, "spec.generate.task: unknown key 'data'"),
        (
            {"generate": {"task": {}, "inference": {"n": 2}}},
            "spec.generate: generate.inference cannot honour n",
        ),
    ],
)
def test_what_a_search_cannot_be_is_refused_by_name(changes: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse(RAG, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": None}, "spec: one of files, data is required"),
        ({"files": {}}, "spec.files: one of paths, urls is required"),
        ({"embedding": {"server": True, "remote_model": "m"}}, "embedding.server is for searching"),
        ({"prune": True, "mode": "add"}, "prune needs mode sync"),
        ({"chunk": {"size": 15, "overlap": 0}}, "chunk.size must be greater than or equal to 16"),
        ({"chunk": {"size": 100, "overlap": 100}}, "overlap must be below size .100., got 100"),
        ({"chunk": {"unit": "words"}}, "spec.chunk.unit must be 'chars' or 'tokens', got 'words'"),
        ({"language": "../x"}, "spec.language"),
    ],
)
def test_what_an_index_cannot_be_is_refused_by_name(changes: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse(INDEX, changes)


def test_documents_may_be_rows_without_any_file() -> None:
    data = {"type": "list", "items": [{"text": "a"}]}
    spec = parse(INDEX, {"files": None, "data": data, "chunk": None})
    assert spec.has_data
    assert (spec.chunk.size, spec.chunk.overlap, spec.mode) == (800, 100, "sync")


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"type": "qdrant"}, "url is required when type is qdrant"),
        ({"type": "edge", "url": "http://q"}, "url has no meaning when type is edge"),
        ({"type": "sqlite", "api_key": "k"}, "api_key has no meaning when type is sqlite"),
        ({"type": "edge", "options": {"path": "/etc"}}, "options has no meaning when type is edge"),
        ({"type": "os:system"}, "spec.store.type"),
        ({"type": ""}, "spec.store.type"),
    ],
)
def test_a_store_takes_only_what_its_type_knows(store: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse(INDEX, {"store": {"collection": "docs", **store}})


def test_a_third_partys_store_gets_options_of_its_own() -> None:
    store = {"type": "acme.lance", "collection": "docs", "options": {"lists": 8}}
    assert parse(INDEX, {"store": store}).target.options == {"lists": 8}


def test_only_a_store_with_a_server_can_embed_by_it() -> None:
    embedding = {"server": True, "remote_model": "m"}
    assert parse(RAG, {"embedding": embedding}).embedding.server
    store = {"type": "edge", "collection": "a"}
    with pytest.raises(ContractError, match=r"embedding\.server needs a store with a server"):
        parse(RAG, {"qdrant": None, "store": store, "embedding": embedding})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("qdrant:6333", "must be an http:// or https:// URL"),
        ("file:///etc/passwd", "must be an http:// or https:// URL"),
        ("http://", "must be an http:// or https:// URL"),
        ("http://user:s3cret@q", "put the key into api_key"),
        ("https://q/?key=s3cret", "without [?] and #"),
        ("https://q/#s3cret", "without [?] and #"),
        ("http://q\n.example", "must be an http:// or https:// URL"),
        ("http://q:0", "must be an http:// or https:// URL"),
        ("http://user:s3cret/@q", "must be an http:// or https:// URL"),
        ("http://[s3cret", "must be an http:// or https:// URL"),
        ("http://s3cret\u2100q", "must be an http:// or https:// URL"),
    ],
)
def test_an_address_that_is_none_is_refused_and_its_secrets_are_not_shown(
    url: str, message: str
) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        parse(RAG, {"qdrant": {**QDRANT, "url": url}})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("${QDRANT_API_KEY}", r"must be spelled \$\{env.QDRANT_API_KEY\} to mean"),
        ("s3cret\r\nX-Evil: 1", "must be visible ASCII"),
        ("", "must be visible ASCII"),
        ("gehéim-s3cret", "must be visible ASCII"),
        (5303107, "must be a string; put it into quotes"),
        (["s3cret"], "must be a string; put it into quotes"),
    ],
)
@pytest.mark.parametrize("block", ["qdrant", "embedding", "rerank", "generate"])
def test_a_key_that_is_none_is_refused_and_never_shown(block: str, key: Any, message: str) -> None:
    remote = {"endpoint": "http://e", "remote_model": "m"}
    blocks: dict[str, Any] = {"qdrant": QDRANT, "generate": remote, "rerank": remote}
    with pytest.raises(ContractError, match=f"spec.{block}.api_key {message}") as caught:
        parse(RAG, {block: {**blocks.get(block, remote), "api_key": key}})
    assert "s3cret" not in str(caught.value)
    assert "5303107" not in str(caught.value)


def test_a_key_that_waits_for_the_workers_variable_passes_and_no_key_is_shown() -> None:
    spec = parse(RAG, {"qdrant": {**QDRANT, "api_key": "${env.QDRANT_API_KEY}"}})
    assert spec.target.api_key.get_secret_value() == "${env.QDRANT_API_KEY}"
    assert "QDRANT_API_KEY" not in repr(spec)
    assert "QDRANT_API_KEY" not in spec.model_dump_json()


@pytest.mark.parametrize("name", ["docs", "my docs-1.2", "文書", "a" * 200])
def test_a_collection_has_a_plain_name(name: str) -> None:
    assert StoreBlock(type="edge", collection=name).collection == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", " x", "a/b", "a\\b", "a?b", "a#b", "a%2Fb", "a\n", "é" * 101]
)
def test_a_collection_is_never_a_path_or_part_of_a_url(name: str) -> None:
    with pytest.raises(ValidationError, match="must be a name of at most 200 bytes"):
        StoreBlock(type="edge", collection=name)


@given(st.text(max_size=40))
def test_whatever_name_passes_stays_one_step_below_its_folder(name: str) -> None:
    try:
        StoreBlock(type="edge", collection=name)
    except ValidationError:
        return
    path = Path("/stores") / name
    assert path.parent == Path("/stores")
    assert path.name == name
    assert not name.startswith(".")


@given(
    st.sampled_from(
        [
            ("search", "top_k", 1, 1000),
            ("search", "candidates", 1, 1000),
            ("search", "rrf_k", 1, 10_000),
            ("embedding", "batch_size", 1, 4096),
            ("rerank", "candidates", 1, 1000),
            ("generate", "concurrency", 1, 64),
        ]
    ),
    st.integers(-3, 20_000),
)
def test_a_number_passes_exactly_within_its_bounds(bounds: Any, value: int) -> None:
    block, field, least, most = bounds
    required: dict[str, Any] = {"rerank": {"model": "a/b"}, "generate": {"task": {}}}
    changes = {block: {**required.get(block, {}), field: value}}
    if least <= value <= most:
        assert getattr(getattr(parse(RAG, changes), block), field) == value
    else:
        with pytest.raises(ContractError, match=rf"spec\.{block}\.{field} must be .*got {value}"):
            parse(RAG, changes)


@given(st.integers(16, 3000), st.integers(0, 3000))
def test_neighbours_share_less_than_a_whole_chunk(size: int, overlap: int) -> None:
    chunk = {"size": size, "overlap": overlap}
    if overlap < size:
        assert parse(INDEX, {"chunk": chunk}).chunk.overlap == overlap
    else:
        with pytest.raises(ContractError, match=r"spec\.chunk: overlap must be below size"):
            parse(INDEX, {"chunk": chunk})


def test_an_embedding_document_takes_the_librarys_block_and_ignores_others() -> None:
    spec = VectorSpec.model_validate(
        {"model": {"sentence_transformers": {"batch_size": 8}, "vllm": {"dtype": "auto"}}}
    )
    assert spec.model.sentence_transformers == SentenceOptions(batch_size=8)
    assert spec.normalize
    nothing = VectorSpec.model_validate({"model": {"sentence_transformers": None}})
    assert nothing.model.sentence_transformers == SentenceOptions()
    assert VectorSpec.model_validate({"model": None}).model == nothing.model
    with pytest.raises(ValidationError, match="unknown key 'batch', did you mean 'batch_size'"):
        VectorSpec.model_validate({"model": {"sentence_transformers": {"batch": 8}}})


@pytest.mark.parametrize("model", [RagSpec, IndexSpec, VectorSpec])
def test_a_spec_has_a_json_schema(model: type[BaseModel]) -> None:
    assert json.loads(json.dumps(model.model_json_schema()))["type"] == "object"


def test_the_schema_offers_both_spellings_of_a_query_and_of_a_model() -> None:
    schema = RagSpec.model_json_schema()
    assert [each["type"] for each in schema["properties"]["query"]["anyOf"]] == ["string", "array"]
    model = schema["$defs"]["RagEmbedding"]["properties"]["model"]["anyOf"]
    assert {"type": "string"} in model
    assert {"$ref": "#/$defs/TextModel"} in model


def read_settings(**environ: str) -> RagSettings:
    return load_plugin_settings(RagSettings, plugin="rag.index", environ=environ)


def test_operators_set_the_same_variables_for_every_executor(tmp_path: Path) -> None:
    found = read_settings(
        FLOWMESH_RAG_DIR=str(tmp_path),
        FLOWMESH_HTTP_ALLOW="qdrant, *.example.org",
        FLOWMESH_TRUST_REMOTE_CODE="1",
        FLOWMESH_RAG_THREADS="2",
        FLOWMESH_RAG_MAX_PAGES="7",
    )
    assert (found.folder, found.threads, found.max_pages) == (tmp_path, 2, 7)
    assert found.trust_remote_code
    assert found.policy.allow == ("qdrant", "*.example.org")


def test_settings_have_safe_defaults_and_an_absolute_folder() -> None:
    found = read_settings()
    assert found.folder.is_absolute()
    assert not found.trust_remote_code
    assert (found.max_file_bytes, found.max_chunks) == (64 * 2**20, 200_000)
    with pytest.raises(ConfigError, match=r"FLOWMESH_RAG_DIR must be an absolute path, got 'a/b'"):
        read_settings(FLOWMESH_RAG_DIR="a/b")
