from __future__ import annotations

from typing import Any

import pytest
from flowmesh_vllm.sampling import build_sampling
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core import InferenceParams

CHANCE = {"top_k", "top_p", "min_p", "seed"}


def build(seed: int | None = 7, **inference: Any) -> dict[str, Any]:
    return build_sampling(InferenceParams.model_validate(inference), seed)


def test_every_field_goes_where_vllm_has_it() -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.1,
        "max_tokens": 9,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.4,
        "stop": ["\n", "end"],
        "logprobs": 3,
    }
    assert build(**given) == {**given, "seed": 7, "structured_outputs": None}


def test_what_is_not_said_has_the_contracts_defaults() -> None:
    assert build(None) == {
        "temperature": 0.7,
        "top_k": 0,  # vLLM's word for all
        "top_p": 0.95,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 512,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": [],
        "logprobs": None,
        "structured_outputs": None,
    }


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"do_sample": False}])
def test_a_greedy_answer_leaves_nothing_to_chance(greedy: dict[str, Any]) -> None:
    found = build(top_k=5, top_p=0.5, min_p=0.2, presence_penalty=1.5, **greedy)
    assert found["temperature"] == 0.0
    assert not CHANCE & found.keys()
    assert found["presence_penalty"] == 1.5  # counts for the likeliest token too


@pytest.mark.parametrize(("asked", "given"), [(-1, 0), (0, 0), (1, 1), (50, 50)])
def test_no_limit_on_tokens_is_a_zero(asked: int, given: int) -> None:
    assert build(top_k=asked)["top_k"] == given


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        ({}, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "schema": {"type": "array"}}, {"json": {"type": "array"}}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
            {"json": {"type": "array"}},
        ),
        ({"type": "regex", "regex": "[a-c]+"}, {"regex": "[a-c]+"}),
        ({"type": "choice", "choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"type": "regex", "regex": "x", "choice": ["a"]}, {"regex": "x"}),
    ],
)
def test_a_form_is_exactly_one_of_those_that_vllm_has(form: Any, bound: Any) -> None:
    assert build(response_format=form)["structured_outputs"] == bound


@given(
    st.floats(min_value=0, max_value=2),
    st.none() | st.booleans(),
    st.none() | st.integers(min_value=0, max_value=2**32 - 2),
)
def test_a_seed_is_given_when_chance_decides_and_only_then(
    temperature: float, do_sample: bool | None, seed: int | None
) -> None:
    found = build(seed, temperature=temperature, do_sample=do_sample)
    if temperature == 0 or do_sample is False:
        assert found["temperature"] == 0.0
        assert "seed" not in found
    else:
        assert found["temperature"] == temperature
        assert found["seed"] == seed
