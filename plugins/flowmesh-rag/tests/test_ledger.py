"""What a collection has, lacks and has too many."""

from __future__ import annotations

import uuid

from flowmesh_rag.ledger import compare, digest_payload, point_id
from hypothesis import given
from hypothesis import strategies as st

_POINTS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123"))


@given(wanted=_POINTS, present=_POINTS)
def test_the_difference_done_is_the_wished_state(
    wanted: dict[str, str], present: dict[str, str]
) -> None:
    difference = compare(wanted, present)
    after = {**present, **{point: wanted[point] for point in difference.new}}
    after = {point: digest for point, digest in after.items() if point not in difference.stale}
    assert after == wanted
    assert compare(wanted, after).new == compare(wanted, after).stale == frozenset()
    assert difference.unchanged == {
        point for point in wanted if present.get(point) == wanted[point]
    }


def test_a_digest_tells_every_change_and_no_order_of_keys() -> None:
    payload = {"text": "a", "start": 0, "source": "s"}
    base = digest_payload(payload, "model")
    assert digest_payload(dict(reversed(payload.items())), "model") == base
    others = [digest_payload({**payload, key: "x"}, "model") for key in (*payload, "new")]
    assert len({base, digest_payload(payload, "other"), *others}) == 6


def test_a_point_id_is_a_uuid_and_the_same_everywhere() -> None:
    assert point_id("s", 1, "d") == "782d874f-252c-58d4-8a4d-a076d0dbe41a"
    different = {point_id("s", 1, "d"), point_id("s", 2, "d"), point_id("t", 1, "d")}
    assert len({*different, point_id("s", 1, "e")}) == 4
    assert all(uuid.UUID(one).version == 5 for one in different)
