from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.wire import value_at

NAMES = st.sampled_from(["a", "b", "apply", "steps"])
WORDS = st.sampled_from(["merge", "runtime", "", "x"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=15,
)
DOCUMENTS = st.dictionaries(NAMES, ANY_JSON, max_size=4)
ENTRIES = st.lists(st.dictionaries(NAMES, ANY_JSON, max_size=3) | ANY_JSON, max_size=6)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", {"b": {"c": 0}, "n": None}),
        ("a.b.c", 0),
        ("a.n", None),
        ("a.b.c.d", None),
        ("a.gone.c", None),
        ("gone", None),
        ("steps", [{"kind": "x"}, {"kind": "y"}, 3, {"kind": "x", "n": 1}]),
        ("steps[kind=x]", [{"kind": "x"}, {"kind": "x", "n": 1}]),
        ("steps[kind=y]", [{"kind": "y"}]),
        ("steps[kind=]", None),
        ("steps[kind=z]", None),
        ("steps[n=1]", None),  # a number is no text
        ("gone[kind=x]", None),
        ("a[kind=x]", None),
        ("a.b[c=0]", None),
        ("steps.kind", None),
    ],
)
def test_a_path_leads_to_a_value_or_to_nothing(path: str, found: Any) -> None:
    steps = [{"kind": "x"}, {"kind": "y"}, 3, {"kind": "x", "n": 1}]
    assert value_at({"a": {"b": {"c": 0}, "n": None}, "steps": steps}, path) == found


@given(ENTRIES, NAMES, st.sampled_from(["merge", "runtime", "x"]))
def test_a_condition_picks_the_entries_that_meet_it_in_their_order(
    entries: list[Any], name: str, wanted: str
) -> None:
    met = [one for one in entries if isinstance(one, dict) and one.get(name) == wanted]
    assert value_at({"m": {"list": entries}}, f"m.list[{name}={wanted}]") == (met or None)


@given(ENTRIES, ENTRIES)
def test_entries_that_do_not_meet_it_change_nothing(ours: list[Any], others: list[Any]) -> None:
    path = "list[apply=merge]"
    beside = [one for one in others if not (isinstance(one, dict) and one.get("apply") == "merge")]
    alone = value_at({"list": ours}, path)
    assert value_at({"list": [*ours, *beside]}, path) == alone
    assert value_at({"list": [*beside, *ours]}, path) == alone


@given(
    DOCUMENTS,
    st.lists(NAMES | NAMES.map(lambda name: f"{name}[apply=merge]"), min_size=1, max_size=4),
)
def test_no_document_makes_a_path_fail(document: dict[str, Any], parts: list[str]) -> None:
    found = value_at(document, ".".join(parts))
    if parts[-1].endswith("]") and found is not None:
        assert found
        assert all(one["apply"] == "merge" for one in found)


@given(DOCUMENTS, st.lists(NAMES, min_size=1, max_size=4))
def test_a_plain_path_walks_through_objects_alone(
    document: dict[str, Any], parts: list[str]
) -> None:
    value: Any = document
    for part in parts:
        value = value.get(part) if isinstance(value, dict) else None
    assert value_at(document, ".".join(parts)) == value
