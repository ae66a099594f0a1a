from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.stores.filters import edge_filter, matches, parse_filter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh_core import InputError

ID = str(uuid.UUID(int=1))


def lets_through(rule: dict[str, Any], payload: dict[str, Any]) -> bool:
    parsed = parse_filter(rule)
    assert parsed is not None
    return matches(parsed, payload, ID)


def test_no_filter_is_none() -> None:
    assert parse_filter(None) is None


@pytest.mark.parametrize("rule", [{}, {"must": []}, {"should": []}, {"must": None}])
def test_an_empty_filter_lets_everything_through(rule: dict[str, Any]) -> None:
    assert lets_through(rule, {})


@pytest.mark.parametrize(
    ("condition", "payload", "expected"),
    [
        ({"key": "a", "match": {"value": 1}}, {"a": True}, False),
        ({"key": "a", "match": {"value": 1}}, {"a": 1.0}, False),
        ({"key": "a", "match": {"value": True}}, {"a": 1}, False),
        ({"key": "a", "match": {"value": "x"}}, {"a": ["y", "x"]}, True),
        ({"key": "a", "match": {"except": [1]}}, {"a": None}, False),
        ({"key": "a", "match": {"except": [1]}}, {}, False),
        ({"key": "a", "match": {"except": [1]}}, {"a": [1, 2]}, True),
        ({"key": "a", "match": {"any": []}}, {"a": 1}, False),
        ({"key": "a", "match": {"text": "B a"}}, {"a": "A, b; c"}, True),
        ({"key": "a", "match": {"text": "b x"}}, {"a": "A, b; c"}, False),
        ({"key": "a", "match": {"text": ""}}, {"a": "b"}, False),
        ({"key": "a", "match": {"text": "1"}}, {"a": 1}, False),
        ({"key": "a.b", "match": {"value": 1}}, {"a": {"b": 1}}, True),
        ({"key": "a.b", "match": {"value": 1}}, {"a": [{"b": 1}]}, False),
        ({"key": "a[].b", "match": {"value": 1}}, {"a": [{"b": 2}, {"b": 1}]}, True),
        ({"key": "a[].b", "match": {"value": 1}}, {"a": {"b": 1}}, False),
        ({"key": "a", "range": {"gt": 1}}, {"a": True}, False),
        ({"key": "a", "range": {"gt": 1}}, {"a": "2"}, False),
        ({"key": "a", "range": {"gt": 1, "lte": 2}}, {"a": [5, 2]}, True),
        ({"key": "a", "range": {"lt": "2024-02-01"}}, {"a": "2024-01-31T23:59:59"}, True),
        ({"key": "a", "range": {"lt": "2024-02-01"}}, {"a": "2024-02-01T00:30:00+01:00"}, True),
        ({"key": "a", "range": {"lt": "2024-02-01"}}, {"a": "no date"}, False),
        ({"key": "a", "range": {"lt": "2024-02-01"}}, {"a": 3}, False),
        ({"key": "a", "is_empty": True}, {"a": []}, True),
        ({"key": "a", "is_empty": False}, {"a": 0}, True),
        ({"key": "a", "is_null": True}, {"a": [1, None]}, True),
        ({"key": "a", "is_null": True}, {}, False),
        ({"is_empty": {"key": "a"}}, {}, True),
        ({"is_null": {"key": "a"}}, {"a": None}, True),
        ({"has_id": [ID.replace("-", "").upper()]}, {}, True),
        ({"has_id": [1]}, {}, False),
    ],
)
def test_conditions_mean_what_qdrant_means(
    condition: dict[str, Any], payload: dict[str, Any], expected: bool
) -> None:
    assert lets_through({"must": [condition]}, payload) is expected
    assert lets_through({"must_not": condition}, payload) is not expected


