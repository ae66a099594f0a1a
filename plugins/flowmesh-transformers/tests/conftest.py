"""A tiny Llama made on the spot, relatives of it, and contexts to run tasks in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.executor import TransformersExecutor
from flowmesh_transformers.spec import TransformersSpec

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext

Contexts = Callable[..., RunContext]

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black tea"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def make_context(tmp_path: Path) -> Contexts:
    def make(
        prompts: Any = ("hello",),
        model: Path | None = None,
        *,
        task_id: str = "task-1",
        task_type: str = "inference",
        options: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        normalize: bool = True,
        **inference: Any,
    ) -> RunContext:
        raw = {
            "taskType": task_type,
            "model": {"transformers": options or {}},
            "inference": inference,
            "normalize": normalize,
        }
        known: dict[str, Any] = {
            "rows": RowSource.from_prompts(prompts),
            "model": ModelRef(identifier="acme/small", path=model, format="hf"),
        }
        return RunContext(
            task_id=task_id,
            task_type=task_type,
            spec=TransformersSpec.model_validate(raw),
            raw_spec=raw,
            folder=tmp_path,
            clock=time.monotonic,
            inputs=Inputs(**{**known, **(inputs or {})}),
            **(context or {}),
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
        initializer_range=0.4,  # so that answers differ from prompt to prompt
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
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


@pytest.fixture
def executor(tiny: Path, make_context: Contexts) -> Any:
    """An executor with the tiny model loaded."""
    executor = TransformersExecutor()
    executor.load(make_context(model=tiny))
    yield executor
    executor.unload()
