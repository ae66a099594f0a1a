"""Every task type trains the tiny model for real: what it learns, saves, reports and survives."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("trl")

import attrs
import torch
from flowmesh_trl import training
from flowmesh_trl.job import Link, TrainingJob
from flowmesh_trl.training import train
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from flowmesh_core import (
    CancelledError,
    ContractError,
    CrashError,
    ExecutionError,
    ExecutorUnavailableError,
    InputError,
)

Jobs = Callable[..., TrainingJob]

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black tea"
WORDS = TEXT.split()
TEXTS = [" ".join(WORDS[i : i + 6]) for i in range(10)]
PAIRS = [{"prompt": a, "chosen": f" {b}", "rejected": f" {a} {a}"} for a, b in pairwise(WORDS)][:8]
ANSWERS = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
    for i, row in enumerate(PAIRS)
]
QUERIES = [{"prompt": word} for word in WORDS[:8]]
SHORT = [{"name": "length", "options": {"target": 9, "unit": "chars"}}]
ROWS: dict[str, Any] = {
    "sft": TEXTS,
    "lora_sft": TEXTS,
    "dpo": PAIRS,
    "kto": ANSWERS,
    "reward": PAIRS,
    "grpo": QUERIES,
    "ppo": QUERIES,
}
SPEC: dict[str, Any] = {
    "grpo": {"reward": SHORT, "generation": {"max_new_tokens": 6}},
    "ppo": {"reward": SHORT, "generation": {"max_new_tokens": 6}},
}
TRAINING: dict[str, Any] = {
    "grpo": {"num_generations": 2, "max_steps": 3},
    "ppo": {"steps": 3, "ppo_epochs": 2},
}


def make_small(make_job: Jobs, task_type: str, **changes: Any) -> Any:
    """Make a job of three or four steps of a type."""
    training = {"learning_rate": 1e-3, **TRAINING.get(task_type, {"max_steps": 3})}
    training |= changes.pop("training", {})
    spec = {**SPEC.get(task_type, {}), **changes}
    return make_job(task_type, spec.pop("rows", ROWS[task_type]), training=training, **spec)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "training_metrics.json").read_bytes())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("task_type", ["sft", "dpo", "kto", "grpo", "ppo"])
def test_what_was_trained_is_a_model_that_loads_and_writes(
    task_type: str, make_job: Jobs, tiny: Path
) -> None:
    job, seen = make_small(make_job, task_type), Listener()
    result = train(job, seen.link)

    assert result["training_successful"] is True
    assert result["steps"] == 3
    assert result["dataset_size"] == len(ROWS[task_type])
    assert math.isfinite(result["train_loss"])
    final = job.folder / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    written = model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=4)
    assert written.shape[1] > 3
    plain = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.chat_template == plain.chat_template
    assert tokenizer.get_vocab() == plain.get_vocab()
    before, after = weights(tiny), weights(final)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not (final / "training_args.bin").exists()
    assert (job.folder / "artifacts" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [report["step"] for report in seen.reports] == [1, 2, 3]
    assert {"loss", "learning_rate", "eta_s", "epoch"} <= seen.reports[-1].keys()


def test_a_reward_model_learns_to_tell_chosen_from_rejected(make_job: Jobs) -> None:
    job = make_small(
        make_job,
        "reward",
        data={"prompt_format": "plain"},
        training={"max_steps": 30, "batch_size": 8, "learning_rate": 3e-3},
    )
    result = train(job, Listener().link)

    assert result["metrics"]["accuracy"] == 1.0
    final = job.folder / "final_model"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    ends = tokenizer.eos_token
    row = PAIRS[0]
    good, bad = (
        model(**tokenizer(row["prompt"] + row[key] + ends, return_tensors="pt")).logits.item()
        for key in ("chosen", "rejected")
    )
    assert good > bad


def test_the_loss_of_twenty_steps_falls(make_job: Jobs) -> None:
    job = make_job("sft", TEXTS, training={"max_steps": 20, "learning_rate": 3e-3})
    result = train(job, Listener().link)

    falling = losses(job.folder)
    assert len(falling) == 20
    assert falling[-1] < falling[0] - 1
    assert result["train_loss"] == pytest.approx(sum(falling) / 20)


def test_an_adapter_leaves_the_model_as_it_was(make_job: Jobs, tiny: Path) -> None:
    job = make_small(make_job, "lora_sft", lora={"r": 4, "alpha": 8})
    train(job, Listener().link)

    final = job.folder / "final_lora"
    learnt = weights(final)
    assert all("lora_" in name for name in learnt)
    assert any(tensor.abs().sum() > 0 for name, tensor in learnt.items() if "lora_B" in name)
    config = json.loads((final / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == "acme/small"
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[5, 6, 7]])
    plain = base(ids).logits
    tuned = PeftModel.from_pretrained(base, str(final))
    assert not torch.allclose(tuned(ids).logits, plain)
    assert not (job.folder / "final_model").exists()


@pytest.mark.parametrize("task_type", ["dpo", "kto", "grpo", "ppo", "reward"])
def test_preferences_and_rewards_train_adapters_too(task_type: str, make_job: Jobs) -> None:
    job = make_small(make_job, task_type, lora={"r": 2}, training={"batch_size": 2})
    train(job, Listener().link)

    names = weights(job.folder / "final_lora")
    assert names
    assert all("lora_" in name or name.endswith("score.weight") for name in names)


@pytest.mark.parametrize(
    ("task_type", "lora"),
    [
        ("reward", {"r": 2}),
        ("lora_sft", {"r": 2, "modules_to_save": ["lm_head"]}),
        ("dpo", {"r": 2, "modules_to_save": ["lm_head"]}),
        ("grpo", {"r": 2, "modules_to_save": ["lm_head"]}),
    ],
)
def test_all_that_is_trained_beside_a_short_model_keeps_its_precision(
    task_type: str, lora: dict[str, Any], make_job: Jobs
) -> None:
    job = make_small(make_job, task_type, lora=lora, training={"bf16": True, "batch_size": 2})
    train(job, Listener().link)

    learnt = weights(job.folder / "final_lora")
    assert any("lora_" not in name for name in learnt)
    assert {tensor.dtype for tensor in learnt.values()} == {torch.float32}


def test_an_adapter_is_continued_from_where_it_stood(make_job: Jobs) -> None:
    first = make_small(make_job, "lora_sft", folder="first", lora={"r": 4})
    train(first, Listener().link)
    adapter = first.folder / "final_lora"
    still = make_small(
        make_job,
        "lora_sft",
        folder="still",
        inputs={"checkpoint": adapter},
        training={"learning_rate": 1e-30},
    )
    result = train(still, Listener().link)

    before, after = weights(adapter), weights(still.folder / "final_lora")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)
    assert result["resume_from_path"] == str(adapter)


def test_an_adapter_of_another_form_is_not_continued(make_job: Jobs) -> None:
    first = make_small(make_job, "lora_sft", folder="first", lora={"r": 4})
    train(first, Listener().link)
    again = make_small(
        make_job,
        "lora_sft",
        inputs={"checkpoint": first.folder / "final_lora"},
        lora={"r": 8},
    )
    with pytest.raises(InputError, match=r"has r 4, spec\.lora asks for 8"):
        train(again, Listener().link)


def test_an_adapter_is_merged_where_all_weights_are_trained(make_job: Jobs, tiny: Path) -> None:
    first = make_small(make_job, "lora_sft", folder="first", training={"max_steps": 6})
    train(first, Listener().link)
    adapter = first.folder / "final_lora"
    job = make_small(
        make_job, "sft", inputs={"checkpoint": adapter}, training={"learning_rate": 1e-30}
    )
    train(job, Listener().link)

    base = AutoModelForCausalLM.from_pretrained(tiny)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    for name, tensor in weights(job.folder / "final_model").items():
        torch.testing.assert_close(tensor, merged[name])
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"],
        weights(tiny)["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize("task_type", ["dpo", "grpo"])
def test_the_reference_is_what_the_training_began_with(
    task_type: str, make_job: Jobs, tmp_path: Path, tiny: Path
) -> None:
    # A file of weights on top of the model: the model's own name would lead to other weights.
    state = {name: tensor * 1.5 for name, tensor in weights(tiny).items()}
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    job = make_small(
        make_job,
        task_type,
        inputs={"checkpoint": file},
        training={"learning_rate": 1e-30, "beta": 0.5, "max_steps": 1},
    )
    result = train(job, Listener().link)

    metrics = result["metrics"]
    distance = metrics["rewards/margins"] if task_type == "dpo" else metrics["kl"]
    assert distance == pytest.approx(0, abs=1e-4)


def test_training_goes_on_as_if_it_had_never_stopped(make_job: Jobs) -> None:
    plan = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-3, "save_total_limit": None}
    whole = make_job("sft", TEXTS, folder="whole", training=plan)
    train(whole, Listener().link)
    seen = Listener()
    rest = make_job("sft", TEXTS, folder="rest", training=plan)
    checkpoint = whole.folder / "checkpoints" / "checkpoint-3"
    result = train(attrs.evolve(rest, resume=checkpoint), seen.link)

    assert [report["step"] for report in seen.reports] == [4, 5, 6]
    assert losses(rest.folder) == pytest.approx(losses(whole.folder), abs=1e-6)
    assert result["steps"] == 6
    assert result["train_loss"] == pytest.approx(sum(losses(whole.folder)) / 6)
    expected = weights(whole.folder / "final_model")
    for name, tensor in weights(rest.folder / "final_model").items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_training_that_had_reached_its_last_step_makes_no_further_one(make_job: Jobs) -> None:
    plan = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-3}  # ends amid an epoch of 5
    whole = make_job("sft", TEXTS, folder="whole", training=plan)
    train(whole, Listener().link)
    again = make_job("sft", TEXTS, folder="again", training=plan)
    checkpoint = whole.folder / "checkpoints" / "checkpoint-3"
    result = train(attrs.evolve(again, resume=checkpoint), Listener().link)

    assert result["steps"] == 3
    expected = weights(whole.folder / "final_model")
    for name, tensor in weights(again.folder / "final_model").items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_a_stopped_training_leaves_a_checkpoint_to_go_on_from(
    task_type: str, make_job: Jobs
) -> None:
    first = make_small(make_job, task_type, folder="first")
    with pytest.raises(CancelledError, match=r"cancelled at step 2 of 3.*checkpoint-2"):
        train(first, Listener(stop_at=2).link)

    checkpoint = first.folder / "checkpoints" / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").is_file()
    assert not (first.folder / "final_model").exists()
    seen = Listener()
    second = make_small(make_job, task_type, folder="second")
    result = train(attrs.evolve(second, resume=checkpoint), seen.link)
    assert result["steps"] == 3
    assert [report["step"] for report in seen.reports] == [3]
    assert (second.folder / "final_model").is_dir()
    assert (second.folder / "checkpoints" / "checkpoint-3").is_dir()


def test_policy_critic_and_optimizer_come_back_from_a_checkpoint(make_job: Jobs) -> None:
    first = make_small(make_job, "ppo", folder="first")
    train(first, Listener().link)
    end = first.folder / "checkpoints" / "checkpoint-3"
    files = (end / "value_model.safetensors", end / "trainer_state.json")
    critic_at, state_at = (file.stat().st_mtime_ns for file in files)
    assert critic_at <= state_at  # which tells whole checkpoints from those that were cut off
    over = attrs.evolve(make_small(make_job, "ppo", folder="over"), resume=end)
    assert train(over, Listener().link)["steps"] == 3  # none was left to do
    critic = load_file(end / "value_model.safetensors")
    critic["score.weight"] += 5  # unlike any that is drawn
    save_file(critic, end / "value_model.safetensors")
    one_more = make_small(make_job, "ppo", folder="more", training={"steps": 4})
    train(attrs.evolve(one_more, resume=end), Listener().link)

    expected = load_file(end / "model.safetensors")
    for name, tensor in weights(over.folder / "final_model").items():
        torch.testing.assert_close(tensor, expected[name])
    later = one_more.folder / "checkpoints" / "checkpoint-4"
    for checkpoint, count in ((end, 6), (later, 8)):  # two epochs of each update
        states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert {int(state["step"]) for state in states.values()} == {count}
    went_on = load_file(later / "value_model.safetensors")["score.weight"]
    torch.testing.assert_close(went_on, critic["score.weight"], rtol=0, atol=0.1)


def test_a_smaller_micro_batch_changes_no_step(make_job: Jobs) -> None:
    plan = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}
    whole = make_job("sft", TEXTS, folder="whole", training=plan)
    train(whole, Listener().link)
    seen = Listener()
    halved = make_job("sft", TEXTS, folder="half", training=plan, job={"batch_scale": 0.5})
    train(halved, seen.link)

    batch = json.loads((halved.folder / "training_metrics.json").read_bytes())["batch"]
    assert batch == {"per_device": 2, "accumulation": 2, "processes": 1, "effective": 4}
    assert losses(halved.folder) == pytest.approx(losses(whole.folder), rel=1e-3)
    assert "micro batch 2, 2 of them for one step" in seen.lines


def test_a_training_that_ran_out_of_memory_goes_on_with_half_the_micro_batch(
    make_job: Jobs,
) -> None:
    seen = OutOfMemoryAt(step=3)
    job = make_job("sft", TEXTS, training={"max_steps": 4, "save_steps": 2, "batch_size": 4})
    result = train(job, seen.link)

    assert result["steps"] == 4
    assert "memory ran out; half the micro batch, from checkpoint-2" in seen.lines
    assert [report["step"] for report in seen.reports] == [1, 2, 3, 4]
    batch = json.loads((job.folder / "training_metrics.json").read_bytes())["batch"]
    assert (batch["per_device"], batch["effective"]) == (2, 4)


def test_a_checkpoint_that_lack_of_memory_cut_off_is_not_gone_on_from(make_job: Jobs) -> None:
    job = make_job("sft", TEXTS, training={"max_steps": 4, "save_steps": 1, "batch_size": 2})
    seen = OutOfMemoryAt(step=3)
    cut = job.folder / "checkpoints" / "checkpoint-2" / "model.safetensors"
    seen.before_the_end = lambda: cut.write_bytes(cut.read_bytes()[:-9])
    train(job, seen.link)

    assert "memory ran out; half the micro batch, from checkpoint-1" in seen.lines


def test_a_training_whose_single_rows_are_too_large_fails_for_memory(make_job: Jobs) -> None:
    seen = OutOfMemoryAt(step=1, times=9)
    job = make_job("sft", TEXTS, training={"max_steps": 2, "batch_size": 2})
    with pytest.raises(CrashError, match="task-1: memory ran out: no room") as caught:
        train(job, seen.link)

    assert caught.value.oom
    assert sum("memory ran out; half" in line for line in seen.lines) == 1


def test_a_loss_that_is_no_number_fails_the_task_and_saves_nothing(make_job: Jobs) -> None:
    seen = Listener()
    job = make_job("sft", TEXTS, training={"max_steps": 3, "learning_rate": 1e30})
    with pytest.raises(ExecutionError, match=r"after 3 steps .* so nothing was saved"):
        train(job, seen.link)

    assert not (job.folder / "final_model").exists()
    assert any(line.startswith("warning: step") for line in seen.lines)


def test_ppo_is_refused_fewer_rows_than_one_batch_takes(make_job: Jobs) -> None:
    plan = {"batch_size": 2, "gradient_accumulation_steps": 2}
    job = make_small(make_job, "ppo", rows=QUERIES[:3], training=plan)
    with pytest.raises(InputError, match=r"3 rows.* one batch takes 4"):
        train(job, Listener().link)


def test_a_training_that_made_no_step_is_no_success(make_job: Jobs) -> None:
    plan = {"batch_size": 16, "dataloader_drop_last": True, "max_steps": 2}
    job = make_job("sft", TEXTS, training=plan)
    with pytest.raises(InputError, match=r"ended after 0 of 2 steps.*10 rows.*more rows"):
        train(job, Listener().link)
    assert not (job.folder / "final_model").exists()


def test_ppo_saves_the_end_that_the_model_had_before(
    make_job: Jobs, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(training, "_check_steps", lambda trainer, **_: built.append(trainer))
    generation = {"max_new_tokens": 6, "stop": "<|user|>"}
    job = make_small(make_job, "ppo", generation=generation, training={"save_steps": 1})
    train(job, Listener().link)

    kept = json.loads((job.folder / "final_model" / "generation_config.json").read_bytes())
    before = json.loads((tiny / "generation_config.json").read_bytes())
    assert kept["eos_token_id"] == before["eos_token_id"]
    policy = built[0].model.policy  # which goes on as it did after each checkpoint
    stop = AutoTokenizer.from_pretrained(tiny).convert_tokens_to_ids("<|user|>")
    assert policy.generation_config.eos_token_id == stop


def test_a_model_that_nobody_wants_is_not_saved(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", training={"save_model": False, "save_strategy": "no"})
    result = train(job, Listener().link)

    assert result["training_successful"] is True
    left = {path.name for path in job.folder.iterdir()}
    assert not left & {"final_model", "final_lora"}
    assert not any(job.folder.glob("checkpoints/checkpoint-*"))


def test_a_model_that_cannot_be_saved_fails_the_task(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", training={"max_steps": 1, "save_strategy": "no"})
    (job.folder / "final_model").write_text("a file where the folder should be")
    with pytest.raises((OSError, AssertionError), match="final_model"):
        train(job, Listener().link)


def test_rows_kept_aside_are_evaluated(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", data={"eval_fraction": 0.3}, training={"eval_steps": 2})
    result = train(job, Listener().link)

    assert result["dataset_size"] == 7
    assert math.isfinite(result["metrics"]["eval_loss"])
    history = json.loads((job.folder / "training_metrics.json").read_bytes())["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 3]


def test_an_unknown_key_is_refused_with_the_nearest_one(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", training={"lerning_rate_x": 1, "weight_decai": 0.1})
    with pytest.raises(ContractError, match=r"weight_decai.*did you mean 'weight_decay'"):
        train(job, Listener().link)


def test_what_only_the_library_refuses_is_a_fault_of_the_document(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", training={"loss_type": "no_such_loss"})
    with pytest.raises(ContractError, match=r"task-1: TRL refuses to train \(sft\).*no_such_loss"):
        train(job, Listener().link)


def test_the_card_tells_what_the_model_came_from(make_job: Jobs) -> None:
    job = make_small(make_job, "sft")
    train(job, Listener().link)

    card = (job.folder / "final_model" / "README.md").read_text()
    assert 'base_model: "acme/small"' in card
    assert "on 10 records in 3 steps" in card


def test_trackers_write_into_the_task(make_job: Jobs) -> None:
    job = make_small(make_job, "sft", training={"report_to": ["tensorboard"]})
    train(job, Listener().link)

    assert list(job.folder.glob("artifacts/tensorboard/events.*"))


def test_a_tracker_that_is_not_installed_is_named(
    make_job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    job = make_small(make_job, "sft", training={"report_to": ["wandb", "azure_ml"]})
    with pytest.raises(
        ExecutorUnavailableError, match=r"run: pip install wandb azureml-core"
    ) as caught:
        train(job, Listener().link)
    assert list(caught.value.needs) == ["wandb", "azureml-core"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_of_wandb_ends_with_its_training(
    fails: bool, make_job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    tracker: Any = ModuleType("wandb")
    tracker.run, tracker.finish = object(), lambda: ended.append(True)

    def check(_trainer: Any, **_arguments: Any) -> None:
        monkeypatch.setitem(sys.modules, "wandb", tracker)
        if fails:
            raise InputError("too few rows")

    monkeypatch.setattr(training, "_check_steps", check)
    plan = {"max_steps": 1, "save_model": False, "save_strategy": "no"}
    with pytest.raises(InputError, match="too few") if fails else nullcontext():
        train(make_job("sft", TEXTS, training=plan), Listener().link)
    assert ended == [True]


class Listener:
    """Keeps what a training reports.

    Args:
        stop_at: Step after which the training is to stop.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.reports: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self._stop_at = stop_at
        self._asked = 0
        self.link = Link(report=self._report, say=self.lines.append, must_stop=self._must_stop)

    def _report(self, **values: Any) -> None:
        self.reports.append(values)

    def _must_stop(self) -> bool:
        self._asked += 1
        return self._stop_at is not None and self._asked >= self._stop_at


class OutOfMemoryAt(Listener):
    """Lets memory run out at the end of a step."""

    def __init__(self, step: int, times: int = 1) -> None:
        super().__init__(stop_at=step)
        self._times = times
        self.before_the_end: Callable[[], object] = lambda: None

    def _must_stop(self) -> bool:
        if super()._must_stop() and self._times:
            self._times -= 1
            self.before_the_end()
            raise torch.OutOfMemoryError("no room for 3 GiB")
        return False
