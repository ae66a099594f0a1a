from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flowmesh_vllm.weights import Weights, find_runtime_adapter, find_weights

from flowmesh_core import AdapterRef, InputError, Inputs, ModelRef


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    return ModelRef(identifier="acme/small", path=write_model(tmp_path / "model"), format="hf")


def write_model(folder: Path, *, tokenizer: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def write_adapter(folder: Path, config: Any = None) -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    text = config if isinstance(config, str) else json.dumps(config or {"peft_type": "LORA"})
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_a_folder_and_a_hub_id_are_named_as_the_engine_wants(model: ModelRef) -> None:
    assert find_weights(Inputs(model=model)) == Weights(model=str(model.path))
    hub = ModelRef(identifier="acme/big", hub_id="acme/big", revision="v2")
    assert find_weights(Inputs(model=hub)) == Weights(model="acme/big", revision="v2")


def test_a_checkpoint_replaces_the_model_and_takes_its_tokenizer_when_it_has_none(
    model: ModelRef, tmp_path: Path
) -> None:
    whole = write_model(tmp_path / "whole")
    bare = write_model(tmp_path / "bare", tokenizer=False)
    hub = ModelRef(identifier="acme/big", hub_id="acme/big", revision="v2")
    assert find_weights(Inputs(model=model, checkpoint=whole)) == Weights(model=str(whole))
    assert find_weights(Inputs(checkpoint=whole)) == Weights(model=str(whole))
    found = find_weights(Inputs(model=model, checkpoint=bare))
    assert found == Weights(model=str(bare), tokenizer=str(model.path))
    found = find_weights(Inputs(model=hub, checkpoint=bare))
    assert found == Weights(model=str(bare), tokenizer="acme/big", revision="v2")


def test_a_checkpoint_that_is_an_adapter_is_merged_first(model: ModelRef, tmp_path: Path) -> None:
    tuned = write_adapter(tmp_path / "tuned")
    (tuned / "tokenizer.json").touch()  # trainers leave one there
    other = AdapterRef(name="b", path=write_adapter(tmp_path / "b"), scale=0.5, apply="merge")
    runtime = AdapterRef(name="c", path=write_adapter(tmp_path / "c"))
    inputs = Inputs(model=model, checkpoint=tuned, adapters=(runtime, other))
    first = AdapterRef(name="checkpoint.load", path=tuned, apply="merge")
    assert find_weights(inputs) == Weights(model=str(model.path), merged=(first, other))
    assert find_runtime_adapter(inputs) == runtime
    assert find_runtime_adapter(Inputs(model=model, adapters=(other,))) is None


def test_several_adapters_at_run_time_are_refused(model: ModelRef, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora")
    adapters = [AdapterRef(name=name, path=path) for name in "ab"]
    merged = AdapterRef(name="m", path=path, apply="merge")
    message = "adapters a, b: vLLM applies one adapter to a request; give apply: merge to all but"
    with pytest.raises(InputError, match=message):
        find_runtime_adapter(Inputs(model=model, adapters=(*adapters, merged)))


@pytest.mark.parametrize("name", ["small.gguf", "folder"])
def test_gguf_files_are_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/small.gguf").touch()
    (tmp_path / "small.gguf").touch()
    found = ModelRef(identifier="x", path=tmp_path / name, format="gguf")
    message = rf"model\.source: .*{name} is in the GGUF format, .* flowmesh-llamacpp"
    with pytest.raises(InputError, match=message):
        find_weights(Inputs(model=found))
    with pytest.raises(InputError, match=r"checkpoint\.load: .* is in the GGUF format"):
        find_weights(Inputs(checkpoint=tmp_path / name))


def test_a_folder_of_a_model_that_also_holds_gguf_files_is_a_model(model: ModelRef) -> None:
    assert model.path
    (model.path / "q4.gguf").touch()
    assert find_weights(Inputs(model=model)).model == str(model.path)


def test_a_checkpoint_that_is_nothing_known_is_an_error_and_not_the_base_model(
    model: ModelRef, tmp_path: Path
) -> None:
    (tmp_path / "final_model.pt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("final_model.pt", "empty"):
        with pytest.raises(InputError, match=rf"checkpoint\.load: .*{name} must be a folder"):
            find_weights(Inputs(model=model, checkpoint=tmp_path / name))


def test_a_model_that_is_not_here_is_an_error(tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", tokenizer=False)
    for checkpoint in (None, bare):
        with pytest.raises(InputError, match=r"model\.source must name a model"):
            find_weights(Inputs(checkpoint=checkpoint))
    with pytest.raises(InputError, match=r"model\.source: mine is not on this machine"):
        find_weights(Inputs(model=ModelRef(identifier="mine")))
    with pytest.raises(InputError, match=r"model\.source: .* must be a folder with config\.json"):
        find_weights(Inputs(model=ModelRef(identifier="mine", path=tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type must be LORA, got 'PREFIX_TUNING'"),
        ({"r": 8}, "peft_type must be LORA, got None"),
        ("[", r"adapter_config\.json must be a JSON file"),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_adapters_that_are_no_lora_are_refused_by_name(
    model: ModelRef, tmp_path: Path, config: Any, message: str
) -> None:
    path = write_adapter(tmp_path / "mine", config)
    inputs = Inputs(model=model, adapters=(AdapterRef(name="mine", path=path),))
    with pytest.raises(InputError, match=f"adapter mine: .*{message}"):
        find_runtime_adapter(inputs)
    # Who loads the engine must not spoil it for those who come with another adapter.
    assert find_weights(inputs) == Weights(model=str(model.path))
    merged = AdapterRef(name="mine", path=path, apply="merge")
    with pytest.raises(InputError, match=f"adapter mine: .*{message}"):
        find_weights(Inputs(model=model, adapters=(merged,)))


def test_everything_at_fault_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "lora.gguf").touch()
    bare = write_adapter(tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    adapters = [
        AdapterRef(name="one", path=tmp_path / "lora.gguf", apply="merge"),
        AdapterRef(name="two", path=bare, apply="merge"),
    ]
    with pytest.raises(InputError, match=r"adapter one: .*adapter two: .*model\.source") as caught:
        find_weights(Inputs(adapters=tuple(adapters)))
    assert "lora.gguf must be a folder with adapter_config.json" in str(caught.value)
    assert "must hold adapter_model.safetensors or adapter_model.bin" in str(caught.value)
