from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from flowmesh_trl import training_block
from flowmesh_trl.data_block import ROLES
from flowmesh_trl.options import CONFIGS, config_options
from flowmesh_trl.spec import SPECS, TrainingSpec

from flowmesh_core import ContractError
from flowmesh_core.checking import check_spec
from flowmesh_core.validation import validate_model

DATA: Mapping[str, Any] = {
    "sft": {"jsonl_path": "rows.jsonl"},
    "lora_sft": {"prompts": ["a text"]},
    "dpo": {"preferences": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
    "ppo": {"prompts": ["say it"]},
    "grpo": {"examples": [{"prompt": "1+1", "answer": "2"}]},
    "reward": {"dataset_name": "acme/pairs"},
    "kto": {"examples": [{"prompt": "a", "completion": "b", "label": True}]},
}
REWARDED = ("ppo", "grpo")
ALL = tuple(SPECS)


def parse(task_type: str, **blocks: Any) -> TrainingSpec:
    """Validate a spec with the smallest document of its type under the given blocks."""
    reward = {"reward": "length_like"} if task_type in REWARDED else {}
    value = {"taskType": task_type, "data": DATA[task_type], **reward, **blocks}
    return validate_model(SPECS[task_type], value, where="task t", prefix="spec")


def train(task_type: str, **training: Any) -> Any:
    return parse(task_type, training=training).training


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keys that TRL has, the same whether it is installed or not."""
    known: dict[str, Any] = {
        "weight_decay": float,
        "adam_epsilon": float,
        "logging_first_step": bool,
        "loss_type": str,
        "output_dir": str,
        "total_episodes": int,
        "response_length": int,
        "max_completion_length": int,
        "steps_per_generation": int,
        "lr_scheduler_kwargs": dict[str, Any] | str | None,
        "optim": Any,
        "max_grad_norm": float,
        "activation_checkpointing": bool,
    }
    monkeypatch.setattr(training_block, "config_options", lambda _task_type: known)
    return known


@pytest.mark.parametrize("task_type", ALL)
def test_the_smallest_document_is_enough(task_type: str) -> None:
    spec = parse(task_type)
    assert spec.training.task_type == task_type
    assert spec.task_type == task_type
    assert spec.training.save_model
    assert spec.training.report_to == []


@pytest.mark.parametrize("task_type", ALL)
def test_a_null_block_is_one_left_out(task_type: str) -> None:
    blocks = dict.fromkeys(
        ("model", "checkpoint", "training", "lora", "generation", "reward_model")
    )
    assert parse(task_type, **blocks) == parse(task_type)


@pytest.mark.parametrize("task_type", ALL)
def test_without_data_nothing_is_trained(task_type: str) -> None:
    for data in (None, {}, {"type": "none"}, {"max_samples": 3}):
        with pytest.raises(ContractError, match=r"spec\.data ?(is required|must give|\.type must)"):
            parse(task_type, data=data)


@pytest.mark.parametrize(
    ("task_type", "defaults"),
    [
        ("sft", (2, 5e-5, 100, 1024, True)),
        ("lora_sft", (2, 2e-4, 100, 1024, False)),
        ("dpo", (4, 5e-7, 500, 1024, False)),
        ("ppo", (1, 1.41e-5, 100, 512, False)),
    ],
)
def test_defaults_are_those_of_the_contract(task_type: str, defaults: tuple[Any, ...]) -> None:
    block = train(task_type)
    found = (
        *(block.batch_size, block.learning_rate, block.save_steps),
        *(block.max_seq_length, block.gradient_checkpointing),
    )
    assert found == defaults
    assert (block.num_train_epochs, block.gradient_accumulation_steps) == (1.0, 1)
    assert (block.warmup_steps, block.logging_steps, block.seed) == (0, 10, 42)


def test_a_document_of_the_contract_is_taken_whole() -> None:
    spec = parse(
        "ppo",
        data={"jsonl": {"url": "http://h/x", "query_field": "q", "response_field": "r"}},
        reward_model={"identifier": "acme/score", "type": "sentiment", "positive_label": "POS"},
        training={
            "batch_size": 8,
            "per_device_train_batch_size": 8,
            "mini_batch_size": 2,
            "ppo_epochs": 3,
            "steps": 5,
            "kl_coef": "1e-1",
            "max_seq_length": 128,
            "save_safetensors": False,
            "optimize_cuda_cache": True,
            "save_freq": 20,
            "early_stopping": False,
            "target_kl": 0.1,
            "log_with": "none",
            "visible_devices": "0,1",
            "primary_gpu": 1,
            "zero_stage": 3,
            "tracker_project_name": "acme",
        },
        generation={"max_tokens": 32, "temperature": 0.9, "stop": "\n", "do_sample": True},
    )
    assert spec.data.columns == {"prompt": "q", "response": "r"}
    assert spec.training.visible_devices == ["0", "1"]
    assert spec.generation
    assert spec.generation.max_new_tokens == 32
    given = spec.training.config_arguments
    assert given["per_device_train_batch_size"] == given["per_device_eval_batch_size"] == 8
    assert given["num_mini_batches"] == 4
    assert given["total_episodes"] == 40
    assert given["num_ppo_epochs"] == 3
    assert given["kl_coef"] == 0.1
    assert given["save_steps"] == 20
    assert given["project"] == "acme"
    assert "max_length" not in given


@pytest.mark.parametrize("task_type", ALL)
def test_what_goes_to_trl_has_its_names(task_type: str) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("torch")
    known = config_options(task_type)
    assert known is not None
    block = train(task_type, deepspeed={"zero": 3}, project="acme", per_device_eval_batch_size=4)
    assert known.keys() >= block.config_arguments.keys()


def test_options_of_trl_are_kept_and_get_their_type() -> None:
    block = train("sft", adam_epsilon="1e-8", weight_decay=1, logging_first_step="yes", optim="sgd")
    expected = {"adam_epsilon": 1e-8, "weight_decay": 1.0, "logging_first_step": True}
    assert block.options == {**expected, "optim": "sgd"}
    assert block.config_arguments.items() >= block.options.items()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"weigth_decay": 0}, r"spec\.training: unknown key 'weigth_decay', did you mean 'weight"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"evaluation_strategy": "no"}, "use eval_strategy"),
        ({"weight_decay": "x"}, r"spec\.training\.weight_decay must be a number, got 'x'"),
        ({"output_dir": "/x"}, "output_dir is not for documents to set: files go to the task's"),
        ({"resume_from_checkpoint": "/x"}, "use resume_from_path"),
        ({"push_to_hub": True}, "results go to output.destination"),
        ({"hub_token": "x"}, "hub_token is not for documents"),
        ({"local_rank": 0}, "nproc_per_node asks for processes"),
        ({"batch_size": 0}, r"batch_size must be greater than or equal to 1, got 0"),
        ({"learning_rate": 0}, "learning_rate must be greater than 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"save_strategy": "never"}, "save_strategy must be 'no', 'steps', 'epoch' or 'best'"),
        ({"zero_stage": 7}, r"spec\.training\.zero_stage must be 1, 2 or 3"),
        ({"batch_size": 2, "per_device_train_batch_size": 4}, "are one field and contradict"),
        ({"fp16": True, "bf16": True}, "fp16 and bf16 exclude each other"),
        ({"deepspeed": {"a": 1}, "fsdp": "full_shard"}, "deepspeed and fsdp exclude"),
        ({"nproc_per_node": 2, "allow_multi_gpu": False}, "contradicts nproc_per_node 2"),
        ({"nproc_per_node": 3, "visible_devices": [0, 1]}, "visible_devices names fewer GPUs"),
        ({"log_with": "wandb", "tracker_project_name": "x"}, "reaches only trackio.*WANDB_PROJECT"),
    ],
)
def test_training_that_cannot_be_is_refused_by_name(training: dict[str, Any], message: str) -> None:
    for task_type in ("sft", "dpo", "grpo"):
        with pytest.raises(ContractError, match=message):
            train(task_type, **training)


@pytest.mark.parametrize(
    ("task_type", "training", "message"),
    [
        ("sft", {"packing": True, "max_length": None}, "packing needs max_seq_length"),
        ("dpo", {"packing": True}, "unknown key 'packing'"),
        ("kto", {"batch_size": 1}, "batch_size must be 2 or more"),
        ("grpo", {"max_seq_length": 64}, "use generation.max_new_tokens"),
        ("grpo", {"num_generations": 1}, "greater than or equal to 2"),
        (
            "grpo",
            {"nproc_per_node": 2, "batch_size": 3, "num_generations": 4},
            "num_generations 4 must divide the 6 answers",
        ),
        ("grpo", {"allow_multi_gpu": False, "batch_size": 3}, "must divide the 3 answers"),
        ("ppo", {"mini_batch_size": 3, "batch_size": 4}, "mini_batch_size 3 must divide"),
        ("ppo", {"num_mini_batches": 3, "batch_size": 4}, "num_mini_batches 3 must divide"),
        (
            "ppo",
            {"mini_batch_size": 2, "num_mini_batches": 4, "batch_size": 4},
            "mini_batch_size 2 and num_mini_batches 4 do not make 4",
        ),
        ("ppo", {"steps": 3, "total_episodes": 6}, "steps and total_episodes"),
        ("ppo", {"max_steps": 3}, "max_steps does not bound PPO; use steps"),
        ("ppo", {"early_stopping": True}, "early_stopping: TRL's PPO cannot"),
        ("ppo", {"target_kl": 0.1}, "target_kl: TRL's PPO does not know it"),
        ("ppo", {"bf16": True}, "bf16: TRL's PPO"),
        ("ppo", {"fp16": True}, "fp16: TRL's PPO"),
        ("ppo", {"gradient_checkpointing": True}, "gradient_checkpointing: TRL's PPO"),
        ("ppo", {"activation_checkpointing": True}, "activation_checkpointing: TRL's PPO"),
        ("ppo", {"max_grad_norm": 1.0}, "max_grad_norm: TRL's PPO"),
        ("ppo", {"save_strategy": "epoch"}, "save_strategy 'epoch': TRL's PPO"),
        ("ppo", {"save_strategy": "best"}, "save_strategy 'best': TRL's PPO"),
    ],
)
def test_what_only_one_trainer_cannot_do_is_refused(
    task_type: str, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        train(task_type, **training)


@pytest.mark.parametrize(
    ("task_type", "training"),
    [
        ("kto", {"batch_size": 1, "loss_type": "apo_zero_unpaired"}),
        ("grpo", {"batch_size": 3}),  # as many processes as there are GPUs
        ("grpo", {"nproc_per_node": 1, "batch_size": 3, "steps_per_generation": 8}),
        ("grpo", {"nproc_per_node": 2, "batch_size": 2, "num_generations": 4}),
        ("ppo", {"mini_batch_size": 2, "num_mini_batches": 4, "batch_size": 8}),
        ("sft", {"log_with": ["wandb", "trackio"], "project": "x"}),
        ("sft", {"batch_size": 4, "per_device_train_batch_size": 4}),
        ("ppo", {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}),
        ("sft", {"save_total_limit": None, "visible_devices": 0, "nproc_per_node": 1}),
    ],
)
def test_what_can_be_is_taken(task_type: str, training: dict[str, Any]) -> None:
    assert train(task_type, **training).options.keys() <= {"loss_type", "steps_per_generation"}


def test_where_trl_is_not_installed_only_its_own_keys_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_block, "config_options", lambda _task_type: None)
    assert train("sft", not_known_here=1).options == {"not_known_here": 1}
    with pytest.raises(ContractError, match="output_dir is not for documents"):
        train("sft", output_dir="/x")


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ContractError) as caught:
        parse(
            "dpo",
            trainig={},
            generation={},
            lora={"r": 0, "lora_alpha": 1, "alpha": 2, "rank": 3},
            data={"dataset_name": "a", "prompt_field": "a", "prompt_column": "b"},
            training={"batch_size": "x", "hub_token": "x", "weigth_decay": 1, "optim": "sgd"},
        )
    assert len(caught.value.problems) == 8
    found = str(caught.value)
    for part in (
        "unknown key 'trainig', did you mean 'training'?",
        "dpo reads no block 'generation'",
        "r must be greater",
        "spec.lora: lora_alpha and alpha",
        "spec.lora: unknown key 'rank'",
        "spec.data: prompt_field and prompt_column",
        "spec.training.batch_size must be a whole number",
        "hub_token is not",
        "unknown key 'weigth_decay'",
    ):
        assert part in found


def test_placeholders_are_left_to_the_run_and_excuse_no_typo() -> None:
    spec = {
        "data": {"jsonl": {"url": "${make.result.url}"}},
        "training": {"batch_size": "${make.result.size}", "weigth_decay": 1},
    }
    assert check_spec("flowmesh_trl.spec:SftSpec", spec) == [
        "spec.training: unknown key 'weigth_decay', did you mean 'weight_decay'?"
    ]


@pytest.mark.parametrize(
    ("task_type", "blocks", "message"),
    [
        ("sft", {"lora": {"r": 4}}, "sft reads no block 'lora'; taskType: lora_sft trains adapt"),
        ("sft", {"reward": "length"}, "sft reads no block 'reward'"),
        ("dpo", {"reward_model": {"identifier": "a"}}, "dpo reads no block 'reward_model'"),
        ("kto", {"generation": {}}, "kto reads no block 'generation'"),
        ("sft", {"checkpiont": {}}, "unknown key 'checkpiont', did you mean 'checkpoint'"),
        (
            "sft",
            {"checkpoint": {"load": {"path": "/a"}}, "training": {"resume_from_path": "/b"}},
            "resume_from_path and checkpoint.load both say where to start",
        ),
        ("sft", {"enforce_cpu": True, "training": {"fp16": True}}, "fp16 needs a GPU"),
        ("sft", {"model": {"adapters": [{"path": "a"}]}}, "checkpoint.load continues an adapter"),
        ("sft", {"training": {"eval_strategy": "steps"}}, "'steps' needs data.eval or data.eval_f"),
        ("ppo", {"reward": None}, "ppo needs reward_model or reward"),
        ("grpo", {"reward": []}, "grpo needs reward_model or reward"),
        ("ppo", {"generation": {"top_p": 0.9}}, "generation.top_p: TRL's trainer for ppo has no"),
        ("grpo", {"generation": {"stop": "x"}}, "generation.stop: TRL's trainer for grpo has no"),
        ("grpo", {"generation": {"do_sample": False}}, "generation.do_sample must be True"),
        ("grpo", {"generation": {"top_k": -1}}, "generation.top_k must be greater"),
        (
            "ppo",
            {"generation": {"temperature": 0.5}, "training": {"temperature": 0.6}},
            "generation.temperature and training.temperature contradict",
        ),
        (
            "grpo",
            {"generation": {"max_tokens": 5}, "training": {"max_completion_length": 6}},
            "generation.max_new_tokens and training.max_completion_length contradict",
        ),
        (
            "ppo",
            {
                "data": {"prompts": ["a"], "eval_fraction": 0.5},
                "training": {"eval_strategy": "epoch"},
            },
            "eval_strategy 'epoch': TRL's PPO does not evaluate",
        ),
        (
            "ppo",
            {"data": {"prompts": ["a"], "eval_fraction": 0.5}},
            "data.eval_fraction: TRL's PPO does not evaluate",
        ),
        (
            "ppo",
            {"data": {"prompts": ["a"], "eval": {"prompts": ["b"]}}},
            "data.eval: TRL's PPO does not evaluate",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    task_type: str, blocks: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        parse(task_type, **blocks)


@pytest.mark.parametrize("training", [{}, {"max_completion_length": 5}])
def test_an_answers_length_may_stand_in_either_place(training: dict[str, Any]) -> None:
    spec = parse("grpo", generation={"max_tokens": 5}, training=training)
    assert spec.generation is not None
    assert spec.generation.max_new_tokens == 5


@pytest.mark.parametrize(
    ("task_type", "data", "message"),
    [
        ("sft", {"promt_field": "a", "jsonl_path": "x"}, "'promt_field', did you mean 'prompt_f"),
        (
            "sft",
            {"jsonl": {"path": "x", "text_fild": "a"}},
            r"data\.jsonl: unknown key 'text_fild'",
        ),
        ("sft", {"jsonl_path": "x", "prompts": ["a"]}, "got jsonl_path and prompts"),
        (
            "sft",
            {"type": "list", "items": ["a"], "jsonl_path": "x"},
            "jsonl_path says nothing abou",
        ),
        ("sft", {"type": "csv"}, r"data\.type must be 'list', .* got 'csv'"),
        ("sft", {"prompts": []}, r"spec\.data\.prompts "),
        ("sft", {"prompts": ["a"], "text_field": "t"}, "text_field says nothing about rows of pro"),
        (
            "sft",
            {"jsonl_path": "x", "split": "train[:1]"},
            "split says nothing about rows of jsonl",
        ),
        ("sft", {"jsonl_path": "x", "text_field": ""}, r"spec\.data\.text_field "),
        ("sft", {"jsonl_path": "x", "max_samples": 0}, "max_samples must be greater"),
        ("sft", {"jsonl_path": "x", "eval_fraction": 1}, "eval_fraction must be less than 1"),
        (
            "sft",
            {"jsonl_path": "x", "eval_fraction": 0.1, "eval": {"jsonl_path": "y"}},
            "eval and eval_fraction exclude",
        ),
        ("sft", {"jsonl_path": "x", "eval": {}}, r"data\.eval must give its rows in one of"),
        (
            "sft",
            {"text_field": "a", "jsonl": {"path": "x", "text_field": "b"}},
            "text_field is 'a' here and 'b' in jsonl",
        ),
        ("dpo", {"jsonl_path": "x", "text_field": "t"}, "dpo has no use for text_field; it reads"),
        (
            "dpo",
            {"jsonl_path": "x", "eval": {"jsonl": {"path": "y", "label_field": "l"}}},
            r"data\.eval: dpo has no use for label_field",
        ),
    ],
)
def test_data_that_cannot_be_is_refused_by_name(
    task_type: str, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ContractError, match=message):
        parse(task_type, data=data)


@pytest.mark.parametrize(
    ("task_type", "data", "columns"),
    [
        ("sft", {"jsonl_path": "x", "text_column": "t", "separator": ""}, {"text": "t"}),
        ("sft", {"jsonl": "x.jsonl", "timeoutSec": None, "messages_field": "m"}, {"messages": "m"}),
        (
            "sft",
            {"prompt_field": "p", "jsonl": {"path": "x", "response_field": "r", "timeout": 5}},
            {"prompt": "p", "response": "r"},
        ),
        (
            "dpo",
            {
                "dataset_name": "a",
                "config_name": "b",
                "split": "train[:9]",
                "prompt_column": "p",
                "prompt_field": "p",
                "chosen_column": "c",
                "rejected_column": "r",
                "trust_remote_code": False,
                "limit": 3,
            },
            {"prompt": "p", "chosen": "c", "rejected": "r"},
        ),
        ("kto", {"examples": [{"a": 1}], "label_field": "a"}, {"label": "a"}),
        ("ppo", {"type": "dataset", "url": "a", "query_field": "q"}, {"prompt": "q"}),
        ("grpo", {"type": "list", "items": ["a"], "metadata": [{"answer": 1}]}, {}),
    ],
)
def test_columns_may_be_named_in_several_ways(
    task_type: str, data: dict[str, Any], columns: dict[str, str]
) -> None:
    assert parse(task_type, data=data).data.columns == columns


def test_answers_that_are_not_there_cannot_be_learned() -> None:
    training = {"completion_only_loss": True}
    chats = {"prompts": [[{"role": "user", "content": "a"}]]}
    assert parse("sft", data=chats, training=training).training.completion_only_loss
    for data in ({"prompts": ["a"]}, {"jsonl_path": "x", "text_field": "t"}):
        with pytest.raises(ContractError, match="completion_only_loss needs prompts with answers"):
            parse("sft", data=data, training=training)


@pytest.mark.parametrize("task_type", [name for name in ALL if name != "sft"])
def test_adapters_are_trained_where_peft_can(task_type: str) -> None:
    lora = {"lora_alpha": 8, "lora_dropout": 0, "target_modules": "c_attn", "use_rslora": True}
    block = parse(task_type, lora=lora).lora
    assert block is not None
    assert (block.r, block.alpha, block.dropout, block.target_modules) == (16, 8, 0, ["c_attn"])
    with pytest.raises(ContractError, match=r"spec\.lora\.dropout must be less than 1"):
        parse(task_type, lora={"dropout": 1})


def test_lora_has_the_defaults_of_the_contract() -> None:
    block = parse("lora_sft").lora
    assert block is not None
    assert (block.r, block.alpha, block.dropout, block.bias) == (16, 32, 0.05, "none")
    assert block.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert parse("dpo").lora is None


@pytest.mark.parametrize(
    "reward",
    [
        "acme.tone",
        ["acme.tone"],
        {"name": "acme.tone"},
        [{"name": "acme.tone"}],
        {"function": "acme.tone"},
        {"function": ["acme.tone"]},
    ],
)
def test_a_reward_may_be_written_shortly(reward: Any) -> None:
    (entry,) = parse("grpo", reward=reward).reward
    assert (entry.name, entry.weight, entry.options) == ("acme.tone", 1.0, {})


def test_a_reward_keeps_its_weight_and_options() -> None:
    reward = {"function": "length", "weight": 0.5, "options": {"target": 20}}
    (entry,) = parse("grpo", reward=reward).reward
    assert (entry.weight, entry.options) == (0.5, {"target": 20})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"function": "length", "options": {"target": 0}}, r"reward\[0\]\.options\.target must"),
        ([{"name": "regex", "options": {"patern": "x"}}], "unknown key 'patern', did you mean"),
        ([{"name": "acme", "wieght": 2}], "unknown key 'wieght', did you mean 'weight'"),
        ([{"weight": 2}], r"reward\[0\]\.name is required"),
        ({"name": "length", "options": {"target": 5, "max": 3}}, "either target is required, or"),
        (
            {"name": "regex", "options": {"pattern": "("}},
            r"pattern must be a regular expression, got '\('",
        ),
        ({"name": "contains", "options": {"texts": ["a"], "x": 1}}, "unknown key 'x'"),
        ({"name": "repetition", "weight": math.nan}, r"reward\[0\]\.weight must be .*finite"),
        (3, r"reward\[0\] must be an object"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(reward: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse("grpo", reward=reward)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "must have either source or identifier"),
        ({"identifier": "a", "source": {"type": "task"}}, "must have either source or identifier"),
        ({"identifier": "a", "max_length": 513}, "max_length must be less than or equal to 512"),
        ({"identifier": "a", "type": "regression"}, "type must be 'classification' or 'sentiment'"),
        ({"identifer": "a"}, "unknown key 'identifer', did you mean 'identifier'"),
    ],
)
def test_a_reward_model_that_cannot_be_is_refused(block: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        parse("ppo", reward_model=block)


@pytest.mark.parametrize("task_type", ALL)
def test_a_spec_can_be_described_as_a_json_schema(task_type: str) -> None:
    schema = json.dumps(SPECS[task_type].model_json_schema())
    assert "learning_rate" in schema


def test_no_table_lacks_a_task_type() -> None:
    tables: list[Mapping[str, Any]] = [SPECS, CONFIGS, ROLES]
    assert {tuple(sorted(table)) for table in tables} == {tuple(sorted(SPECS))}
