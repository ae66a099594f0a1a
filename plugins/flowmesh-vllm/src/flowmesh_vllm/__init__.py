"""Inference, embeddings and endpoints with vLLM, as plugins of flowmesh."""