def test_groups_may_stand_in_groups() -> None:
    inner = {"should": [{"key": "a", "match": {"value": 1}}, {"key": "b", "match": {"value": 2}}]}
    rule = {"must": [inner], "must_not": [{"key": "c", "is_empty": False}]}
    assert lets_through(rule, {"b": 2})
    assert not lets_through(rule, {"b": 2, "c": 0})
    assert not lets_through(rule, {"b": 3})


def test_so_many_conditions_must_hold() -> None:
    some = [{"key": key, "is_empty": False} for key in "abc"]
    rule = {"min_should": {"conditions": some, "min_count": 2}}
    assert lets_through(rule, {"a": 1, "c": 1})
    assert not lets_through(rule, {"a": 1})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"mus": []}, r"search\.filter: unknown key 'mus', did you mean 'must'\?"),
        ({"must": [{"key": "a"}]}, r"must\[0\]: must have exactly one of match, range"),
        (
            {"must": [{"key": "a", "match": {"value": 1, "any": [1]}}]},
            r"must\[0\]\.match: must have exactly one of value, any, except, text",
        ),
        ({"must": [{"key": "a", "match": {"value": 1.5}}]}, r"match\.value: .* got 1\.5"),
        ({"must": [{"key": "a", "match": {"any": [1, "b"]}}]}, r"match\.any: must be a list"),
        (
            {"should": {"key": "a", "range": {}}},
            r"should\[0\]\.range: must have gt, gte, lt or lte",
        ),
        (
            {"must": [{"key": "a", "range": {"gt": 1, "lt": "2024-01-01"}}]},
            r"all of them numbers or all dates",
        ),
        ({"must": [{"key": "a", "range": {"gt": "soon"}}]}, r"range\.gt: .* got 'soon'"),
        ({"must": [{"key": "a", "range": {"gt": float("nan")}}]}, r"range\.gt: .* got nan"),
        ({"must": [{"key": "a[0]", "is_null": True}]}, r"must\[0\]\.key: must be a field such as"),
        ({"must": [{"has_id": ["seven"]}]}, r"has_id\[0\]: .*UUID"),
        ({"must": [{"key": "a", "geo_radius": {}}]}, r"must\[0\]: unknown key 'geo_radius'"),
        ({"min_should": {"conditions": {}, "min_count": 0}}, r"min_should\.min_count: "),
        ({"min_should": {"conditions": [], "min_count": 1}}, r"min_should: must have 1 cond"),
        ({"must": ["a"]}, r"must\[0\]: "),
        ({"must": "a"}, r"search\.filter\.must: "),
    ],
)
def test_what_is_wrong_is_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_filter(rule)


def test_every_fault_is_told() -> None:
    rule = {"must": [{"key": "a"}, {"has_id": ["x"]}], "should": [{"key": "?", "is_null": True}]}
    with pytest.raises(InputError, match=r"must\[0\].*must\[1\]\.has_id.*should\[0\]\.key"):
        parse_filter(rule)


KEYS = st.sampled_from(["a", "b", "a.b", "a[].b", "none"])
VALUES = st.sampled_from([0, 1, 2, True, False, "a", "b c", "straße"])
DATES = ["2024-01-01", "2024-06-01T00:00:00Z", "2024-06-01T01:00:00+02:00"]
LEAVES = VALUES | st.sampled_from([None, 1.0, 2.5, *DATES])
PAYLOADS = st.dictionaries(
    st.sampled_from("ab"),
    LEAVES
    | st.lists(LEAVES, max_size=2)
    | st.dictionaries(st.just("b"), LEAVES, max_size=1)
    | st.lists(st.dictionaries(st.just("b"), LEAVES, max_size=1), max_size=2),
)
LISTS = st.lists(st.integers(0, 2), max_size=2) | st.lists(
    st.sampled_from(["a", "b c"]), max_size=2
)
SIDES = st.sampled_from(["gt", "gte", "lt", "lte"])
RANGES = st.dictionaries(SIDES, st.sampled_from([0, 1, 1.5, 2]), min_size=1, max_size=2)
PERIODS = st.dictionaries(SIDES, st.sampled_from(DATES), min_size=1, max_size=2)
MATCHES = st.one_of(
    VALUES.map(lambda value: {"value": value}),
    LISTS.map(lambda values: {"any": values}),
    LISTS.map(lambda values: {"except": values}),
    st.sampled_from(["", "a", "C b", "STRASSE"]).map(lambda text: {"text": text}),
)
FIELDS = st.one_of(
    st.builds(lambda key, match: {"key": key, "match": match}, KEYS, MATCHES),
    st.builds(lambda key, limits: {"key": key, "range": limits}, KEYS, RANGES | PERIODS),
    st.builds(lambda key, wanted: {"key": key, "is_empty": wanted}, KEYS, st.booleans()),
    st.builds(lambda key, wanted: {"key": key, "is_null": wanted}, KEYS, st.booleans()),
    KEYS.map(lambda key: {"is_empty": {"key": key}}),
    KEYS.map(lambda key: {"is_null": {"key": key}}),
    st.just({"has_id": [ID]}),
)


