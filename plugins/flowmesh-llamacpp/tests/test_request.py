from __future__ import annotations

from typing import Any

import pytest
from flowmesh_llamacpp.request import build_prompt, build_sampling, derive_seed

from flowmesh_core import InferenceParams, Row


def sample(**params: Any) -> dict[str, Any]:
    return build_sampling(InferenceParams.model_validate(params))


def prompt(value: Any, system: str | None = None, *, chat: bool, add: bool = True) -> Any:
    row = Row(index=0, prompt=value, add_system_prompt=add)
    return build_prompt(row, system, chat=chat)


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


def test_a_plain_prompt_gets_the_system_prompt_as_its_first_line() -> None:
    assert prompt("hi", "Be brief", chat=False) == {"prompt": "Be brief\nhi"}
    assert prompt("hi", "Be brief", chat=False, add=False) == {"prompt": "hi"}


def test_chat_gets_the_system_prompt_as_a_message() -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief"}
    assert prompt("hi", "Be brief", chat=True) == {"messages": [system, user]}
    assert prompt([user], "Be brief", chat=True) == {"messages": [system, user]}
    assert prompt([user], "Be brief", chat=True, add=False) == {"messages": [user]}


def test_messages_with_a_system_message_keep_their_own() -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert prompt(own, "theirs", chat=True) == {"messages": own}


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ValueError, match="messages need a chat template"):
        prompt([{"role": "user", "content": "hi"}], chat=False)


def test_rows_and_choices_have_streams_of_their_own() -> None:
    seeds = {derive_seed(7, row, choice) for row in range(50) for choice in range(50)}
    assert len(seeds) == 2500
    assert max(seeds) < 2**32 - 1


def test_choice_i_is_the_first_choice_of_seed_plus_i() -> None:
    assert derive_seed(7, 3, 2) == derive_seed(9, 3, 0)
