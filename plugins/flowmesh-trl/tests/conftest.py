"""A tiny Llama made on the spot, and jobs that train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_trl.job import TrainingJob

from flowmesh_core import Inputs, ModelRef, RowSource

Jobs = Callable[..., TrainingJob]

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black tea"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def make_job(tmp_path: Path, tiny: Path) -> Jobs:
    """Make jobs on the CPU that train the tiny model."""

    def make(
        task_type: str = "sft",
        rows: Any = (),
        *,
        training: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        folder: str = "attempt",
        inputs: Mapping[str, Any] | None = None,
        model: Path | None = None,
        job: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> TrainingJob:
        records = [{"text": row} if isinstance(row, str) else row for row in rows]
        known: dict[str, Any] = {
            "rows": RowSource.from_records(records),
            "model": ModelRef(identifier="acme/small", path=model or tiny, format="hf"),
        }
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        return TrainingJob(
            task_id="task-1",
            task_type=task_type,
            spec={
                "taskType": task_type,
                "model": {"source": {"identifier": "acme/small"}},
                "data": {"examples": records, **(data or {})},
                "training": {"batch_size": 2, "logging_steps": 1, **(training or {})},
                **spec,
            },
            inputs=Inputs(**{**known, **(inputs or {})}),
            folder=place,
            use_cpu=True,
            **(job or {}),
        )

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    pytest.importorskip("torch")
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"))


def build_tiny_llama(folder: Path) -> Path:
    """Make a Llama of two layers with a tokenizer of its own; what it says means nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # quick enough, and not slowed down by whatever else runs here
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """Train a byte-level tokenizer on one sentence; it has no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=336, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
    )
