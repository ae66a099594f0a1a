from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.cli.documents import read_document
from flowmesh_core.errors import ContractError

DOCUMENT = """
metadata: {name: w, owner: null}
spec:
  taskType: inference
  stages:
    - {name: a, spec: {x: 1}}
    - {name: b}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "w.yaml"
    path.write_text(DOCUMENT, encoding="utf-8")
    return path


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "w.yaml"
    path.write_bytes(content)
    return path


def changed(path: Path, *assignments: str) -> Any:
    return read_document(path, assignments)


def test_yaml_and_json_are_read_alike(tmp_path: Path) -> None:
    wanted = {"spec": {"prompt": "grün", "n": 1}}
    text = "spec:\n  prompt: grün\n  n: 1\n"
    assert read_document(write(tmp_path, text.encode())) == wanted
    text = '{"spec": {"prompt": "gr\\u00fcn", "n": 1}}'
    assert read_document(write(tmp_path, text.encode())) == wanted


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [1", "must be a YAML document: while parsing"),
        (b"a: \xff\xfe", "must be a YAML document: 'utf-8' codec"),
        (b"when: 2024-13-45", "must be a YAML document: month must be in"),
        (b"a: !!python/object:os.system {}", "must be a YAML document: could not determine"),
        (b"{[1]: 2}", "must be a YAML document"),
        (b"[" * 5000, "must be a YAML document"),
        (b"a: 1\n---\nb: 2\n", "must hold one YAML document, got 2; send them one by one"),
        (b"", "must hold one YAML document, got 0"),
    ],
)
def test_what_is_no_single_yaml_document_names_the_file_and_why(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ContractError, match=problem) as caught:
        read_document(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"gone\.yaml: cannot be read: No such file"):
        read_document(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("text with = sign", "text with = sign"),
        ("'64'", "64"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_the_value_is_yaml(path: Path, text: str, value: Any) -> None:
    assert changed(path, f"spec.x={text}")["spec"]["x"] == value


def test_existing_values_change_and_missing_ones_are_made(path: Path) -> None:
    document = changed(
        path,
        "metadata.name=v",
        "metadata.owner.team=core",
        "spec.inference.max_tokens=64",
        "spec.inference.seed=1",
        "spec.data.items[0]=first",
        "spec.data.items[1]=second",
        "spec.data.items[0]=changed",
        "top=1",
    )
    assert document["metadata"] == {"name": "v", "owner": {"team": "core"}}
    assert document["spec"]["inference"] == {"max_tokens": 64, "seed": 1}
    assert document["spec"]["data"] == {"items": ["changed", "second"]}
    assert document["top"] == 1


def test_lists_are_entered_by_index_and_grow_by_one(path: Path) -> None:
    stages = changed(path, "spec.stages[0].spec.x=2", "spec.stages[2].name=c")["spec"]["stages"]
    assert stages == [{"name": "a", "spec": {"x": 2}}, {"name": "b"}, {"name": "c"}]


def test_lists_of_lists_are_made(path: Path) -> None:
    assert changed(path, "spec.grid[0][0]=1")["spec"]["grid"] == [[1]]


@pytest.mark.parametrize(
    "assignment",
    ["spec", "=1", "", ".a=1", "a.=1", "a..b=1", "a[x]=1", "a[-1]=1", "a[0=1", "a]=1", "[0]=1"],
)
def test_what_is_no_path_and_value_is_refused(path: Path, assignment: str) -> None:
    with pytest.raises(ContractError, match=r"--set must be PATH=VALUE, such as a\.b\[0\]=1, got"):
        changed(path, assignment)


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        ("spec.taskType.a=1", "'a' needs an object, got str"),
        ("spec.taskType.a.b=1", "'a' needs an object, got str"),
        ("spec[0]=1", "0 needs a list, got dict"),
        ("spec[0].a=1", "0 needs a list, got dict"),
        ("spec.stages.name=1", "'name' needs an object, got list"),
        ("spec.stages[7].name=1", "index 7 is beyond the end, which is 2"),
        ("spec.x=[1", "while parsing"),
        ("spec.x=2024-13-45", "month must be in"),
    ],
)
def test_what_does_not_fit_the_document_says_where(
    path: Path, assignment: str, problem: str
) -> None:
    with pytest.raises(ContractError, match=f"does not fit the document: .*{problem}"):
        changed(path, assignment)


def test_nothing_can_be_set_in_a_document_without_content(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="'a' needs an object, got NoneType"):
        changed(write(tmp_path, b"---\n"), "a=1")


STEPS = st.one_of(st.sampled_from(["a", "b-c", "d e"]), st.just(0))


@given(steps=st.lists(STEPS, max_size=5), value=st.integers())
def test_what_was_set_is_found_where_it_was_set(
    steps: list[Any], value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = ["first", *steps]
    text = "".join(f"[{step}]" if step == 0 else f".{step}" for step in steps)[1:]
    path = write(tmp_path_factory.getbasetemp(), b"{other: 1}")
    document = changed(path, f"{text}={value}")
    assert document["other"] == 1
    for step in steps:
        document = document[step]
    assert document == value
