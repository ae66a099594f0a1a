"""Curves of loss and accuracy: pure functions of profile, model type, epoch and seed.

Epochs count from 0. Each has random numbers of its own, so that any epoch can be computed alone,
and a curve goes on after a resume as if nothing had happened.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from math import exp

import attrs

__all__ = ["ALIASES", "PROFILES", "Epoch", "measure", "measure_seconds"]

ALIASES = {"worker": "hyperbolic", "a": "exponential", "b": "bounded_exponential"}

# U(a, b): one more number between a and b.
Draw = Callable[[float, float], float]
# From epoch and draw to loss and accuracy; and to the accuracy, when the loss is known.
Curve = Callable[[int, Draw], tuple[float, float]]
Follow = Callable[[int, float, Draw], float]


@attrs.frozen
class Epoch:
    """What one epoch ended with; ``epoch`` counts from 0."""

    epoch: int
    loss: float
    accuracy: float


def _hyperbolic(epoch: int, draw: Draw) -> tuple[float, float]:
    loss = 2.5 / (1 + 0.2 * epoch) + draw(-0.05, 0.05)
    accuracy = 0.1 + 0.08 * epoch + draw(-0.01, 0.01)
    return (0.01 if loss < 0 else loss), (0.99 if accuracy > 1 else accuracy)


def _exponential(
    start: float, rate: float, noise: float, follow: Follow, *, bounded: bool = False
) -> Curve:
    """Return the curve of ``start * exp(-rate * epoch) + U(0, noise)`` and what follows."""
    least_loss, least, most = (0.01, 0.1, 0.99) if bounded else (0.0, 0.0, 1.0)

    def curve(epoch: int, draw: Draw) -> tuple[float, float]:
        loss = max(least_loss, start * exp(-rate * epoch) + draw(0, noise))
        return loss, min(most, max(least, follow(epoch, loss, draw)))

    return curve


_bounded = partial(_exponential, bounded=True)
_EXPONENTIAL = {
    "neural_network": _exponential(2.5, 0.1, 0.1, lambda _e, loss, _u: 1 - loss / 2.5),
    "xgboost": _exponential(1.0, 0.2, 0.05, lambda _e, loss, _u: 1 - loss / 1.5),
    "random_forest": _exponential(0.8, 0.15, 0.03, lambda _e, loss, _u: 0.95 - loss / 2),
}
_BOUNDED = {
    "neural_network": _bounded(3.0, 0.1, 0.1, lambda e, _l, _u: 0.9 * (1 - exp(-0.2 * e))),
    "xgboost": _bounded(2.0, 0.3, 0.05, lambda _e, loss, u: 1 - loss / 2.5 + u(0, 0.02)),
    "random_forest": _bounded(1.5, 0.2, 0.03, lambda _e, loss, _u: 0.95 - loss / 2),
}
PROFILES: Mapping[str, Mapping[str, Curve]] = {
    "hyperbolic": dict.fromkeys(_EXPONENTIAL, _hyperbolic),
    "exponential": _EXPONENTIAL,
    "bounded_exponential": _BOUNDED,
}


def measure(profile: str, model_type: str, seed: int, epoch: int) -> Epoch:
    """Return loss and accuracy of one epoch, to six places: machines differ in the last ones."""
    loss, accuracy = PROFILES[profile][model_type](epoch, _draw(f"{seed}:{epoch}"))
    return Epoch(epoch, round(loss, 6), round(accuracy, 6))


def measure_seconds(
    profile: str, epoch: int, epochs: int, seed: int, bounds: tuple[float, float] | None = None
) -> float:
    """Return how long an epoch takes: between the bounds, or as the profile has it."""
    if bounds is None and profile == "hyperbolic":  # one draw is for the whole training
        return _draw(f"{seed}:seconds")(1.0, 3.999) / epochs
    return _draw(f"{seed}:{epoch}:seconds")(*(bounds or (0.2, 0.499)))


def _draw(seed: str) -> Draw:
    return random.Random(seed).uniform  # noqa: S311 - reproducible on purpose
