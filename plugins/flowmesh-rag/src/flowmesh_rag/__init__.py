"""Retrieval for flowmesh: index documents, search them by meaning, answer with citations."""

__version__ = "0.1.0"
