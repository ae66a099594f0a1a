from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from flowmesh_transformers.prompts import Request

from flowmesh_core import ExecutionError, InferenceParams

torch = pytest.importorskip("torch")
from flowmesh_transformers.sampling import Sampler  # noqa: E402 - needs torch

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0]


def request(seed: int | None = None, tokens: Any = (4,), **params: Any) -> Request:
    full = InferenceParams.model_validate({"temperature": 1, "top_p": 1, **params})
    return Request(tokens=list(tokens), limit=9, params=full, seed=seed)


def choose(requests: list[Request], logits: Any = LOGITS, steps: int = 1) -> list[list[int]]:
    sampler = Sampler(requests, "cpu")
    rows = torch.tensor([logits] * len(requests))
    return [sampler.choose(rows) for _ in range(steps)]


def drawn(total: int = 400, **params: Any) -> Counter[int]:
    (tokens,) = choose([request(seed, **params) for seed in range(total)])
    return Counter(tokens)


def test_temperature_zero_and_do_sample_false_take_the_likeliest() -> None:
    assert choose([request(temperature=0), request(do_sample=False)], steps=3) == [[0, 0]] * 3


def test_draws_follow_the_distribution() -> None:
    found = drawn(4000)
    whole = sum(math.exp(value) for value in LOGITS)
    for token, value in enumerate(LOGITS):
        assert found[token] / 4000 == pytest.approx(math.exp(value) / whole, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    assert set(drawn(temperature=1e-50)) == {0}
    flat = drawn(4000, temperature=1e6)
    assert all(flat[token] / 4000 == pytest.approx(0.2, abs=0.03) for token in range(5))


def test_top_k_keeps_that_many_and_minus_one_keeps_all() -> None:
    assert set(drawn(top_k=2, temperature=5)) == {0, 1}
    assert set(drawn(top_k=-1, temperature=5)) == set(range(5))
    assert set(drawn(top_k=0, temperature=5)) == set(range(5))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    # 0.563, 0.207, 0.126, 0.076, 0.028
    assert set(drawn(top_p=0.5)) == {0}
    assert set(drawn(top_p=0.6)) == {0, 1}
    assert set(drawn(top_p=0.8)) == {0, 1, 2}


def test_top_p_counts_what_top_k_has_left() -> None:
    # of the first two alone, the likeliest has 0.73
    assert set(drawn(top_k=2, top_p=0.7)) == {0}
    assert set(drawn(top_k=2, top_p=0.75)) == {0, 1}


def test_min_p_is_a_share_of_the_likeliest() -> None:
    assert set(drawn(min_p=0.3, temperature=1)) == {0, 1}
    assert set(drawn(min_p=1)) == {0}


def test_rows_of_one_batch_may_be_chosen_in_different_ways() -> None:
    mixed = [request(1, temperature=0), request(1, top_k=1), request(1, temperature=1e6)]
    columns = list(zip(*choose(mixed, steps=60), strict=True))
    assert set(columns[0]) == set(columns[1]) == {0}
    assert len(set(columns[2])) == 5


def test_a_rows_draws_depend_on_its_seed_alone() -> None:
    alone = [choose([request(seed)], steps=20) for seed in range(3)]
    together = choose([request(seed) for seed in range(3)], steps=20)
    for place in range(3):
        assert [tokens[place] for tokens in together] == [tokens[0] for tokens in alone[place]]
    assert together == choose([request(seed) for seed in range(3)], steps=20)
    assert alone[0] != alone[1]


def test_rows_that_leave_take_their_streams_and_their_counts_with_them() -> None:
    params = {"presence_penalty": 0.3, "temperature": 2}
    alone = choose([request(2, **params)], steps=10)
    sampler = Sampler([request(seed, **params) for seed in range(3)], "cpu")
    tokens = [sampler.choose(torch.tensor([LOGITS] * 3))[2] for _ in range(4)]
    sampler.keep([0, 2])
    tokens += [sampler.choose(torch.tensor([LOGITS] * 2))[1] for _ in range(6)]
    assert tokens == [chosen[0] for chosen in alone]


def test_without_a_seed_nobody_can_repeat_it() -> None:
    assert choose([request()], steps=40) != choose([request()], steps=40)


def test_penalties_count_the_prompt_and_the_answer() -> None:
    greedy = {"temperature": 0}
    # token 0 stands in the prompt twice: 2 - 0.6 is below the 1.5 of nothing, above 1
    assert choose([request(tokens=[0, 0], frequency_penalty=0.3, **greedy)]) == [[0]]
    assert choose([request(tokens=[0, 0], frequency_penalty=0.6, **greedy)]) == [[1]]
    assert choose([request(tokens=[0, 0], presence_penalty=0.6, **greedy)]) == [[0]]
    assert choose([request(tokens=[0, 0], presence_penalty=1.1, **greedy)]) == [[1]]
    assert choose([request(presence_penalty=1.2, **greedy)], steps=3) == [[0], [1], [0]]
    assert choose([request(frequency_penalty=0.7, **greedy)], steps=5) == [[0], [0], [1], [0], [2]]


def test_repetition_divides_what_is_positive_and_multiplies_the_rest() -> None:
    wanted = request(tokens=[0, 4], repetition_penalty=2.5, temperature=0)
    sampler = Sampler([wanted], "cpu")
    scores = sampler._penalize(torch.tensor([LOGITS]))
    assert scores.tolist() == [[pytest.approx(v) for v in [0.8, 1.0, 0.5, 0.0, -2.5]]]


def test_a_penalty_of_one_row_touches_no_other() -> None:
    rows = [request(tokens=[0], presence_penalty=2, temperature=0), request(temperature=0)]
    assert choose(rows) == [[1, 0]]


def test_ties_go_to_the_first_and_rounding_never_leaves_the_list() -> None:
    assert choose([request(temperature=0)], [1.0, 1.0, 0.0]) == [[0]]
    sampler = Sampler([request(1)], "cpu")
    sampler._streams = [AlwaysLast()]
    assert sampler.choose(torch.tensor([LOGITS])) == [4]
    assert choose([request(1, min_p=0.9)], [-1e9, 5.0, -1e9]) == [[1]]


class AlwaysLast(random.Random):
    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_is_an_error(value: float) -> None:
    with pytest.raises(ExecutionError, match=r"gives no numbers .* try bfloat16 or float32"):
        choose([request()], [0.0, value, 1.0])
