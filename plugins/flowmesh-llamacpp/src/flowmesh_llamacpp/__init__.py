"""Inference for flowmesh on any CPU with llama.cpp and GGUF weights."""

__version__ = "0.1.0"
