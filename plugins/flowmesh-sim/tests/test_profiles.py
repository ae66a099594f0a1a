from __future__ import annotations

import pytest
from flowmesh_sim.profiles import PROFILES, Epoch, measure, measure_seconds
from hypothesis import given, settings
from hypothesis import strategies as st

CURVES = [(profile, model) for profile, models in PROFILES.items() for model in models]
curves = st.sampled_from(CURVES)
epochs = st.integers(0, 100_000)
seeds = st.integers(-(10**12), 10**12)

# Worked out by hand: profile, model type, epoch, least and most loss.
LOSSES = [
    ("hyperbolic", "xgboost", 0, 2.45, 2.55),
    ("hyperbolic", "neural_network", 5, 1.2, 1.3),  # 2.5 / 2
    ("hyperbolic", "random_forest", 9, 0.842857, 0.942857),  # 2.5 / 2.8
    ("exponential", "neural_network", 0, 2.5, 2.6),
    ("exponential", "neural_network", 10, 0.919699, 1.019699),  # 2.5 / e
    ("exponential", "xgboost", 5, 0.367879, 0.417879),  # 1 / e
    ("exponential", "random_forest", 10, 0.178504, 0.208504),  # 0.8 exp(-1.5)
    ("bounded_exponential", "neural_network", 10, 1.103638, 1.203638),  # 3 / e
    ("bounded_exponential", "xgboost", 10, 0.099574, 0.149574),  # 2 exp(-3)
    ("bounded_exponential", "random_forest", 5, 0.551819, 0.581819),  # 1.5 / e
]


@pytest.mark.parametrize(("profile", "model_type", "epoch", "least", "most"), LOSSES)
def test_the_loss_is_that_of_the_formula(
    profile: str, model_type: str, epoch: int, least: float, most: float
) -> None:
    losses = [measure(profile, model_type, seed, epoch).loss for seed in range(200)]
    assert least - 1e-6 <= min(losses) < least + 0.1 * (most - least)
    assert most + 1e-6 >= max(losses) > most - 0.1 * (most - least)


@pytest.mark.parametrize(
    ("profile", "model_type", "offset", "divisor"),
    [
        ("exponential", "neural_network", 1.0, 2.5),
        ("exponential", "xgboost", 1.0, 1.5),
        ("exponential", "random_forest", 0.95, 2.0),
        ("bounded_exponential", "random_forest", 0.95, 2.0),
    ],
)
def test_the_accuracy_follows_from_the_loss(
    profile: str, model_type: str, offset: float, divisor: float
) -> None:
    one = measure(profile, model_type, 3, 6)
    assert one.accuracy == pytest.approx(offset - one.loss / divisor, abs=2e-6)


def test_accuracies_with_a_formula_of_their_own() -> None:
    by_hand = {0: (0.09, 0.11), 5: (0.49, 0.51), 9: (0.81, 0.83), 12: (0.99, 0.99)}
    for epoch, (least, most) in by_hand.items():
        found = [measure("hyperbolic", "xgboost", seed, epoch).accuracy for seed in range(50)]
        assert least <= min(found) <= max(found) <= most, epoch
    # 0.9 (1 - exp(-2)) has no noise; 0 at the first epoch is raised to the least.
    assert measure("bounded_exponential", "neural_network", 1, 10).accuracy == 0.778198
    assert measure("bounded_exponential", "neural_network", 1, 0).accuracy == 0.1
    noise = [one.accuracy - (1 - one.loss / 2.5) for one in _many("bounded_exponential", "xgboost")]
    assert -1e-6 <= min(noise) < 0.002
    assert 0.018 < max(noise) <= 0.02 + 1e-6


def _many(profile: str, model_type: str) -> list[Epoch]:
    return [measure(profile, model_type, seed, 4) for seed in range(200)]


@settings(deadline=None)
@given(curves, epochs, seeds)
def test_no_epoch_leaves_its_bounds(curve: tuple[str, str], epoch: int, seed: int) -> None:
    one = measure(*curve, seed, epoch)
    least = {"hyperbolic": 0.08, "exponential": 0.0, "bounded_exponential": 0.1}[curve[0]]
    most = {"hyperbolic": 1.0, "exponential": 1.0, "bounded_exponential": 0.99}[curve[0]]
    assert least <= one.accuracy <= most
    assert (0.01 if curve[0] == "bounded_exponential" else 0) <= one.loss < 3.2
    assert one.epoch == epoch


def test_what_falls_below_nothing_becomes_the_least() -> None:
    losses = {measure("hyperbolic", "xgboost", seed, 100_000).loss for seed in range(20)}
    assert 0.01 in losses  # half of the noise is below 0
    assert min(losses) >= 0
    worst = [measure("bounded_exponential", "xgboost", seed, 100_000) for seed in range(200)]
    assert min(one.loss for one in worst) == 0.01


@settings(deadline=None)
@given(curves, st.integers(0, 10), seeds)  # later ones may all be the least
def test_equal_seeds_give_equal_epochs_and_others_do_not(
    curve: tuple[str, str], epoch: int, seed: int
) -> None:
    assert measure(*curve, seed, epoch) == measure(*curve, seed, epoch)
    others = {measure(*curve, seed + 1 + n, epoch).loss for n in range(8)}
    assert len(others) > 1


def test_a_curve_is_the_same_on_every_machine_and_python() -> None:
    found = [measure("exponential", "xgboost", 7, epoch) for epoch in (0, 5, 12)]
    assert [(one.loss, one.accuracy) for one in found] == [
        (1.03507, 0.309953),
        (0.399807, 0.733462),
        (0.112143, 0.925238),
    ]


def test_each_epoch_has_a_noise_of_its_own() -> None:
    noise = {measure("exponential", "xgboost", 7, epoch).loss for epoch in range(1000, 1020)}
    assert len(noise) == 20


@settings(deadline=None)
@given(seeds, st.integers(1, 500))
def test_a_training_takes_the_time_of_its_profile(seed: int, count: int) -> None:
    whole = sum(measure_seconds("hyperbolic", epoch, count, seed) for epoch in range(count))
    assert 1.0 - 1e-9 <= whole <= 3.999 + 1e-9
    assert 0.2 <= measure_seconds("exponential", count, count, seed) <= 0.499
    assert 3 <= measure_seconds("hyperbolic", count, count, seed, (3, 4)) <= 4
    assert measure_seconds("exponential", count, count, seed, (0, 0)) == 0
