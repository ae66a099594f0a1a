from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from flowmesh_sim.spec import FailureBlock, SimulateBlock, SimulateSpec

from flowmesh_core.testing import run_task

README = Path(__file__).parents[1] / "README.md"


def test_everything_has_a_default() -> None:
    assert SimulateSpec.model_validate({}).simulate == SimulateBlock()


@pytest.mark.parametrize(
    ("given", "profile"),
    [
        ("worker", "hyperbolic"),
        ("a", "exponential"),
        ("b", "bounded_exponential"),
        ("exponential", "exponential"),
    ],
)
def test_a_profile_has_two_names(given: str, profile: str) -> None:
    assert SimulateBlock.model_validate({"profile": given}).profile == profile


def test_epochs_may_be_spelt_as_in_a_real_training() -> None:
    assert SimulateBlock.model_validate({"num_train_epochs": 4}).epochs == 4


REFUSED = [
    ({"epoch": 3}, "unknown key 'epoch', did you mean 'epochs'?"),
    ({"epochs": 0}, "spec.simulate.epochs"),
    ({"profile": "steep"}, "spec.simulate.profile"),
    ({"profile": ["a"]}, "spec.simulate.profile"),
    ({"time_scale": -1}, "spec.simulate.time_scale"),
    ({"time_scale": float("inf")}, "spec.simulate.time_scale"),
    ({"epoch_seconds": [2, 1]}, "epoch_seconds must be [least, most], got [2.0, 1.0]"),
    ({"memory_mb": -1}, "spec.simulate.memory_mb"),
    ({"failure": {}}, "spec.simulate.failure.kind"),
    ({"failure": {"kind": "error", "probability": 2}}, "spec.simulate.failure.probability"),
    (
        {"epochs": 3, "failure": {"kind": "error", "at_epoch": 3}},
        "failure.at_epoch must be below epochs, got 3 of 3",
    ),
    (
        {"failure": {"kind": "hang", "signal": "SIGKILL", "code": 3}},
        "code is for exit, signal is for crash; kind is hang",
    ),
]


@pytest.mark.parametrize(("block", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_before_it_runs(block: dict[str, Any], told: str) -> None:
    run = run_task("sim", {"simulate": block, "timeoutSec": 20})
    assert run.error is not None
    assert (run.error.code, run.error.retriable) == ("contract", False)
    assert told in str(run.error)


@pytest.mark.parametrize(
    "extra", [{"kind": "exit", "code": 3}, {"kind": "hang", "deaf": True}, {"kind": "late"}]
)
def test_a_kind_takes_its_own_fields(extra: dict[str, Any]) -> None:
    failure = SimulateBlock.model_validate({"failure": extra}).failure
    assert failure is not None
    assert failure.kind == extra["kind"]


def test_the_readme_has_every_field() -> None:
    text = README.read_text(encoding="utf-8")
    quoted = {
        name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"\w+", code)
    }
    assert {*SimulateBlock.model_fields, *FailureBlock.model_fields} <= quoted
