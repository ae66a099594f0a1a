from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.artifacts.jsonl_export import write_jsonl_export
from flowmesh_core.artifacts.layout import Attempt, TaskFolders
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArtifactError
from flowmesh_core.specs import JsonlExport

ITEM = {
    "index": 3,
    "prompt": "<user> raw",
    "output": "an answer",
    "finish_reason": None,
    "scores": {"a": 1},
    "tags": ["x", "ü"],
    "metadata": {"prompt": "raw", "rendered_prompt": "<user> raw", "city": "Wien", "none": None},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
Selector = str | dict[str, Any]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return TaskFolders(tmp_path).begin("t1", Destination())


def export(path: str = "out.jsonl", **changes: Any) -> JsonlExport:
    return JsonlExport(path=path, **changes)


def select(attempt: Attempt, selector: Selector, item: dict[str, Any] = ITEM) -> str:
    write_jsonl_export(export(fields={"x": selector}), [item], attempt)
    text = json.loads((attempt.folder / "out.jsonl").read_bytes())["x"]
    assert isinstance(text, str)
    return text


def test_every_item_becomes_one_line_and_the_block_says_where(attempt: Attempt) -> None:
    items = [{"output": f"line\n{n}", "prompt": "ü", "metadata": {}} for n in range(3)]
    block = write_jsonl_export(export("sub/dir/out.jsonl"), items, attempt)
    final = str(attempt.final / "sub/dir/out.jsonl")
    assert block == {
        "path": final,
        "worker_path": final,
        "relative_path": "sub/dir/out.jsonl",
        "record_count": 3,
        "fields": ["prompt", "output"],
    }
    text = (attempt.folder / "sub/dir/out.jsonl").read_text("utf-8")
    assert "ü" in text, "text is not escaped to ASCII"
    records = [json.loads(line) for line in text.splitlines()]
    assert records == [{"prompt": "ü", "output": f"line\n{n}"} for n in range(3)]


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("prompt", "raw"),
        ("output", "an answer"),
        ("metadata.city", "Wien"),
        ("metadata.none", ""),
        ("metadata.absent", ""),
        ("item.index", "3"),
        ("item.finish_reason", ""),
        ("item.scores", '{"a": 1}'),
        ("item.tags", '["x", "ü"]'),
        ("a constant", "a constant"),
        ("other.thing", "other.thing"),
        ("", ""),
        ({"from": "literal", "value": 7}, "7"),
        ({"source": "literal", "literal": "L"}, "L"),
        ({"value": "v"}, "v"),
        ({"from": "prompt"}, "raw"),
        ({"source": "output"}, "an answer"),
        ({"from": "metadata", "key": "city"}, "Wien"),
        ({"from": "item", "key": "index"}, "3"),
        ({"from": "item"}, ""),
        ({"from": "metadata", "key": "absent", "default": "d"}, "d"),
        ({"from": "metadata", "key": "absent", "default": 0}, "0"),
        ({"from": "metadata", "key": "absent", "fallback": "metadata.city"}, "Wien"),
        ({"from": "metadata", "key": "city", "fallback": "output", "default": "d"}, "Wien"),
        (
            {
                "from": "metadata",
                "key": "x",
                "fallback": {"from": "item", "key": "y"},
                "default": "d",
            },
            "d",
        ),
        ({"from": "metadata", "key": "x", "fallback": {"from": "item", "key": "index"}}, "3"),
        ({"from": "metadata", "key": "x", "fallback": None, "default": "d"}, "d"),
        ({"from": "metadata", "key": "x", "fallback": 5}, "5"),
    ],
)
def test_each_selector_of_the_contract(attempt: Attempt, selector: Selector, text: str) -> None:
    assert select(attempt, selector) == text


def test_prompt_is_the_raw_one_and_without_it_what_the_model_was_given(attempt: Attempt) -> None:
    assert select(attempt, "prompt") == "raw"
    assert select(attempt, "prompt", {"prompt": "given", "metadata": None}) == "given"


