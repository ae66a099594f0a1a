from __future__ import annotations

import pytest

from flowmesh_core.contract import parse_envelope, parse_message
from flowmesh_core.testing import recorded_messages


@pytest.mark.parametrize("name", recorded_messages())
def test_a_recorded_message_is_one_that_worker_w1_takes(name: str) -> None:
    message = parse_message(recorded_messages()[name])
    assert message["assigned_worker"] == "w1"
    envelope = parse_envelope(message)
    assert envelope.task.task_id


def test_each_spelling_is_there_and_merged_tasks_too() -> None:
    messages = recorded_messages()
    assert {"single", "shard", "attempt", "merge_children", "merged_children"} <= messages.keys()
    envelopes = [parse_envelope(parse_message(body)) for body in messages.values()]
    assert any(envelope.children for envelope in envelopes)
    assert any(b"Gr\xc3\xbc\xc3\x9fe" in body for body in messages.values())


def test_what_is_returned_belongs_to_the_caller() -> None:
    recorded_messages().clear()
    assert recorded_messages()
