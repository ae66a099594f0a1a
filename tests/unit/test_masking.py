from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.masking import SecretMask, mask_sensitive

TEXT = st.text(max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def texts(value: Any) -> list[str]:
    """Return every text in JSON data, keys included."""
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_the_name_comes_back_wherever_the_value_stood() -> None:
    mask = SecretMask({"HF_TOKEN": "hf_abc", "DB": "pg://u:p@h"})
    assert mask.text("401 for hf_abc at pg://u:p@h/x") == "401 for ${env.HF_TOKEN} at ${env.DB}/x"
    data = {"hf_abc": [{"deep": "a hf_abc b"}, 1, None, True], "t": ("hf_abc",)}
    name = "${env.HF_TOKEN}"
    assert mask.value(data) == {name: [{"deep": f"a {name} b"}, 1, None, True], "t": [name]}


def test_a_secret_inside_another_does_not_uncover_the_longer_one() -> None:
    mask = SecretMask({"SHORT": "abc", "LONG": "abc-def"})
    assert mask.text("abc-def abc") == "${env.LONG} ${env.SHORT}"


def test_secrets_are_taken_as_they_are_and_not_as_patterns() -> None:
    mask = SecretMask({"A": "a.c*", "B": "(["})
    assert mask.text("abc a.c* ([") == "abc ${env.A} ${env.B}"


def test_an_empty_secret_masks_nothing() -> None:
    assert SecretMask({"EMPTY": ""}).text("abc") == "abc"


def test_without_secrets_the_very_same_data_comes_back() -> None:
    data = {"a": [1]}
    assert SecretMask({}).value(data) is data


def test_bytes_are_masked_like_text_and_stay_bytes_otherwise() -> None:
    mask = SecretMask({"KEY": "gehéim", "RAW": "a\udcffb"})
    data = "x gehéim ".encode() + b"\xff a\xffb \x00"
    assert mask.data(data) == b"x ${env.KEY} \xff ${env.RAW} \x00"
    assert SecretMask({}).data(data) is data


@given(
    secrets=st.lists(st.text("xy", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    pieces=st.lists(st.text("xyz", max_size=6), max_size=8),
)
def test_data_in_pieces_is_masked_like_the_whole(secrets: list[str], pieces: list[str]) -> None:
    mask = SecretMask({f"N{number}": value for number, value in enumerate(secrets)})
    written, held = b"", b""
    for piece in pieces:
        masked, held = mask.split(held + piece.encode())
        written += masked
        assert len(held) < max(map(len, secrets))
        assert any(value.startswith(held.decode()) for value in secrets)
    assert written + mask.data(held) == mask.data("".join(pieces).encode())


def test_only_an_end_that_may_become_a_secret_is_held_back() -> None:
    mask = SecretMask({"SHORT": "abc", "LONG": "abc-def"})
    assert mask.split(b"a line\n") == (b"a line\n", b"")
    assert mask.split(b"abc abc") == (b"${env.SHORT} ", b"abc")
    assert mask.split(b"abc-def") == (b"${env.LONG}", b"")
    other = SecretMask({"A": "xy", "B": "qrstu"})
    assert other.split(b"xy") == (b"${env.A}", b"")
    assert SecretMask({}).split(b"abc") == (b"abc", b"")


@given(data=JSON, secret=st.text("xyz", min_size=1, max_size=3))
def test_no_text_holds_the_secret_afterwards(data: Any, secret: str) -> None:
    masked = SecretMask({"NAME": secret}).value(data)
    assert not [text for text in texts(masked) if secret in text.replace("${env.NAME}", "|")]


@pytest.mark.parametrize(
    "key",
    [
        *("Authorization", "authorization", "Cookie", "set-cookie", "password", "passwd"),
        *("secret", "client_secret", "AWS_SECRET_ACCESS_KEY", "access_key", "private-key"),
        *("api_key", "apiKey", "X-Api-Key", "token", "hf_token", "credentials"),
    ],
)
def test_values_under_telling_names_are_masked(key: str) -> None:
    assert mask_sensitive({"a": [{key: "value"}]}) == {"a": [{key: "***"}]}


@pytest.mark.parametrize(
    ("data", "masked"),
    [
        ({"headers": {"X-Team": "a"}}, {"headers": {"X-Team": "***"}}),
        ({"download_headers": {"A": "b"}}, {"download_headers": {"A": "***"}}),
        (
            {"secrets": {"OPENAI": "sk", "n": [1, 2]}},
            {"secrets": {"OPENAI": "***", "n": ["***"] * 2}},
        ),
        ({"tokens": ["a"], "password": ["b"]}, {"tokens": ["a"], "password": ["***"]}),
        ({"password": 1234}, {"password": "***"}),
    ],
)
def test_all_that_stands_below_a_telling_name_is_masked(data: Any, masked: Any) -> None:
    assert mask_sensitive(data) == masked


@pytest.mark.parametrize(
    "data",
    [
        {"max_tokens": 64, "tokenizer": "t", "prompt": "my secret is out"},
        {"token": None, "use_token": False},
        {"token": "${env.HF_TOKEN}", "headers": {"Authorization": "${stage.result.key}"}},
    ],
)
def test_what_is_no_secret_stays(data: Any) -> None:
    assert mask_sensitive(data) == data


@pytest.mark.parametrize("value", ["${env.A}sk-real", "Bearer ${env.A}", "${env.A}${x"])
def test_only_a_whole_reference_is_taken_for_one(value: str) -> None:
    assert mask_sensitive({"token": value}) == {"token": "***"}


@given(data=JSON)
def test_masking_changes_no_shape_and_not_its_argument(data: Any) -> None:
    before = repr(data)
    once = mask_sensitive({"spec": data})
    assert mask_sensitive(once) == once
    assert repr(data) == before
    assert list(once) == ["spec"]
