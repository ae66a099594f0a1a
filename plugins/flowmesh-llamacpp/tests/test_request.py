from __future__ import annotations

from typing import Any

import pytest
from flowmesh_llamacpp.request import build_sampling

from flowmesh_core import InferenceParams


def sample(**params: Any) -> dict[str, Any]:
    return build_sampling(InferenceParams.model_validate(params))


def test_only_cuts_that_cut_are_asked_for() -> None:
    assert sample(top_p=1)["samplers"] == ["temperature"]
    every = sample(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    assert every["samplers"] == ["penalties", "temperature", "top_k", "top_p", "min_p"]


def test_top_k_of_minus_one_is_off_in_llama_cpps_spelling() -> None:
    assert sample()["top_k"] == 0


@pytest.mark.parametrize("params", [{"temperature": 0}, {"do_sample": False}])
def test_greedy_keeps_the_penalties_and_nothing_else(params: Any) -> None:
    assert sample(**params)["samplers"] == ["top_k"]
    assert sample(**params, presence_penalty=1)["samplers"] == ["penalties", "top_k"]