def _groups(conditions: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(conditions, max_size=2)
    enough = st.builds(
        lambda many, count: {"conditions": many, "min_count": min(count, len(many))},
        st.lists(conditions, min_size=1, max_size=2),
        st.integers(1, 2),
    )
    kinds = {"must": some, "should": some, "must_not": some, "min_should": enough}
    return st.fixed_dictionaries({}, optional=kinds)


RULES = _groups(st.recursive(FIELDS, _groups, max_leaves=4))


@given(RULES, st.lists(PAYLOADS, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_qdrants_own_reading_is_the_same(rule: dict[str, Any], payloads: list[Any]) -> None:
    client = pytest.importorskip("qdrant_client", reason="its local mode is what we compare with")
    models = client.models
    parsed = parse_filter(rule)
    assert parsed is not None
    ids = [str(uuid.UUID(int=number)) for number in range(1, len(payloads) + 1)]
    expected = {one for one, data in zip(ids, payloads, strict=True) if matches(parsed, data, one)}
    with contextlib.closing(client.QdrantClient(":memory:")) as local:
        local.create_collection(
            "d", vectors_config=models.VectorParams(size=1, distance=models.Distance.DOT)
        )
        points = zip(ids, payloads, strict=True)
        local.upsert("d", [models.PointStruct(id=n, vector=[1.0], payload=p) for n, p in points])
        found, _ = local.scroll("d", scroll_filter=models.Filter.model_validate(rule), limit=99)
    assert {record.id for record in found} == expected


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Any]:
    edge = pytest.importorskip("qdrant_edge", reason="the embedded engine is what we compare with")
    params = edge.EdgeVectorParams(size=1, distance=edge.Distance.Dot)
    shard = edge.EdgeShard.create(str(tmp_path / "shard"), edge.EdgeConfig(vectors={"d": params}))
    yield shard
    shard.close()


@given(RULES, st.lists(PAYLOADS, min_size=1, max_size=6))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # emptied for each example
)
def test_the_embedded_engines_reading_is_the_same(
    shard: Any, rule: dict[str, Any], payloads: list[Any]
) -> None:
    import qdrant_edge as edge

    parsed = parse_filter(rule)
    assert parsed is not None
    ids = [str(uuid.UUID(int=number)) for number in range(1, len(payloads) + 1)]
    expected = {one for one, data in zip(ids, payloads, strict=True) if matches(parsed, data, one)}
    points = zip(ids, payloads, strict=True)
    everything = edge.Filter()
    shard.update(edge.UpdateOperation.delete_points_by_filter(everything))
    shard.update(
        edge.UpdateOperation.upsert_points([edge.Point(n, {"d": [1]}, p) for n, p in points])
    )
    found, _ = shard.scroll(edge.ScrollRequest(limit=99, filter=edge_filter(parsed)))
    assert {str(record.id) for record in found} == expected
