"""Tables on the pages describe exactly what there is."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import attrs
import pytest
import yaml
from generated import EVENTS, HOOKS
from pages import DOCS, ROOT, blocks, sections, table, text_of

from flowmesh_core import Capability, ExecutorInfo, RunContext, config
from flowmesh_core.config import child_environment
from flowmesh_core.resources import parse_resources


def rows(path: Path, heading: str) -> list[list[str]]:
    """Return the cells of every table row below a heading."""
    return table({**sections(path, 1), **sections(path, 2)}[heading])


def first_names(cells: list[list[str]]) -> list[str]:
    """Return what stands in backticks in the first cells, arguments and ``ctx.`` left out."""
    found = [re.findall(r"`(?:ctx\.)?(\w[\w.]*)(?:\([^`]*\))?`", row[0]) for row in cells]
    return [name for names in found for name in names]


MEMBERS = {field.name for field in attrs.fields(RunContext)} | {
    name for name in vars(RunContext) if not name.startswith("_")
}
WRITING = DOCS / "writing-an-executor.md"
# Where the second table below that heading begins.
CAPABILITIES = 1 + len(attrs.fields(ExecutorInfo))


@pytest.mark.parametrize(
    ("described", "there"),
    [
        (
            first_names(rows(WRITING, "ExecutorInfo")[1:CAPABILITIES]),
            {f.name for f in attrs.fields(ExecutorInfo)},
        ),
        (
            first_names(rows(WRITING, "ExecutorInfo")[CAPABILITIES:]),
            {item.value for item in Capability},
        ),
        (first_names(rows(WRITING, "RunContext")), MEMBERS),
        (first_names(rows(DOCS / "contract.md", "Events")), {*EVENTS}),
        (list(sections(DOCS / "events.md")), {*EVENTS}),
        (list(sections(DOCS / "capabilities.md")), {item.value for item in Capability}),
        (list(sections(DOCS / "hooks.md")), {*HOOKS}),
    ],
    ids=[
        *("ExecutorInfo", "capabilities", "RunContext", "events"),
        *("examples of events", "examples of capabilities", "hooks"),
    ],
)
def test_a_table_describes_exactly_what_there_is(described: list[str], there: set[str]) -> None:
    assert len(there) > 4
    assert sorted(described) == sorted(there)


def test_the_variables_that_a_child_keeps_are_those_of_the_table() -> None:
    table = rows(DOCS / "configuration.md", "What an executor's process sees")[1:]
    told = [name for row in table[:-1] for name in re.findall(r"`([A-Z_]+\*?)`", row[1])]
    assert len(told) > 30
    environ = {name.replace("*", "X"): "kept" for name in told}
    withheld = {
        "HF_TOKEN": "",
        "CUDA_KEY": "",
        "REDIS_URL": "",
        "FLOWMESH_OTHER_X": "",
        "EDITOR": "",
    }
    kept = child_environment(plugin="x", environ=environ | withheld)
    assert kept.keys() - {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"} == environ.keys()
    page = text_of(DOCS / "configuration.md")
    assert all(f"`{name}*`" in page for name in config._CHILD_PREFIXES)
    assert all(f"`{name}`" in page for name in config._CHILD_NAMES if name.isupper())


def test_the_architecture_shows_the_layers_that_are_checked_and_every_file_of_a_place() -> None:
    page = text_of(DOCS / "architecture.md")
    checked = ast.parse(text_of(ROOT / "tests" / "packaging" / "test_layers.py")).body
    (layers,) = [
        ast.literal_eval(node.value)
        for node in checked
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    (shown,) = re.findall(r"^```\n(errors\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    plain = [line.replace("/", "").split() for line in shown.splitlines()]
    assert list(map(set, plain)) == [set(line.split()) - {"__main__"} for line in layers]
    described = re.findall(
        r"`(\w+\.py)`", "".join(row[0] for row in rows(DOCS / "architecture.md", "Processes"))
    )
    files = {path.name for path in (ROOT / "flowmesh_core" / "places").glob("*.py")}
    assert set(described) == files - {"__init__.py"}


def test_every_field_of_a_declaration_has_its_default() -> None:
    told = {row[0].strip("`"): row[1] for row in rows(WRITING, "ExecutorInfo")[1:CAPABILITIES]}
    for field in attrs.fields(ExecutorInfo):
        assert (told[field.name] == "required") == (field.default is attrs.NOTHING), field.name


def test_every_hook_has_an_example_of_its_own() -> None:
    for name, section in sections(DOCS / "hooks.md").items():
        assert re.search(rf"^@hookimpl\ndef {name}\(", section, re.MULTILINE), name


def test_every_field_of_serve_is_in_the_contract() -> None:
    from flowmesh_core import ServeParams, ServeResult

    page = DOCS / "contract.md"
    told = [re.sub("`", "", row[0]) for row in rows(page, "Other task types")]
    assert told[-len(ServeParams.model_fields) :] == list(ServeParams.model_fields)
    shown = [json.loads(code) for _, code in blocks(page, "json")]
    assert list(ServeResult.model_fields) in [list(result) for result in shown]


def test_what_the_contract_says_of_resources_is_read_and_nothing_else() -> None:
    page = DOCS / "contract.md"
    (example,) = [
        block["resources"]
        for _, code in blocks(page, "yaml")
        if "resources" in (block := yaml.safe_load(code))
    ]
    request = parse_resources(example, where="the page")
    assert (request.cpu, request.memory_bytes, request.gpu_count) == (4, 16 << 30, 1)
    assert (request.gpu_type, request.gpu_memory_bytes) == ("a100", 40 << 30)
    told = first_names(rows(page, "Resources and priority"))
    gpu = [f"gpu.{name}" for name in example["hardware"]["gpu"]]
    assert told == [name for name in example["hardware"] if name != "gpu"] + gpu


def test_every_inference_field_is_in_the_contract_with_its_default() -> None:
    from flowmesh_core import InferenceParams

    told = {
        name: row[1]
        for row in rows(DOCS / "contract.md", "Inference")
        for name in re.findall(r"`(\w+)`", row[0])
    }
    del told["inference"]
    assert set(told) == set(InferenceParams.model_fields)
    for name, field in InferenceParams.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool):
            assert told[name].strip("`") == str(default).lower()
        elif isinstance(default, (int, float, str)):
            assert told[name].strip("`") == f"{default:g}" if name != "prompt_format" else default
