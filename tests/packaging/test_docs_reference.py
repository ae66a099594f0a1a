"""Each hook, capability, variable, event and error code has a page, all on the site."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import generated
import pytest
import redis
import yaml
from generated import EVENTS, KINDS, VARIABLES, build_page
from pages import DOCS, FENCE, ROOT, links, relink, sections, text_of

from flowmesh_core import Capability
from flowmesh_core.config import load_settings
from flowmesh_core.testing import RedisServer, WorkerProcess, wait_for

PLACES = [(folder, name) for folder, kind in KINDS.items() for name in kind.names]
BUILT = {f"reference/{folder}/{name}.md" for folder, name in PLACES}


def test_each_kind_of_thing_has_its_pages() -> None:
    counts = {folder: len([*kind.names]) for folder, kind in KINDS.items()}
    assert min(counts.values()) >= 6
    assert counts["variables"] > 50


@pytest.mark.parametrize(("folder", "name"), PLACES)
def test_a_page_is_of_one_thing_and_leads_somewhere(folder: str, name: str) -> None:
    text = build_page(folder, name)
    assert text.startswith(f"# `{name}`\n\n")
    assert len(re.sub(r"[`|\s-]", "", text)) > 120
    assert "``" not in re.sub("```", "", text)
    assert "| |" not in text
    for link in links(text):
        file = posixpath.normpath(posixpath.join("reference", folder, link[1].split("#")[0]))
        assert file in BUILT or (DOCS / file).is_file() or (ROOT / file).is_file(), link[1]


@pytest.mark.parametrize("name", KINDS["hooks"].names)
def test_the_page_of_a_hook_has_signature_rules_and_example(name: str) -> None:
    text = build_page("hooks", name)
    assert f"\ndef {name}(" in text
    assert "@hookimpl\n" in text.partition("## Example")[2]
    assert "'" not in text.partition("```\n")[0], "annotations are shown without quotes"


@pytest.mark.parametrize("capability", Capability)
def test_the_page_of_a_capability_says_what_its_docstring_says(capability: Capability) -> None:
    text = build_page("capabilities", capability.value)
    assert generated.docstring(generated.member_docs(Capability)[capability.value]) in text
    clauses = text.partition("## Checked by the kit")[2]
    lone = {Capability.CPU, Capability.GPU}
    assert bool(clauses) == (capability not in lone)


# Variables.


def test_every_variable_has_an_example() -> None:
    assert generated.variable_examples().keys() == VARIABLES.keys()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_example_of_a_variable_is_read_and_is_not_its_default(name: str) -> None:
    field = VARIABLES[name].name
    value = getattr(load_settings({name: generated.variable_examples()[name]}), field)
    assert value not in (getattr(load_settings({}), field), None)


def test_a_wrong_value_is_answered_as_the_page_says() -> None:
    assert "got 'often'" in build_page("variables", "HEARTBEAT_INTERVAL_SEC")
    assert "Every text can be read" in build_page("variables", "TASK_TOPIC")


# Events.

# What a machine without sensors and GPUs does not have.
_MEASURED = re.compile(r"\.(gpus|per_gpu|per_gpu_avg_watts|estimated_energy_kwh)\.")
TELLER = """
from flowmesh_core import Executor, ExecutorInfo, InputError, hookimpl

@hookimpl
def flowmesh_register_executors():
    return [ExecutorInfo(name="tell", task_types={"tell"}, target=f"{__name__}:Tell")]

class Tell(Executor):
    def run(self, ctx):
        print("loss 0.5, step 7")
        ctx.progress(step=7, total=10, loss=0.5)
        if ctx.raw_spec.get("fail"):
            raise InputError("spec.data.items is required")
        return {"ok": True}
