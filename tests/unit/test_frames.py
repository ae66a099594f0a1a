"""Frames: whatever is sent arrives, however it is cut; what is no frame is refused."""

from __future__ import annotations

import struct
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.places import frames
from flowmesh_core.places.frames import MAX_FRAME_BYTES, Decoder, FrameError, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=10,
)
MESSAGES = st.lists(st.tuples(st.integers(0, 2**32 - 1), JSON), max_size=6)


@given(MESSAGES, st.lists(st.integers(1, 50), min_size=1))
def test_messages_arrive_in_order_however_they_are_cut(
    messages: list[tuple[int, Any]], cuts: list[int]
) -> None:
    sent = b"".join(frame for channel, m in messages for frame in encode(channel, m))
    decoder, received, start = Decoder(), [], 0
    while start < len(sent):
        cut = cuts[start % len(cuts)]
        received += decoder.feed(sent[start : start + cut])
        start += cut
    assert received == messages


@pytest.mark.parametrize("size", [0, 1, MAX_FRAME_BYTES, MAX_FRAME_BYTES * 3 + 7])
def test_no_frame_is_longer_than_64_kib_and_a_long_message_takes_several(size: int) -> None:
    message = {"text": "x" * size}
    pieces = list(encode(7, message))
    assert max(map(len, pieces)) <= MAX_FRAME_BYTES == 65536
    assert len(pieces) == 1 + (size >= MAX_FRAME_BYTES) * (size // MAX_FRAME_BYTES)
    assert Decoder().feed(b"".join(pieces)) == [(7, message)]


def test_long_messages_of_several_channels_may_alternate() -> None:
    long = {channel: str(channel) * 200_000 for channel in (1, 2, 3)}
    lanes = [encode(channel, message) for channel, message in long.items()]
    decoder, received = Decoder(), []
    for frames_of_all in zip_longest(*lanes, fillvalue=b""):
        for frame in frames_of_all:
            received += decoder.feed(frame)
    assert dict(received) == long


def test_a_frame_that_claims_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="a frame must not exceed 65536 bytes, got 65528"):
        Decoder().feed(struct.pack(">II?", 65528, 1, False))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(FrameError, match="a message must be JSON"):
        Decoder().feed(struct.pack(">II?", 3, 1, False) + b"{no")


def test_a_message_that_is_too_long_is_refused_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = list(encode(1, "x" * 200_000))
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 100_000)
    with pytest.raises(FrameError, match="must not exceed 100000 bytes, got 200002; write large"):
        list(encode(1, "x" * 200_000))
    with pytest.raises(FrameError, match="must not exceed 100000 bytes"):
        Decoder().feed(b"".join(pieces))


def test_what_cannot_be_sent_names_its_place() -> None:
    with pytest.raises(TypeError, match=r"outcome\.path"):
        list(encode(1, {"outcome": {"path": object()}}))
