from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flowmesh_trl.resume import (
    adopt,
    discard_checkpoints,
    find_checkpoint,
    fingerprint,
    latest_whole,
    mark,
    read_batch,
)

SPEC: dict[str, Any] = {
    "taskType": "sft",
    "model": {"source": {"type": "huggingface", "identifier": "tiny"}},
    "data": {"jsonl": {"url": "http://host/rows.jsonl", "headers": {"Authorization": "a"}}},
    "training": {"learning_rate": 1e-3, "num_train_epochs": 2, "save_steps": 10},
    "resources": {"hardware": {"gpu": {"count": 1}}},
}
PRINT = fingerprint(SPEC)


def write_safetensors(path: Path, size_bytes: int = 64) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "weight": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size_bytes))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", bytes(100))


def write_checkpoint(attempt: Path, step: int, **state: Any) -> Path:
    """Write what Trainer leaves of a small model."""
    folder = attempt / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        write_zip(folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, **state}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """An attempt with whole checkpoints at steps 8 and 10."""
    folder = tmp_path / ".t.attempt-1"
    mark(folder, PRINT, batch=4)
    write_checkpoint(folder, 8)
    write_checkpoint(folder, 10)
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_latest_whole_checkpoint_is_found_by_its_number(attempt: Path) -> None:
    (attempt / "checkpoints" / "checkpoint-best").mkdir()
    assert find_checkpoint([attempt], PRINT) == attempt / "checkpoints" / "checkpoint-10"


