"""Draws how the loss went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_loss"]


def draw_loss(history: Sequence[Mapping[str, Any]], file: Path, *, title: str) -> bool:
    """Write a picture of the losses of a training, and of its evaluations.

    Args:
        history: What was logged, each with ``step``.
        file: PNG to write; its folder is made.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    curves = {label: _points(history, key) for key, label in _CURVES.items()}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in curves.items():
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="." if len(points) < 60 else "", label=label)
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return True


_CURVES = {"loss": "training", "eval_loss": "evaluation"}


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry]
