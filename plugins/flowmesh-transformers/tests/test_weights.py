from __future__ import annotations

import json
from pathlib import Path

import pytest
from flowmesh_transformers.weights import Origin, find_weights

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


def write_adapter(folder: Path, kind: str = "LORA") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    return folder


def test_a_folder_a_hub_id_and_a_gguf_file_are_each_named_as_the_library_wants(
    model: ModelRef, tmp_path: Path
) -> None:
    assert find_weights(Inputs(model=model)).model == Origin(name=str(model.path))
    hub = ModelRef(identifier="acme/big", hub_id="acme/big", revision="v2")
    assert find_weights(Inputs(model=hub)).model.arguments() == {"revision": "v2"}
    file = tmp_path / "q4.gguf"
    file.touch()
    found = find_weights(Inputs(model=ModelRef(identifier="x", path=file, format="gguf")))
    assert found.model == found.tokenizer == Origin(name=str(tmp_path), gguf_file="q4.gguf")


def test_a_checkpoint_replaces_the_model_and_brings_its_tokenizer_if_it_has_one(
    model: ModelRef, tmp_path: Path
) -> None:
    whole = write_model(tmp_path / "whole")
    bare = write_model(tmp_path / "bare", tokenizer=False)
    found = find_weights(Inputs(model=model, checkpoint=whole))
    assert {found.model.name, found.tokenizer.name} == {str(whole)}
    found = find_weights(Inputs(model=model, checkpoint=bare))
    assert (found.model.name, found.tokenizer.name) == (str(bare), str(model.path))


def test_a_checkpoint_that_is_an_adapter_goes_on_top_of_the_model_before_others(
    model: ModelRef, tmp_path: Path
) -> None:
    tuned, other = write_adapter(tmp_path / "tuned"), write_adapter(tmp_path / "other")
    adapters = (AdapterRef(name="other", path=other, scale=0.5),)
    found = find_weights(Inputs(model=model, checkpoint=tuned, adapters=adapters))
    assert found.model.name == str(model.path)
    assert [adapter.path for adapter in found.adapters] == [tuned, other]
    assert [adapter.scale for adapter in found.adapters] == [1.0, 0.5]


def test_a_checkpoint_that_is_neither_is_an_error_and_not_the_base_model(
    model: ModelRef, tmp_path: Path
) -> None:
    (tmp_path / "final_model.pt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("final_model.pt", "empty"):
        with pytest.raises(InputError, match=rf"checkpoint\.load: .*{name} must be a folder"):
            find_weights(Inputs(model=model, checkpoint=tmp_path / name))


def test_a_model_that_is_not_here_is_an_error() -> None:
    with pytest.raises(InputError, match=r"model\.source must name a model"):
        find_weights(Inputs())
    with pytest.raises(InputError, match=r"model\.source: mine is not on this machine"):
        find_weights(Inputs(model=ModelRef(identifier="mine")))


def test_adapters_that_are_no_lora_folders_are_refused_by_name(
    model: ModelRef, tmp_path: Path
) -> None:
    (tmp_path / "lora.gguf").touch()
    prefix = write_adapter(tmp_path / "prefix", "PREFIX_TUNING")
    broken = write_adapter(tmp_path / "broken")
    (broken / "adapter_config.json").write_text("[")
    listed = write_adapter(tmp_path / "listed")
    (listed / "adapter_config.json").write_text("[]")
    for path, message in (
        (tmp_path / "lora.gguf", "adapter mine: .* must be a folder with adapter_config.json"),
        (prefix, "adapter mine: peft_type must be LORA, got 'PREFIX_TUNING'"),
        (broken, "adapter_config.json must be a JSON file"),
        (listed, "must hold a JSON object, got list"),
    ):
        with pytest.raises(InputError, match=message):
            find_weights(Inputs(model=model, adapters=(AdapterRef(name="mine", path=path),)))
