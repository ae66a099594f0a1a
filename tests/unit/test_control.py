"""Orders to a worker: two kinds, anything else is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.contract import Control, parse_control
from flowmesh_core.errors import ContractError


@pytest.mark.parametrize(
    ("message", "control"),
    [
        (
            {"type": "CANCEL", "task_id": "a", "reason": "enough"},
            Control(type="CANCEL", task_id="a", reason="enough"),
        ),
        ({"type": "CANCEL", "taskId": 7, "reason": None}, Control(type="CANCEL", task_id="7")),
        ({"type": "DRAIN", "later": {"x": 1}}, Control(type="DRAIN")),
        (
            {"type": "DRAIN", "task_id": "a", "reason": "upgrade"},
            Control(type="DRAIN", reason="upgrade"),
        ),
    ],
)
def test_an_order_is_read(message: dict[str, Any], control: Control) -> None:
    assert parse_control(json.dumps(message).encode()) == control


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"\xff", "message must be JSON in UTF-8: "),
        (b"[]", "message must be a JSON object, got list$"),
        (b"{}", "control message: type must be CANCEL or DRAIN, got None$"),
        (b'{"type": "PAUSE"}', "control message: type must be CANCEL or DRAIN, got 'PAUSE'$"),
        (b'{"type": ["DRAIN"]}', "control message: type must be CANCEL or DRAIN, got list$"),
        (b'{"type": "CANCEL"}', "control message: task_id is required when type is CANCEL$"),
        (
            b'{"type": "CANCEL", "task_id": "../a", "reason": 3}',
            r"control message: task_id must be a plain name .*got '\.\./a'; "
            "reason must be a string, got 3$",
        ),
    ],
)
def test_anything_else_is_refused_with_every_reason(body: bytes, problem: str) -> None:
    with pytest.raises(ContractError, match=f"^{problem}"):
        parse_control(body)


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
order = st.fixed_dictionaries(
    {"type": st.sampled_from(["CANCEL", "DRAIN"]) | any_json},
    optional={"task_id": any_json | st.just("a"), "reason": any_json},
)


@settings(max_examples=200, deadline=None, database=None)
@given(order | any_json)
def test_any_json_is_an_order_or_a_contract_error(value: Any) -> None:
    try:
        control = parse_control(json.dumps(value))
    except ContractError:
        return
    assert control.type in ("CANCEL", "DRAIN")
    assert bool(control.task_id) == (control.type == "CANCEL")