def test_metadata_that_is_no_object_selects_nothing(attempt: Attempt) -> None:
    assert select(attempt, "metadata.city", {"metadata": "text"}) == ""


def test_an_unknown_source_names_the_known_ones(attempt: Attempt) -> None:
    with pytest.raises(ArtifactError, match=r"literal, prompt, output, metadata, item, got 'meta'"):
        select(attempt, {"from": "meta", "key": "a"})


@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_required_field_fails_and_names_item_and_fields(
    attempt: Attempt, value: Any
) -> None:
    wanted = export(fields={"a": "item.a", "b": "item.b"}, required_fields=["a", "b", "c"])
    with pytest.raises(ArtifactError, match=r"item 0 has no b, c, named in required_fields"):
        write_jsonl_export(wanted, [{"a": 1, "b": value, "c": 1}], attempt)


def test_a_required_field_that_is_zero_or_false_is_there(attempt: Attempt) -> None:
    wanted = export(fields={"a": "item.a", "b": "item.b"}, required_fields=["a", "b"])
    write_jsonl_export(wanted, [{"a": 0, "b": False}], attempt)
    assert json.loads((attempt.folder / "out.jsonl").read_bytes()) == {"a": "0", "b": "False"}


def test_an_item_that_is_no_object_is_refused_by_its_number(attempt: Attempt) -> None:
    items: list[Any] = [ITEM, "text"]
    with pytest.raises(ArtifactError, match=r"item 1 must be an object, got str"):
        write_jsonl_export(export(), items, attempt)


@pytest.mark.parametrize("path", ["../out", "/etc/out", "a/../../out", "", ".hidden/out", "a/../b"])
def test_an_export_path_never_leaves_the_task_folder(attempt: Attempt, path: str) -> None:
    with pytest.raises(ArtifactError, match="must stay inside the task's folder"):
        write_jsonl_export(export(path), [ITEM], attempt)
    assert sorted(p.name for p in attempt.folder.rglob("*")) == ["artifacts", "logs"]


def test_an_export_path_follows_no_link_out_of_the_task_folder(attempt: Attempt) -> None:
    outside = attempt.folder.parent / "outside"
    outside.mkdir()
    (attempt.folder / "deep").symlink_to(outside)
    with pytest.raises(ArtifactError, match="must stay inside the task's folder"):
        write_jsonl_export(export("deep/out.jsonl"), [ITEM], attempt)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["responses.json", "manifest.json", "./responses.json"])
def test_an_export_cannot_take_the_place_of_the_result(attempt: Attempt, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"responses\.json and manifest\.json are the core's"):
        write_jsonl_export(export(name), [ITEM], attempt)


@pytest.mark.parametrize("path", ["logs", "a" * 300, "taken/out.jsonl"])
def test_a_path_that_cannot_be_written_is_named(attempt: Attempt, path: str) -> None:
    (attempt.folder / "taken").write_text("a file where a folder should be")
    with pytest.raises(ArtifactError, match=r"postprocess\.jsonl_export: cannot write .*(logs|a)"):
        write_jsonl_export(export(path), [ITEM], attempt)


@given(items=st.lists(st.fixed_dictionaries({"output": JSON, "metadata": JSON}), max_size=4))
def test_every_value_becomes_text_and_every_item_one_line(items: list[dict[str, Any]]) -> None:
    wanted = export(fields={"o": "output", "m": "metadata.k", "p": "prompt"})
    with tempfile.TemporaryDirectory() as root:
        attempt = TaskFolders(Path(root)).begin("t1", Destination())
        block = write_jsonl_export(wanted, items, attempt)
        lines = (attempt.folder / "out.jsonl").read_bytes().split(b"\n")[:-1]
    records = [json.loads(line) for line in lines]
    assert block["record_count"] == len(items) == len(records)
    for item, record in zip(items, records, strict=True):
        assert all(isinstance(value, str) for value in record.values())
        if isinstance(item["output"], str):
            assert record["o"] == item["output"]
        if item["output"] is None:
            assert record["o"] == ""
