"""Adapters merged by a real process, compared with what peft answers without merging."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flowmesh_vllm.merging import _describe_end, merged
from flowmesh_vllm.weights import Weights

from flowmesh_core import AdapterRef, ExecutionError, ExecutorUnavailableError, InputError

Lora = Callable[..., AdapterRef]
TOKENS = [[7, 8, 9, 40, 11, 300]]


def test_with_nothing_to_merge_the_weights_stay_as_they_are(tmp_path: Path) -> None:
    weights = Weights(model="acme/small", revision="v2")
    with merged(weights, tmp_path, trust_remote_code=False) as found:
        assert found is weights
    assert list(tmp_path.iterdir()) == []


def test_packages_that_are_missing_are_named_with_what_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else name)
    weights = Weights(model="acme/small", merged=(AdapterRef(name="one", path=tmp_path),))
    with (
        pytest.raises(ExecutorUnavailableError, match=r"needs peft, .*'flowmesh-vllm\[eng") as got,
        merged(weights, tmp_path, trust_remote_code=False),
    ):
        pass
    assert got.value.needs == ("peft",)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_ended_may_be_tried_again_and_one_that_failed_not() -> None:
    ended = _describe_end("merging one into x", -signal.SIGKILL)
    assert "merging one into x was ended by SIGKILL; it needs free memory" in str(ended)
    failed = _describe_end("merging one into x", 1)
    assert "failed with exit code 1; the log says why" in str(failed)
    assert (ended.retriable, failed.retriable) == (True, False)


# What follows has a real model.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in float32 with files beside its weights."""
    pytest.importorskip("peft")
    return write_model(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose embeddings are its head too."""
    pytest.importorskip("peft")
    return write_model(tmp_path_factory.mktemp("tied"), tied=True)


def write_model(folder: Path, *, tied: bool, dtype: str = "float32") -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**kept, "our_own_field": 7}))
    # refused when written, since it does not sample
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "optimizer.pt").write_text("not for inference")
    return folder


@pytest.fixture
def make_lora(base: Path, tmp_path: Path) -> Lora:
    """Write an adapter all of whose weights are random and strong."""

    def make(name: str, *, model: Path = base, scale: float = 1, **config: Any) -> AdapterRef:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(name))
        wanted = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
        loaded = AutoModelForCausalLM.from_pretrained(model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # peft warns of what is tested here
            tuned = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", **wanted))
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            tuned.save_pretrained(tmp_path / name)
        return AdapterRef(name=name, path=tmp_path / name, scale=scale, apply="merge")

    return make


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor(TOKENS)).logits


def logits_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def logits_of_unmerged(folder: Path, *adapters: AdapterRef) -> Any:
    """Return what peft answers with the adapters on top of the model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    names = [f"lora_{number}" for number in range(len(adapters))]
    tuned: Any = None
    warnings.simplefilter("ignore")  # pytest restores them
    for name, adapter in zip(names, adapters, strict=True):
        if tuned is None:
            tuned = PeftModel.from_pretrained(model, adapter.path, adapter_name=name)
        else:
            tuned.load_adapter(adapter.path, adapter_name=name)
        for module in tuned.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(name, adapter.scale)
    tuned.base_model.set_adapter(names)
    return logits(tuned)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"lora_dropout": 0.5},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "patterns": {"alpha_pattern": {"v_proj": 12}, "rank_pattern": {"q_proj": 2}},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
    "tokens": {"trainable_token_indices": [7, 300]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
TIED = {name: KINDS[name] for name in ("plain", "saved", "tokens", "head", "embedding")}
TIED["both"] = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
TIED["saved together"] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
PARTED = ("saved", "head", "embedding", "both")


OWN_FILES = ("tokenizer.json", "generation_config.json", "1_Pooling/config.json")


@pytest.fixture
def merge() -> Callable[..., None]:
    """Do what the process does, without its start."""
    from flowmesh_vllm.merger import merge

    def in_folder(model: Path, *adapters: AdapterRef, target: Path) -> None:
        target.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of what is tested here
            merge(
                str(model), revision=None, adapters=adapters, target=target, trust_remote_code=False
            )

    return in_folder


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_answers_merged_as_it_does_alone(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path, name: str
) -> None:
    adapter = make_lora(f"{name}.v1", **KINDS[name])
    merge(base, adapter, target=tmp_path / "merged")
    assert_same_but_not_plain(tmp_path / "merged", base, adapter)
    assert (tmp_path / "merged/config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_shares_its_weights_is_parted_only_when_one_of_the_two_changes(
    tied: Path, make_lora: Lora, merge: Any, tmp_path: Path, name: str
) -> None:
    adapter = make_lora(name, model=tied, **TIED[name])
    merge(tied, adapter, target=tmp_path / "merged")
    assert_same_but_not_plain(tmp_path / "merged", tied, adapter)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    kept = json.loads((tied / "config.json").read_text())
    assert config == {**kept, "tie_word_embeddings": name not in PARTED}
    assert kept["tie_word_embeddings"]


def assert_same_but_not_plain(merged: Path, base: Path, *adapters: AdapterRef) -> None:
    import torch

    found = logits_of(merged)
    expected = logits_of_unmerged(base, *adapters)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits_of(base)).abs().max() > 1


