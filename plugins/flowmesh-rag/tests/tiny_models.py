"""Models small enough to be made on the spot, as sentence-transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["build_tiny_embedder", "build_tiny_reranker"]

WORDS = ["a", "and", "cat", "fox", "is", "keeper", "lamp", "of", "quick", "sea", "the", "tower"]
LETTERS = [prefix + chr(code) for code in range(97, 123) for prefix in ("", "##")]


def build_tiny_embedder(folder: Path, *, seed: int = 1) -> Path:
    """Save a BERT of two layers with mean pooling; it reads 32 tokens, vectors have 16 numbers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    raw = _save_bert(folder / "raw", "BertModel", seed)
    inner = Transformer(str(raw), max_seq_length=32)
    SentenceTransformer(modules=[inner, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


def build_tiny_reranker(folder: Path, *, labels: int = 1, seed: int = 2) -> Path:
    """Save a cross-encoder of the same make."""
    return _save_bert(folder, "BertForSequenceClassification", seed, num_labels=labels)


def _save_bert(folder: Path, kind: str, seed: int, **config: Any) -> Path:
    import torch
    import transformers

    torch.set_num_threads(1)  # quick enough, and not slowed down by whatever else runs here
    torch.manual_seed(seed)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *WORDS, *LETTERS]))
    words = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = transformers.BertTokenizer(vocab=words, model_max_length=48)
    tokenizer.save_pretrained(folder)
    shape = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=0.4,
        **config,
    )
    getattr(transformers, kind)(shape).save_pretrained(folder)
    return folder