def test_nothing_is_found_where_nothing_was_left(tmp_path: Path) -> None:
    assert find_checkpoint([], PRINT) is None
    folder = tmp_path / ".t.attempt-1"
    assert find_checkpoint([folder], PRINT) is None
    mark(folder, PRINT, batch=4)
    assert find_checkpoint([folder], PRINT) is None


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("training_args.bin", "trainer_state.json"),
    ],
)
def test_checkpoint_with_a_file_cut_off_is_passed_over_for_the_one_before(
    attempt: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut(attempt / "checkpoints" / "checkpoint-10" / name)
    assert find_checkpoint([attempt], PRINT) == attempt / "checkpoints" / "checkpoint-8"
    assert f"checkpoint-10 is not whole, passed over: {name}" in caplog.text


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "weights"),
        ("optimizer.pt", "optimizer state"),
        ("scheduler.pt", "scheduler state"),
        ("rng_state.pth", "random states"),
        ("trainer_state.json", "trainer_state.json"),
    ],
)
def test_checkpoint_without_a_part_is_passed_over(
    attempt: Path, name: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    (attempt / "checkpoints" / "checkpoint-10" / name).unlink()
    assert find_checkpoint([attempt], PRINT) == attempt / "checkpoints" / "checkpoint-8"
    assert f"no {what}" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x10" + bytes(7) + b"{" * 16])
def test_weights_without_a_header_are_not_whole(attempt: Path, content: bytes) -> None:
    (attempt / "checkpoints" / "checkpoint-10" / "model.safetensors").write_bytes(content)
    assert find_checkpoint([attempt], PRINT) == attempt / "checkpoints" / "checkpoint-8"


def test_every_shard_of_the_index_must_be_there(
    attempt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = attempt / "checkpoints" / "checkpoint-10"
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        write_safetensors(folder / shard)
    index = {"weight_map": dict(zip(("a", "b"), shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_checkpoint([attempt], PRINT) == folder
    (folder / shards[1]).unlink()
    assert find_checkpoint([attempt], PRINT) == attempt / "checkpoints" / "checkpoint-8"
    assert f"no {shards[1]}" in caplog.text


def test_adapters_and_several_ranks_are_whole_too(attempt: Path) -> None:
    folder = attempt / "checkpoints" / "checkpoint-10"
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    write_zip(folder / "rng_state_1.pth")
    assert find_checkpoint([attempt], PRINT) == folder
    cut(folder / "rng_state_1.pth")
    assert find_checkpoint([attempt], PRINT) != folder


def test_other_training_is_not_gone_on_with(
    attempt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = fingerprint(SPEC | {"training": {"learning_rate": 2e-3}})
    assert find_checkpoint([attempt], other) is None
    assert "is of another model, data or training" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": 1}'])
def test_unreadable_mark_is_no_match(attempt: Path, content: str) -> None:
    (attempt / "checkpoints" / "flowmesh.json").write_text(content)
    assert find_checkpoint([attempt], PRINT) is None


def test_run_that_was_committed_is_not_gone_on_with(
    attempt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (attempt / "final_model").mkdir()
    (attempt / "training_metrics.json").write_text("{}")
    assert find_checkpoint([attempt], PRINT) is not None  # its delivery failed
    final = attempt.rename(tmp_path / "t")
    assert find_checkpoint([final], PRINT) is None
    assert "reached its end" in caplog.text


def test_attempts_are_looked_through_for_the_first_with_a_whole_checkpoint(
    attempt: Path, tmp_path: Path
) -> None:
    mark(tmp_path / ".t.attempt-3", PRINT, batch=4)
    write_checkpoint(tmp_path / ".t.attempt-2", 9)  # of nobody knows what
    folders = [tmp_path / f".t.attempt-{number}" for number in (4, 3, 2, 1)]
    assert find_checkpoint(folders, PRINT) == attempt / "checkpoints" / "checkpoint-10"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"batch": "4"}'])
def test_batch_that_nobody_said_is_none(attempt: Path, content: str) -> None:
    checkpoint = attempt / "checkpoints" / "checkpoint-8"
    assert read_batch(checkpoint) == 4
    (attempt / "checkpoints" / "flowmesh.json").write_text(content)
    assert read_batch(checkpoint) == 0


def test_stale_checkpoints_do_not_outlive_the_choice_of_another(
    attempt: Path, tmp_path: Path
) -> None:
    cut(attempt / "checkpoints" / "checkpoint-10" / "optimizer.pt")
    whole = attempt / "checkpoints" / "checkpoint-8"
    assert adopt(whole, attempt) == whole
    assert {path.name for path in whole.parent.iterdir()} == {"checkpoint-8", "flowmesh.json"}
    second = tmp_path / ".t.attempt-2"
    cut(write_checkpoint(second, 8) / "model.safetensors")
    write_checkpoint(second, 12)
    assert adopt(whole, second) == latest_whole(second / "checkpoints")
    discard_checkpoints(second)
    assert latest_whole(second / "checkpoints") is None


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"source": {"identifier": "other"}}},
        {"data": {"prompts": ["a", {"headers": 1}]}},
        {"training": {"learning_rate": 1e-3, "num_train_epochs": 3}},
        {"lora": {"r": 4}},
        {"taskType": "dpo"},
        {"reward_model": {"identifier": "judge"}},
    ],
)
def test_fingerprint_tells_what_is_learnt_apart(change: dict[str, Any]) -> None:
    assert fingerprint(SPEC | change) != PRINT


def test_fingerprint_is_deaf_to_what_does_not_change_the_weights() -> None:
    training = {**SPEC["training"], "save_steps": 5, "logging_steps": 1, "report_to": "wandb"}
    jsonl = {**SPEC["data"]["jsonl"], "headers": {"Authorization": "b"}, "timeoutSec": 9}
    reordered = dict(reversed(SPEC.items()))
    same = {"training": training, "data": {"jsonl": jsonl}, "resources": {}, "output": {"a": 1}}
    assert fingerprint(reordered | same | {"lora": None}) == PRINT


def test_rows_that_differ_in_a_column_named_headers_are_other_data() -> None:
    one, two = ({"data": {"examples": [{"headers": text}]}} for text in "ab")
    assert fingerprint(SPEC | one) != fingerprint(SPEC | two)


def test_adopted_checkpoint_takes_no_space_and_outlives_its_attempt(
    attempt: Path, tmp_path: Path
) -> None:
    second, third = tmp_path / ".t.attempt-2", tmp_path / ".t.attempt-3"
    source = attempt / "checkpoints" / "checkpoint-10"
    adopted = adopt(source, second)
    assert adopted == second / "checkpoints" / "checkpoint-10"
    assert (adopted / "model.safetensors").samefile(source / "model.safetensors")
    assert {path.name for path in adopted.iterdir()} == {path.name for path in source.iterdir()}
    assert {path.name for path in adopted.parent.iterdir()} == {"checkpoint-10", "flowmesh.json"}
    shutil.rmtree(attempt)
    assert find_checkpoint([second], PRINT) == adopted
    assert find_checkpoint([third.parent / second.name], PRINT) == adopt(adopted, second)
    assert find_checkpoint([third], PRINT) is None
    adopt(adopted, third)
    assert find_checkpoint([third], PRINT) == third / "checkpoints" / "checkpoint-10"


def test_new_state_of_the_adopted_checkpoint_leaves_the_old_one_alone(
    attempt: Path, tmp_path: Path
) -> None:
    checkpoints = attempt / "checkpoints"
    best = checkpoints / "checkpoint-8"
    source = write_checkpoint(attempt, 12, best_model_checkpoint=str(best))
    adopted = adopt(source, tmp_path / ".t.attempt-2")
    state = json.loads((adopted / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(adopted.parent / "checkpoint-8")
    assert (adopted.parent / "checkpoint-8" / "model.safetensors").is_file()
    assert not (adopted.parent / "checkpoint-10").exists()
    old = json.loads((source / "trainer_state.json").read_text())
    assert old["best_model_checkpoint"] == str(best)


def test_adopting_goes_on_after_it_was_cut_off(attempt: Path, tmp_path: Path) -> None:
    half = tmp_path / ".t.attempt-2" / "checkpoints" / ".checkpoint-10.adopted"
    half.mkdir(parents=True)
    (half / "model.safetensors").touch()
    adopted = adopt(attempt / "checkpoints" / "checkpoint-10", tmp_path / ".t.attempt-2")
    assert find_checkpoint([tmp_path / ".t.attempt-2"], PRINT) == adopted
    assert not half.exists()


def test_file_system_without_links_gets_copies(
    attempt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: str, _target: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = attempt / "checkpoints" / "checkpoint-10"
    adopted = adopt(source, tmp_path / ".t.attempt-2")
    assert find_checkpoint([tmp_path / ".t.attempt-2"], PRINT) == adopted
    assert not (adopted / "model.safetensors").samefile(source / "model.safetensors")


TRAINER = """
import os, signal, sys
from pathlib import Path
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

folder, kill_in, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
save = torch.save

def save_half(content, path, *args, **kwargs):
    save(content, path, *args, **kwargs)
    if kill_in in str(path) and f"checkpoint-{step}" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

class Rows(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        ids = torch.tensor([index, 1, 2, 3])
        return {"input_ids": ids, "labels": ids}

torch.save = save_half
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
arguments = TrainingArguments(
    output_dir=str(folder / "checkpoints"), use_cpu=True, max_steps=3, save_steps=1,
    save_total_limit=2, report_to="none", per_device_train_batch_size=2, disable_tqdm=True,
)
resume = sys.argv[4] if len(sys.argv) > 4 else None
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Rows())
trainer.train(resume_from_checkpoint=resume)
print("reached", trainer.state.global_step)
"""


@pytest.fixture
def trainer() -> Callable[..., subprocess.CompletedProcess[str]]:
    for needed in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", TRAINER, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_trainer_that_was_killed_while_saving_goes_on_from_the_save_before(
    trainer: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first, second = tmp_path / ".t.attempt-1", tmp_path / ".t.attempt-2"
    mark(first, PRINT, batch=4)
    assert trainer(str(first), "optimizer.pt", "3").returncode == -9
    found = find_checkpoint([first], PRINT)
    assert found == first / "checkpoints" / "checkpoint-2"
    assert (first / "checkpoints" / "checkpoint-3").is_dir()
    adopted = adopt(found, second)
    inodes = {path.name: path.stat().st_ino for path in found.iterdir()}
    ended = trainer(str(second), "none", "0", str(adopted))
    assert "reached 3" in ended.stdout, ended.stderr
    assert find_checkpoint([second], PRINT) == second / "checkpoints" / "checkpoint-3"
    assert {path.name: path.stat().st_ino for path in found.iterdir()} == inodes
    assert find_checkpoint([first], PRINT) == found