"""


def examples() -> dict[str, Any]:
    """Return the JSON of each section of events.md."""
    return {
        name: json.loads(code)
        for name, text in sections(DOCS / "events.md").items()
        for language, _, code in FENCE.findall(text)
        if language == "json"
    }


def shape(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every key, lists without their numbers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key}"
            yield from shape(item, f"{path}.{key}")
    for item in value if isinstance(value, list) else ():
        yield from shape(item, path)


@pytest.fixture(scope="module")
def heard(
    flowmesh_redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The last event of each type that a worker sent in its life."""
    flowmesh_redis_server.start()
    flowmesh_redis_server.flush()
    url, folder = flowmesh_redis_server.url, tmp_path_factory.mktemp("events")
    plugin, found = folder / "teller.py", {}
    plugin.write_text(TELLER)
    with (
        redis.Redis.from_url(url, decode_responses=True) as client,
        client.pubsub(ignore_subscribe_messages=True) as bus,
    ):
        bus.psubscribe("tasks.*", "workers.events")

        def listen(until: str) -> bool:
            if message := bus.get_message(timeout=0.1):
                event = json.loads(message["data"])
                found[event["type"]] = event
            return until in found

        arguments = ("--plugin", str(plugin))
        with WorkerProcess(url, folder / "results", arguments=arguments) as worker:
            wait_for(lambda: listen("HEARTBEAT"))
            for task_id, fail in (("a", False), ("b", True)):
                task = {"spec": {"taskType": "tell", "fail": fail}}
                message = {"task_id": task_id, "task": task, "assigned_worker": "w1"}
                client.publish("tasks", json.dumps({**message, "dispatched_at": "now"}))
                wait_for(lambda last="TASK_FAILED" if fail else "TASK_SUCCEEDED": listen(last))
            worker.stop()
            wait_for(lambda: listen("UNREGISTER"))
    return found


@pytest.mark.parametrize("name", EVENTS)
def test_the_example_of_an_event_has_the_keys_that_a_worker_sends(
    name: str, heard: dict[str, Any]
) -> None:
    told, sent = ({*shape(event)} for event in (examples()[name], heard[name]))
    assert not [path for path in told ^ sent if not _MEASURED.search(f"{path}.")]


# The site.


def navigation(item: Any) -> Iterator[str]:
    """Yield every page of a navigation."""
    if isinstance(item, str):
        yield item
    for part in item if isinstance(item, list) else item.values() if isinstance(item, dict) else ():
        yield from navigation(part)


def test_the_navigation_names_every_page_once() -> None:
    config = SimpleNamespace(nav=yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    generated.on_config(config)
    named = sorted(navigation(config.nav))
    written = [path.name for path in DOCS.glob("*.md")]
    outside = [path for path in generated.outside() if path.endswith(".md")]
    assert named == sorted([*BUILT, *written, *outside])


def test_what_pages_link_to_is_on_the_site() -> None:
    outside = generated.outside()
    for page in [*DOCS.glob("*.md"), *(ROOT / path for path in outside if path.endswith(".md"))]:
        for link in links(text_of(page)):
            file = link[1].partition("#")[0]
            target = (page.parent / file).resolve() if file else page
            place = target.relative_to(ROOT).as_posix()
            assert target.parent == DOCS or place in outside, f"{page.name} links to {link[1]}"


@pytest.mark.parametrize(
    ("text", "page", "moved", "there"),
    [
        ("[a](errors.md#x)", "docs/hooks.md", "reference/hooks/h.md", "[a](../../errors.md#x)"),
        ("[a](#x)", "docs/hooks.md", "reference/hooks/h.md", "[a](../../hooks.md#x)"),
        ("[a](#x)", "docs/hooks.md", "hooks.md", "[a](#x)"),
        ("[a](../SECURITY.md)", "docs/index.md", "index.md", "[a](SECURITY.md)"),
        ("[a](docs/faults.md)", "SECURITY.md", "SECURITY.md", "[a](faults.md)"),
        (
            "[a](../../docs/b.md)",
            "plugins/p/README.md",
            "plugins/p/README.md",
            "[a](../../b.md)",
        ),
        ("[a](https://x.org/y.md)", "docs/a.md", "b/a.md", "[a](https://x.org/y.md)"),
        ("```md\n[a](b.md)\n```\n", "docs/a.md", "b/a.md", "```md\n[a](b.md)\n```\n"),
    ],
)
def test_a_link_leads_to_the_same_page_on_the_site(
    text: str, page: str, moved: str, there: str
) -> None:
    assert relink(text, page, moved) == there
