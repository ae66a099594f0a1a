"""Tells from a model's own files how the vectors of its tokens become one; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flowmesh_core import InputError
from flowmesh_transformers.spec import Pooling

__all__ = ["choose_pooling"]

# The files of sentence-transformers, which most embedding models are published with.
_STEPS = "modules.json"
_POOLING = "1_Pooling/config.json"
_KNOWN = ("Transformer", "Pooling", "Normalize")
_MODES: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


def choose_pooling(read: Callable[[str], Any]) -> Pooling:
    """Return what the model was trained with, ``mean`` when its files do not say.

    Args:
        read: Gives the JSON of a file of the model, None without it.

    Raises:
        InputError: The model does more to its vectors than can be done here.
    """
    for step in read(_STEPS) or ():
        kind = str(step.get("type", "")).rpartition(".")[2]
        if kind not in _KNOWN:
            raise InputError(
                f"model.source: the embedding model has a step {kind!r}, which transformers alone "
                "cannot do; set model.transformers.pooling to go without it"
            )
    config = read(_POOLING)
    if not config:
        return "mean"
    found = [mode for key, mode in _MODES.items() if config.get(key)]
    named = _NAMES.get(config.get("pooling_mode", ""))
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(found or [named]) == 1 and len(others) <= 1 and (found or named):
        return found[0] if found else named or "mean"
    raise InputError(
        f"model.source: {_POOLING} asks for a pooling that is none of mean, last, cls; set "
        "model.transformers.pooling to choose one of them"
    )
