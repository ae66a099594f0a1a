"""Inference and embeddings for flowmesh with Hugging Face Transformers, on CPU or GPU."""

__version__ = "0.1.0"
