"""Every document and message shape of the contract, and whatever else a queue may hold."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flowmesh_core.contract import (
    CommonSpec,
    Envelope,
    Task,
    check_task_id,
    parse_envelope,
    parse_message,
    parse_task,
)
from flowmesh_core.errors import ContractError
from flowmesh_core.testing import recorded_messages
from flowmesh_core.validation import StrictBlock, describe_problems, validate_model
from flowmesh_core.wire import decode_json, encode_json, utc_now

HERE = Path(__file__).parent
DOCUMENTS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted((HERE / "documents").glob("*.yaml"))
}
MESSAGES = recorded_messages()
BROKEN_IDS = [
    *("..", ".", "", ".hidden", "a/b", "../../etc", "a b", "a\0b", "a\n", "é", "a" * 201, "/x"),
    *("\ud800", "a\\b", "~"),
    *(True, False, 1.5, ["a"], {"a": 1}, 10**5000, 10**200),
]

quick = settings(max_examples=150, deadline=None, database=None)
# Lone surrogates, NUL and the empty string included.
any_text = st.text(st.characters(exclude_categories=()), max_size=8)
any_scalar = (
    st.none() | st.booleans() | st.integers() | st.floats() | any_text
    | st.sampled_from([10**4000, -(10**4000), 2**64, "${a.b}", "1" * 5000])
)  # fmt: skip
any_json = st.recursive(
    any_scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=20,
)


def shown(value: Any) -> str:
    try:
        return ascii(value)[:40]
    except ValueError:
        return "huge"


def parse_bytes(body: bytes) -> Envelope:
    return parse_envelope(parse_message(body))


def message(**fields: Any) -> dict[str, Any]:
    return {"task_id": "a", "task": {"spec": {"taskType": "echo"}}, **fields}


def with_spec(**spec: Any) -> dict[str, Any]:
    return message(task={"spec": spec})


def problems_of(raw: Any) -> list[str]:
    with pytest.raises(ContractError, match=r"must|is required|names a task|named by") as caught:
        parse_envelope(raw)
    return list(caught.value.problems)


# Documents and messages.


def test_every_shape_of_the_contract_has_its_document() -> None:
    types = {(doc.get("spec") or {}).get("taskType") for doc in DOCUMENTS.values()}
    assert types >= {
        *("echo", "inference", "vllm", "default", "sft", "lora_sft", "dpo", "ppo", "rag", "agent"),
        None,
    }
    specs = [doc.get("spec") or {} for doc in DOCUMENTS.values()]
    assert {spec["data"].get("type") for spec in specs if "data" in spec} >= {
        *("dataset", "list", "graph_template", "static"),
        None,
    }
    assert any("stages" in spec for spec in specs)
    assert any("graph" in spec for spec in specs)
    spelled = json.dumps([DOCUMENTS, [body.decode() for body in MESSAGES.values()]])
    for word in ("merged_children", "merge_children", "taskId", "task_id", "task_type", "taskType",
                 "system_prompt", "systemPrompt", "max_tokens", "max_new_tokens", "path",
                 "uri"):  # fmt: skip
        assert f'{word}"' in spelled.replace("\\", ""), word


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_parses_and_keeps_its_spec_untouched(name: str) -> None:
    document = DOCUMENTS[name]
    before = copy.deepcopy(document)
    task = parse_task(document, task_id="a")
    assert document == before
    assert task.spec == (before.get("spec") or {})
    assert task.task_type == task.spec.get("taskType", "")
    kept = {key: value for key, value in before.items() if key != "spec"}
    assert task.document == kept
    assert task.metadata == (before.get("metadata") or {})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_parses_the_same_through_the_wire(name: str) -> None:
    body = encode_json({"task_id": "a", "task": DOCUMENTS[name], "assigned_worker": "w"})
    envelope = parse_bytes(body)
    assert envelope.task == parse_task(DOCUMENTS[name], task_id="a")
    assert envelope.tasks == (envelope.task,)


@pytest.mark.parametrize("name", MESSAGES)
def test_message_parses_and_keeps_the_spec_as_it_came(name: str) -> None:
    raw = json.loads(MESSAGES[name])
    before = copy.deepcopy(raw)
    envelope = parse_envelope(raw)
    assert raw == before
    assert envelope == parse_bytes(MESSAGES[name])
    assert envelope.task.spec == (raw["task"].get("spec") or {})
    assert not envelope.rejected
    assert envelope.assigned_worker == raw["assigned_worker"]
    for field in ("dispatched_at", "parent_task_id", "shard_index", "shard_total", "attempt"):
        assert getattr(envelope, field) == raw.get(field)


def test_message_of_the_orchestrator_says_who_when_and_what() -> None:
    envelope = parse_bytes(MESSAGES["single"])
    assert envelope.task.task_id == "75de0c1e-9d0b-4a5c-b6a3-3a2f0f2d9f10"
    assert envelope.task.task_type == "echo"
    assert envelope.task.metadata == {"name": "hello"}
    assert envelope.task.document["apiVersion"] == "mloc/v1"
    assert envelope.dispatched_at == "2026-11-21T01:30:48.745627+00:00"
    assert envelope.children == ()


def test_task_type_is_the_documents_own_whatever_the_message_says() -> None:
    assert parse_envelope(message(task_type="dpo")).task.task_type == "echo"
    assert parse_envelope(with_spec(taskType="Echo")).task.task_type == "Echo"


def test_common_fields_of_the_spec_are_read() -> None:
    task = parse_task(DOCUMENTS["output_http"], task_id="a")
    assert task.destination.type == "http"
    assert task.destination.url == "https://host.example:8000/api/v1/results"
    assert task.destination.headers == {"Authorization": "Bearer abc", "X-Project": "demo"}
    assert task.destination.timeout_s == 60.0
    assert task.common.output.artifacts == [
        "final_model.tar.gz",
        "logs",
        "artifacts/answers.jsonl",
    ]
    shard = parse_task(DOCUMENTS["shard"], task_id="a").common.shard
    assert (shard.index, shard.total, shard.contiguous) == (1, 4, True)
    upstream = parse_task(DOCUMENTS["inference_graph_template"], task_id="a").common.upstream
    assert upstream == DOCUMENTS["inference_graph_template"]["spec"]["_upstreamResults"]
    placed = parse_task(DOCUMENTS["resources"], task_id="a").common
    assert placed.enforce_cpu is True
    assert placed.resources == DOCUMENTS["resources"]["spec"]["resources"]


@pytest.mark.parametrize("document", [{}, {"spec": None}, DOCUMENTS["nulls"], {"spec": {}}])
def test_what_is_absent_or_null_has_the_contracts_default(document: dict[str, Any]) -> None:
    common = parse_task(document, task_id="a").common
    destination = common.output.destination
    assert (destination.type, destination.method, destination.headers) == ("local", "POST", {})
    assert (destination.path, destination.url, destination.timeout_s) == (None, None, None)
    assert common.output.artifacts == []
    assert (common.shard.index, common.shard.total, common.shard.contiguous) == (0, 1, True)
    assert (common.resources, common.upstream, common.timeout_s) == ({}, {}, None)
    assert (common.enforce_cpu, common.executor) == (False, None)


def test_time_on_the_wire_is_utc_with_microseconds() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", utc_now())


# Ids.


@pytest.mark.parametrize("raw", ["a", "A-1_b.c", "-", "_x", "a" * 200, "75de0c1e-9d0b", "0", "a.."])
def test_plain_name_is_a_task_id(raw: str) -> None:
    assert check_task_id(raw) == raw


def test_whole_number_is_taken_as_text() -> None:
    assert check_task_id(17) == "17"
    assert check_task_id(-3) == "-3"
    assert parse_envelope(message(task_id=17)).task.task_id == "17"


@pytest.mark.parametrize("raw", [None, *BROKEN_IDS], ids=shown)
def test_id_that_is_no_plain_name_is_refused(raw: Any) -> None:
    with pytest.raises(ContractError, match=r"^task_id must be a plain name \(.*\), got .+"):
        check_task_id(raw)


@pytest.mark.parametrize("raw", BROKEN_IDS, ids=shown)
def test_message_with_a_broken_id_is_refused(raw: Any) -> None:
    with pytest.raises(ContractError, match=r"^message: task_id must be a plain name .*, got .+"):
        parse_envelope(message(task_id=raw))


@pytest.mark.parametrize("raw", [None, *BROKEN_IDS], ids=shown)
def test_child_with_a_broken_id_refuses_the_message_and_is_pointed_at(raw: Any) -> None:
    good = {"task_id": "b", "spec": {}}
    expected = r"task a: merged_children\[1\]\.task_id (must be a plain name|is required)"
    with pytest.raises(ContractError, match=expected):
        parse_envelope(message(merged_children=[good, {"task_id": raw, "spec": {}}]))


def test_id_stands_in_the_message_or_in_its_document_in_either_spelling() -> None:
    spec: dict[str, Any] = {"spec": {}}
    for raw in (
        {"task_id": "x", "task": spec},
        {"taskId": "x", "task": spec},
        {"task_id": None, "taskId": "x", "task": spec},
        {"task": {**spec, "task_id": "x"}},
        {"task": {**spec, "taskId": "x"}},
        {"task_id": "x", "task": {**spec, "task_id": "other"}},
    ):
        assert parse_envelope(raw).task.task_id == "x"


def test_message_without_any_id_is_refused() -> None:
    with pytest.raises(ContractError, match=r"^message: task_id is required$"):
        parse_envelope({"task": {}})


# Problems.


def test_every_problem_is_in_one_message() -> None:
    raw = message(
        shard_index="x",
        attempt=0,
        merged_children=[{"spec": {}}, 3],
        task={
            "spec": {
                "taskType": 4,
                "enforce_cpu": "maybe",
                "timeoutSec": -1,
                "shard": {"index": 2, "total": 2},
                "output": {
                    "artifacts": ["ok", 3, "../x"],
                    "destination": {"type": "http", "headers": {"a": 1}, "timeoutSec": "soon"},
                },
            }
        },
    )
    found = problems_of(raw)
    assert sorted(found) == sorted(
        [
            "shard_index must be a whole number, got 'x'",
            "attempt must be greater than or equal to 1, got 0",
            "merged_children[0].task_id is required",
            "merged_children[1] must be an object, got 3",
            "spec.taskType must be a string, got 4",
            "spec.enforce_cpu must be true or false, got 'maybe'",
            "spec.timeoutSec must be greater than 0, got -1",
            "spec.shard: index 2 must be below total 2",
            "spec.output.artifacts[1] must be a string, got 3",
            "spec.output.artifacts[2] must lie in the task's folder, got '../x'",
            "spec.output.destination.headers.a must be a string, got 1",
            "spec.output.destination.timeoutSec must be a number, got 'soon'",
        ]
    )
    with pytest.raises(ContractError, match=r"^task a: .*; ") as caught:
        parse_envelope(raw)
    assert caught.value.where == "task a"
    assert str(caught.value) == "task a: " + "; ".join(caught.value.problems)


def test_broken_id_hides_no_problem_of_the_spec() -> None:
    found = problems_of({"task_id": "../x", "task": {"spec": {"enforce_cpu": 7}}})
    assert found[0].startswith("task_id must be a plain name")
    assert found[1:] == ["spec.enforce_cpu must be true or false, got 7"]


def http(url: Any) -> dict[str, Any]:
    return with_spec(output={"destination": {"type": "http", "url": url}})


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"task_id": "a"}, "task is required"),
        (message(task=None), "task is required"),
        (message(task=[1]), "task must be an object, got list"),
        (message(task="x"), "task must be an object, got 'x'"),
        (message(task={"spec": [1]}), "spec must be an object, got list"),
        (message(task={"spec": "x" * 99}), f"spec must be an object, got '{'x' * 56}..."),
        (message(merged_children={}), "merged_children must be a list, got dict"),
        (message(assigned_worker=7), "assigned_worker must be a string, got 7"),
        (message(shard_total=float("nan")), "shard_total must be a finite number, got nan"),
        (message(shard_total=1.5), "shard_total must be a whole number, got 1.5"),
        (with_spec(taskType=10**5000),
         "spec.taskType must be a string, got a number of 16610 bits"),
        (with_spec(shard={"index": 10**5000}),
         "spec.shard: index a number of 16610 bits must be below total 1"),
        (with_spec(shard={"total": 0}),
         "spec.shard.total must be greater than or equal to 1, got 0"),
        (with_spec(timeoutSec=float("inf")), "spec.timeoutSec must be a finite number, got inf"),
        (with_spec(output=[]), "spec.output must be an object, got list"),
        (with_spec(output={"destination": "x"}),
         "spec.output.destination must be an object, got 'x'"),
        (with_spec(output={"destination": {"path": "a\0b"}}),
         "spec.output.destination.path must be text that a file name can hold, got 'a\\x00b'"),
        (with_spec(output={"artifacts": "x"}), "spec.output.artifacts must be a list, got 'x'"),
        (with_spec(output={"artifacts": ["/etc/passwd"]}),
         "spec.output.artifacts[0] must lie in the task's folder, got '/etc/passwd'"),
        (with_spec(output={"artifacts": ["a/../../b"]}),
         "spec.output.artifacts[0] must lie in the task's folder, got 'a/../../b'"),
        (with_spec(output={"artifacts": ["a\ud800"]}),
         "spec.output.artifacts[0] must be text that a file name can hold, got 'a\\ud800'"),
        (with_spec(_upstreamResults={"s": 3}), "spec._upstreamResults.s must be an object, got 3"),
        (with_spec(**{"\ud800": 1}),
         "spec must be an object whose keys are valid text, got '\\ud800'"),
        (message(task={"spec": {1: 2}}), "spec[1] must be named by a string, got 1"),
    ],
    ids=shown,
)  # fmt: skip
def test_problem_names_field_expectation_and_what_came(raw: Any, problem: str) -> None:
    assert problems_of(raw) == [problem]


@pytest.mark.parametrize(
    "url", [None, "", "x", "ftp://host/x", "file:///etc/passwd", "http://", "https:///x",
            "http://[x", "http://host:99999/x", "http://:80/x", "http://a\nb", "http://\ud800"],
    ids=shown,
)  # fmt: skip
def test_http_destination_needs_a_usable_url(url: Any) -> None:
    (problem,) = problems_of(http(url))
    assert problem == (
        f'spec.output.destination: url must be an http(s) URL when type is "http", got {url!r}'
    )


@pytest.mark.parametrize("url", ["http://h", "https://h:1/x?y=1", "HTTP://h/", "http://[::1]:8/x"])
def test_http_destination_takes_any_http_url(url: str) -> None:
    assert parse_envelope(http(url)).task.destination.url == url


def test_destination_of_an_unknown_type_is_left_to_its_driver() -> None:
    raw = with_spec(output={"destination": {"type": "s3", "bucket": "b"}})
    assert parse_envelope(raw).task.destination.type == "s3"


# Merged children.


def children_of(leader: dict[str, Any], *children: dict[str, Any]) -> Envelope:
    return parse_envelope(
        {"task_id": "lead", "task": {"kind": "X", "metadata": {"name": "l"}, "spec": leader},
         "merged_children": list(children)}
    )  # fmt: skip


def test_children_keep_dispatch_order_and_their_own_metadata() -> None:
    envelope = parse_bytes(MESSAGES["merged_children"])
    assert [task.task_id for task in envelope.tasks] == ["leader", "child-1", "child-2"]
    assert [task.metadata for task in envelope.children] == [{"name": "first"}, {}]
    assert [task.spec["data"]["items"] for task in envelope.tasks] == [["One"], ["Two"], ["Three"]]


def test_child_inherits_what_the_group_shares_and_nothing_else() -> None:
    shared = {
        "taskType": "inference",
        "model": {"source": {"identifier": "gpt2"}},
        "checkpoint": {"load": {"path": "x"}},
        "resources": {"hardware": {"cpu": 1}},
        "enforce_cpu": True,
        "executor": "vllm",
    }
    own = {
        "data": {"type": "list", "items": ["lead"]},
        "inference": {"seed": 1},
        "output": {"destination": {"path": "lead"}},
        "postprocess": {},
        "timeoutSec": 3,
        "_upstreamResults": {"s": {}},
    }
    envelope = children_of({**shared, **own}, {"task_id": "b", "spec": {"x": 1}})
    (child,) = envelope.children
    assert child.spec == {**shared, "x": 1}
    assert child.task_type == "inference"
    assert child.common.enforce_cpu is True
    assert child.common.timeout_s is None
    assert child.destination.path is None
    assert child.document == {"kind": "X", "metadata": None}


def test_child_keeps_its_own_value_of_a_shared_field() -> None:
    envelope = children_of(
        {"taskType": "inference", "model": {"source": {"identifier": "lead"}}},
        {"task_id": "b", "spec": {"model": {"source": {"identifier": "own"}}}},
    )
    assert envelope.children[0].spec["model"] == {"source": {"identifier": "own"}}


def test_child_inherits_a_task_type_in_either_spelling() -> None:
    envelope = parse_bytes(MESSAGES["merge_children"])
    assert [task.task_type for task in envelope.tasks] == ["inference", "inference"]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (None, "task b: spec must be an object, got None"),
        ([1], "task b: spec must be an object, got list"),
        ({"enforce_cpu": 7, "shard": 1},
         "task b: spec.enforce_cpu must be true or false, got 7; "
         "spec.shard must be an object, got 1"),
    ],
)  # fmt: skip
def test_unreadable_child_is_rejected_alone(spec: Any, problem: str) -> None:
    envelope = children_of({}, {"task_id": "b", "spec": spec}, {"task_id": 3, "spec": {}})
    assert [task.task_id for task in envelope.tasks] == ["lead", "3"]
    assert {task_id: str(error) for task_id, error in envelope.rejected.items()} == {"b": problem}


def test_child_without_spec_is_rejected_alone() -> None:
    envelope = children_of({}, {"task_id": "b"})
    assert list(envelope.rejected) == ["b"]
    assert envelope.children == ()


@pytest.mark.parametrize("ids", [["lead"], ["b", "b"], ["b", "c", "b"], [3, "3"]])
def test_id_that_comes_twice_in_a_group_refuses_the_message(ids: list[Any]) -> None:
    with pytest.raises(ContractError, match=rf"^task lead: .* names a task twice: {ids[-1]}$"):
        children_of({}, *({"task_id": task_id, "spec": {}} for task_id in ids))


# Bytes.


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "message must be JSON in UTF-8: "),
        (b"\xff\xfe\xfd", "message must be JSON in UTF-8: "),
        (b"[", "message must be JSON in UTF-8: "),
        (b"[]", r"message must be a JSON object, got list$"),
        (b"null", r"message must be a JSON object, got NoneType$"),
        (b'"x"', r"message must be a JSON object, got str$"),
        (b"7", r"message must be a JSON object, got int$"),
        (b'{"task_id": ' + b"1" * 5000 + b"}", "message must be JSON in UTF-8: "),
        (b"[" * 100_000, r"message nests deeper than 200 levels$"),
        (b'{"a":' * 100_000, r"message nests deeper than 200 levels$"),
        (b'{"a":' * 201 + b"1" + b"}" * 201, r"message nests deeper than 200 levels$"),
        (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", r"message nests deeper than 200 levels$"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_bytes_that_are_no_message_are_refused(body: bytes, problem: str) -> None:
    with pytest.raises(ContractError, match=f"^{problem}"):
        parse_message(body)


def test_two_hundred_levels_are_read() -> None:
    body = b'{"a":' * 200 + b"1" + b"}" * 200
    assert encode_json(parse_message(body)).replace(b" ", b"") == body


def test_last_of_two_equal_keys_wins_as_json_readers_agree() -> None:
    body = b'{"task_id": "a", "task_id": "b", "task": {"spec": {"x": 1, "x": 2}}}'
    envelope = parse_bytes(body)
    assert (envelope.task.task_id, envelope.task.spec) == ("b", {"x": 2})


def outcome_of(body: bytes) -> Envelope | ContractError:
    try:
        return parse_bytes(body)
    except ContractError as error:
        return error


def check_sound(outcome: Envelope | ContractError) -> None:
    """Whatever came, ids are safe and messages can be sent."""
    if isinstance(outcome, Envelope):
        ids = [*(task.task_id for task in outcome.tasks), *outcome.rejected]
        assert [check_task_id(task_id) for task_id in ids] == ids
        assert len(set(ids)) == len(ids)
        errors = list(outcome.rejected.values())
    else:
        errors = [outcome]
    for error in errors:
        assert error.problems
        assert all(problem.strip() for problem in error.problems)
        assert str(error).encode("utf-8"), "an event carries the text"


def to_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()  # NaN and lone surrogates as Python writes them


@quick
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_worse(body: bytes) -> None:
    outcome = outcome_of(body)
    assert isinstance(outcome, ContractError)
    check_sound(outcome)


@quick
@given(any_json)
def test_arbitrary_json_is_an_envelope_or_a_contract_error(value: Any) -> None:
    check_sound(outcome_of(to_bytes(value)))


@quick
@given(any_json, any_json, any_json)
def test_arbitrary_json_in_the_known_places_ends_the_same_way(a: Any, b: Any, c: Any) -> None:
    spec = {"taskType": "x", "output": {"destination": a, "artifacts": b}, "shard": c}
    child = {"task_id": "b", "spec": b}
    check_sound(outcome_of(to_bytes(message(task={"spec": spec}, merged_children=[child, a]))))
    check_sound(outcome_of(to_bytes(message(task={"spec": {"output": a}}, attempt=c, taskId=b))))
    check_sound(outcome_of(to_bytes({"task_id": c, "task": {"spec": {"_upstreamResults": a}}})))


@st.composite
def mutated_messages(draw: st.DrawFn) -> Any:
    value = json.loads(MESSAGES[draw(st.sampled_from(sorted(MESSAGES)))])
    value["task"]["spec"] = copy.deepcopy(
        DOCUMENTS[draw(st.sampled_from(sorted(DOCUMENTS)))].get("spec")
    )
    for _ in range(draw(st.integers(1, 4))):
        mutate(draw, value)
    return value


def mutate(draw: st.DrawFn, node: Any) -> None:
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], (dict, list)) and draw(st.booleans())):
            break
        node = node[key]
    change = draw(st.sampled_from(["replace", "remove", "add"]))
    if change == "remove":
        del node[key]
    elif change == "add" and isinstance(node, dict):
        node[draw(any_text)] = draw(any_json)
    else:
        node[key] = draw(any_json)


@quick
@given(mutated_messages())
def test_mutated_message_is_an_envelope_or_a_contract_error(value: Any) -> None:
    before = copy.deepcopy(value)
    check_sound(outcome_of(to_bytes(value)))
    with contextlib.suppress(ContractError):  # as from YAML, without the way through JSON
        parse_envelope(value)
    assert repr(value) == repr(before)


@quick
@given(st.dictionaries(st.text(max_size=8).map("x-{}".format), any_json, max_size=4))
def test_unknown_fields_pass_through_everywhere(extra: dict[str, Any]) -> None:
    spec = {**extra, "taskType": "echo", "output": {**extra, "destination": extra}}
    document = {**extra, "spec": spec}
    raw = {**extra, "task_id": "a", "task": document, "merged_children": [
        {**extra, "task_id": "b", "spec": extra}]}  # fmt: skip
    envelope = parse_envelope(raw)
    assert envelope.task.spec is spec
    assert repr(envelope.task.document) == repr(extra)
    assert repr(envelope.children[0].spec) == repr({"taskType": "echo", **extra})


# Encoding.

json_text = st.text(max_size=8)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | json_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_text, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@quick
@given(plain_json)
def test_json_survives_the_round_trip(value: Any) -> None:
    body = encode_json(value)
    assert decode_json(body) == value
    assert decode_json(encode_json(value, indent=2)) == value


@quick
@given(any_json)
def test_any_json_like_value_becomes_strict_json(value: Any) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    body = encode_json(value)
    assert json.loads(body.decode("utf-8"), parse_constant=refuse) == without_nan(value)


def without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def test_text_is_written_as_utf8_and_not_escaped() -> None:
    assert encode_json({"é": "😀"}) == '{"é": "😀"}'.encode()


def test_nan_and_infinities_become_null_at_any_depth() -> None:
    value = {"a": [float("nan"), {"b": float("inf")}], "c": (float("-inf"), 1.5), "d": float("nan")}
    assert encode_json(value) == b'{"a": [null, {"b": null}], "c": [null, 1.5], "d": null}'
    assert value["a"][1] == {"b": float("inf")}  # type: ignore[index]


def test_lone_surrogate_makes_the_text_ascii() -> None:
    assert encode_json({"é\ud800": float("nan")}) == b'{"\\u00e9\\ud800": null}'
    assert decode_json(encode_json("\ud800")) == "\ud800"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({1, 2}, "value of type set"),
        ({"items": [{"score": 1}, {"score": {1}}]}, r"items\[1\]\.score of type set"),
        ({"a": float("nan"), "b": Path()}, "b of type PosixPath"),
        ({"a": b"x"}, "a of type bytes"),
        ([MappingProxyType({})], r"\[0\] of type mappingproxy"),
        ({("a",): 1}, "value"),
    ],
)
def test_type_that_json_does_not_know_is_named_with_its_place(value: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"^{found} is not JSON: "):
        encode_json(value)


def test_value_that_has_no_end_and_number_that_is_too_long_raise() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RecursionError, match="recursion"):
        encode_json(endless)
    with pytest.raises(ValueError, match="Exceeds the limit"):
        encode_json({"a": 10**5000})


# Blocks and descriptions that other modules use.


class Inner(StrictBlock):
    depth: int = 1


class Outer(StrictBlock):
    width: int
    inner: Inner = Inner()


def test_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ContractError, match=r"^x: b: unknown key 'widht', did you mean 'width'\?"):
        validate_model(Outer, {"widht": 1, "width": 1}, where="x", prefix="b")


def test_unknown_key_without_a_neighbour_gets_the_known_ones() -> None:
    with pytest.raises(ContractError, match=r"unknown key 'zzz', known are inner, width$"):
        validate_model(Outer, {"zzz": 1, "width": 1}, where="x")


def test_unknown_keys_hide_no_other_problem() -> None:
    raw = {"widht": 1, "width": "x", "zzz": 1, "inner": {"dept": 1, "depth": "y"}}
    with pytest.raises(ContractError, match="unknown key 'widht'") as caught:
        validate_model(Outer, raw, where="x", prefix="b")
    for part in ("unknown key 'zzz'", "width must be a whole number, got 'x'",
                 "inner: unknown key 'dept', did you mean 'depth'?; "
                 "depth must be a whole number, got 'y'"):  # fmt: skip
        assert part in str(caught.value)


def check_skipping(value: Any) -> Iterator[str]:
    with pytest.raises(ValidationError, match="Outer") as caught:
        Outer.model_validate(value)
    yield from describe_problems(caught.value, prefix="b", skip_placeholders=True)


def test_placeholder_hides_its_own_field_only() -> None:
    assert [*check_skipping({"width": "${a.b}"})] == []
    assert [*check_skipping({"inner": {"depth": "${a.b}"}})] == ["b.width is required"]
    (problem,) = check_skipping({"width": "${a.b}", "widht": 1})
    assert problem == "b: unknown key 'widht', did you mean 'width'?"
    (problem,) = check_skipping({"width": "x", "inner": {"depth": "${a.b}"}})
    assert problem == "b.width must be a whole number, got 'x'"


def test_value_that_is_no_object_is_described_as_such() -> None:
    with pytest.raises(ContractError, match=r"^x: spec must be an object, got 3$"):
        validate_model(CommonSpec, 3, where="x", prefix="spec")
    with pytest.raises(ContractError, match=r"^x: document must be an object, got 3$"):
        validate_model(Outer, 3, where="x")


def test_task_says_what_its_document_says() -> None:
    task = parse_task({"metadata": [1], "task_id": "no", "spec": {}}, task_id="a")
    assert isinstance(task, Task)
    assert task.metadata == {}
    assert task.document == {"metadata": [1]}
    assert task.destination is task.common.output.destination
