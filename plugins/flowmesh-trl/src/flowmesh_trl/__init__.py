"""Training for flowmesh with TRL: fine-tuning, preferences, rewards, on CPU or GPU."""

__version__ = "0.1.0"
