from __future__ import annotations

from typing import Any

import pytest
from flowmesh_transformers.pooling import choose_pooling

from flowmesh_core import InputError

STEPS = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling")]


def choose(pooling: Any = None, steps: Any = None) -> str:
    files = {"1_Pooling/config.json": pooling, "modules.json": steps}
    return choose_pooling(lambda name: files[name])


def test_a_model_that_says_nothing_is_averaged() -> None:
    assert choose() == "mean"


@pytest.mark.parametrize(
    ("key", "mode"),
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_lasttoken", "last"),
    ],
)
def test_the_models_own_pooling_is_taken(key: str, mode: str) -> None:
    asked = {"word_embedding_dimension": 8, "pooling_mode_max_tokens": False, key: True}
    assert choose(asked, STEPS) == mode


def test_the_newer_spelling_is_understood() -> None:
    assert choose({"pooling_mode": "lasttoken"}) == "last"


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_any_other_pooling_is_an_error_and_not_the_mean(config: Any) -> None:
    with pytest.raises(InputError, match="asks for a pooling that is none of mean, last, cls"):
        choose(config)


def test_a_further_step_is_an_error_and_not_left_out() -> None:
    with pytest.raises(InputError, match="has a step 'Dense'"):
        choose(None, [*STEPS, {"type": "sentence_transformers.models.Dense"}])
