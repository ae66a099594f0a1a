from __future__ import annotations

from typing import Any

import pytest
from flowmesh_transformers.prompts import build_messages, build_text, derive_seed

from flowmesh_core import Row

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief"}


def row(prompt: Any, *, add: bool = True) -> Row:
    return Row(index=0, prompt=prompt, add_system_prompt=add)


def test_a_plain_prompt_gets_the_system_prompt_as_its_first_line() -> None:
    assert build_text(row("hi"), "Be brief") == "Be brief\nhi"
    assert build_text(row("hi"), None) == "hi"
    assert build_text(row("hi", add=False), "Be brief") == "hi"


def test_a_chat_gets_the_system_prompt_as_a_message() -> None:
    assert build_messages(row("hi"), "Be brief") == [SYSTEM, USER]
    assert build_messages(row([USER]), "Be brief") == [SYSTEM, USER]
    assert build_messages(row([USER], add=False), "Be brief") == [USER]


def test_messages_with_a_system_message_keep_their_own() -> None:
    own = [{"role": "system", "content": "mine"}, USER]
    assert build_messages(row(own), "theirs") == own


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ValueError, match="messages need a chat template"):
        build_text(row([USER]), None)


def test_rows_and_choices_have_streams_of_their_own_and_seeds_add_up() -> None:
    streams = {derive_seed(7, index, choice) for index in range(30) for choice in range(30)}
    assert len(streams) == 900
    assert derive_seed(7, 3, 2) == derive_seed(9, 3, 0)
    assert derive_seed(None, 0, 0) is None
