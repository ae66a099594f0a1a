"""Simulated training for flowmesh: load tests and failures on demand, without a GPU."""

__version__ = "0.1.0"