def test_a_process_merges_adapters_with_their_scales_into_a_model_of_the_hub(
    base: Path, make_lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub/models--acme--small"
    shutil.copytree(base, cached / "snapshots/1234")
    (cached / "refs").mkdir()
    (cached / "refs/v2").write_text("1234")
    one, two = make_lora("one", scale=0.5, use_rslora=True), make_lora("second", scale=-2)
    weights = Weights(model="acme/small", revision="v2", merged=(one, two))
    with merged(weights, tmp_path / "attempt", trust_remote_code=False) as found:
        folder = tmp_path / "attempt/.merged"
        assert found == Weights(model=str(folder))
        assert_same_but_not_plain(folder, base, one, two)
        for name in OWN_FILES:
            assert (folder / name).read_bytes() == (base / name).read_bytes()
        assert not (folder / "optimizer.pt").exists()
    assert list((tmp_path / "attempt").iterdir()) == []
    assert (cached / "snapshots/1234/tokenizer.json").is_file()


def test_what_goes_wrong_in_the_process_is_said_here_and_nothing_is_left(
    base: Path, make_lora: Lora, tmp_path: Path
) -> None:
    stranger = make_lora("stranger", scale=2, modules_to_save=["lm_head"])
    weights = Weights(model=str(base), merged=(stranger,))
    (tmp_path / "attempt/.merged").mkdir(parents=True)
    (tmp_path / "attempt/.merged/model.safetensors").write_text("of an earlier try")
    with (
        pytest.raises(InputError, match=r"adapter stranger: scale must be 1 .* modules_to_save"),
        merged(weights, tmp_path / "attempt", trust_remote_code=False),
    ):
        pass
    assert list((tmp_path / "attempt").iterdir()) == []


def test_the_tokenizer_of_a_bare_checkpoint_keeps_its_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("flowmesh_vllm.merging._merge_elsewhere", lambda *_, **__: None)
    weights = Weights(
        model="/bare",
        tokenizer="acme/small",
        revision="v2",
        merged=(AdapterRef(name="one", path=tmp_path),),
    )
    with merged(weights, tmp_path, trust_remote_code=False) as found:
        assert (found.tokenizer, found.revision) == ("acme/small", "v2")


def test_weights_keep_their_type(make_lora: Lora, merge: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    half = write_model(tmp_path / "half", tied=False, dtype="bfloat16")
    merge(half, make_lora("one", model=half), target=tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_each_adapter_is_applied_to_what_those_before_it_made(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path
) -> None:
    head = make_lora("head", modules_to_save=["lm_head"], target_modules=["q_proj"])
    merge(base, head, target=tmp_path / "first")
    on_top = make_lora("top", model=tmp_path / "first", target_modules=["lm_head", "o_proj"])
    merge(base, head, on_top, target=tmp_path / "both")
    assert_same_but_not_plain(tmp_path / "both", tmp_path / "first", on_top)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized, and adapters"),
        ({"architectures": ["LlamaModel"]}, r"\(LlamaModel\) is no model that only writes text"),
        ({"model_type": "t5"}, r"\(t5\) is no model that only writes text"),
        ({"model_type": "nothing-known"}, "cannot be loaded to merge adapters: .*nothing-known"),
        ({"num_hidden_layers": 3}, r"has no weights for model\.layers\.2"),
    ],
)
def test_a_model_that_nothing_can_be_merged_into_is_refused(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path, fields: Any, message: str
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    edit(copy / "config.json", **fields)
    with pytest.raises(InputError, match=f"copy .*{message}|copy {message}"):
        merge(copy, make_lora("one"), target=tmp_path / "merged")


def test_a_model_of_pictures_is_refused(make_lora: Lora, merge: Any, tmp_path: Path) -> None:
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path / "llava")
    with pytest.raises(InputError, match=r"\(llava\) is no model that only writes text"):
        merge(tmp_path / "llava", make_lora("one"), target=tmp_path / "merged")


def test_adapters_that_do_not_fit_are_refused_by_name(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = make_lora("other")
    config, file = other.path / "adapter_config.json", other.path / "adapter_model.safetensors"
    written, whole = config.read_text(), load_file(file)
    first = min(whole)

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=f"adapter other.*{message}"):
            merge(base, other, target=tmp_path / f"merged-{message[:4]}")

    edit(config, target_modules=["query"])
    refused("[Tt]arget modules")
    config.write_text(written)
    edit(config, layer_replication=[[0, 2], [0, 1]])
    refused("layer_replication cannot be merged")
    config.write_text(written)
    save_file({**whole, first: torch.zeros(2, 9)}, file)
    refused("size mismatch")
    save_file({key: value for key, value in whole.items() if key != first}, file)
    refused("lora_A.* does not fit the model")
    save_file({**whole, first: torch.full_like(whole[first], torch.nan)}, file)
    refused("NaN")
    file.write_bytes(b"cut off")
    refused("cannot be loaded to merge")


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"trainable_token_indices": [7]}]
)
def test_a_scale_that_would_not_reach_all_of_an_adapter_is_refused(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path, config: Any
) -> None:
    adapter = make_lora("one", scale=0.5, **config)
    with pytest.raises(InputError, match=f"adapter one: scale must be 1 .*{next(iter(config))}"):
        merge(base, adapter, target=tmp_path / "merged")


def test_a_disk_without_room_is_named_and_may_have_some_later(
    base: Path, make_lora: Lora, merge: Any, tmp_path: Path
) -> None:
    adapter = make_lora("one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ExecutionError, match=r"no room in .*/merged for the merged") as caught:
            merge(base, adapter, target=tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.retriable
