"""Builds a page for each hook, capability, variable, event and error code.

What such a page says stands once: in a docstring, or in a table or section of a written page.
MkDocs loads this file as a hook (``mkdocs.yml``); the tests of the documentation import it.
"""

from __future__ import annotations

import ast
import enum
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import yaml
from pages import DOCS, FENCE, ROOT, relink, rows_by_name, sections, table, text_of

from flowmesh_core import Capability, Settings, TaskEvent, errors, events, hookspecs
from flowmesh_core.config import load_settings

# What pages outside of docs/ are on the site too, and files that pages link to.
OUTSIDE = ("*.md", "plugins/*/README.md", "examples/*.yaml")
EXAMPLES = Path(__file__).with_name("examples.yaml")

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("flowmesh_")}
ERRORS: dict[str, type[errors.FlowmeshError]] = {
    cls.code: cls for cls in (getattr(errors, name) for name in errors.__all__)
}
OUT_OF_MEMORY = errors.CrashError("", oom=True).code
EVENTS = [name for name, value in vars(events).items() if name == value]
VARIABLES = {field.metadata["variable"]: field for field in attrs.fields(Settings)}


# Docstrings.


def docstring(thing: Any) -> str:
    """Return a Google docstring, or a text like one, as Markdown."""
    text = thing if isinstance(thing, str) else inspect.getdoc(thing) or ""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"^(Args|Attributes|Returns|Raises):$", r"**\1**\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return re.sub(r"^ +", "  ", text, flags=re.MULTILINE)


def member_docs(cls: type[enum.Enum]) -> dict[str, str]:
    """Return the text below each member of an enum, by value."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(cls))))
    after = {node.end_lineno: node.value for node in nodes if isinstance(node, ast.Assign)}
    return {
        ast.literal_eval(after[node.lineno - 1]): ast.literal_eval(node.value)
        for node in nodes
        if isinstance(node, ast.Expr) and node.lineno - 1 in after
    }


# One page each.


def hook_page(name: str) -> str:
    """Describe a hook: its signature and docstring, and the example of hooks.md."""
    signature = inspect.signature(HOOKS[name])
    named = [f"{each.name}: {each.annotation}" for each in signature.parameters.values()]
    arguments = "\n    " + ",\n    ".join(named) + ",\n" if named else ""
    example = FENCE.search(sections(DOCS / "hooks.md")[name])
    parts = [
        f"```python\ndef {name}({arguments}) -> {signature.return_annotation}: ...\n```",
        docstring(HOOKS[name]),
        f"## Example\n\n{example[0] if example else ''}",
        "[Tracing](../../plugins.md#tracing-hooks) logs every call.",
        f"[All hooks](../../hooks.md#{name})",
    ]
    return "\n\n".join(parts)


def capability_page(value: str) -> str:
    """Describe a capability: its docstring, its section, the clauses that defend it."""
    tables = re.findall(r"(?:^\|.*\n)+", text_of(DOCS / "conformance.md"), re.MULTILINE)
    clauses = [
        [f"`{clause}`", told]
        for lines in tables
        for clause, (told, *_) in rows_by_name(lines).items()
        if f"`{value}`" in lines.splitlines()[0] + told
    ]
    parts = [
        docstring(member_docs(Capability)[value]),
        relink(sections(DOCS / "capabilities.md")[value], "docs/capabilities.md"),
        "## Checked by the kit\n\n" + grid(["Clause", "An executor"], clauses) if clauses else "",
        "[All capabilities](../../capabilities.md), [all clauses](../../conformance.md#clauses)",
    ]
    return "\n\n".join(part for part in parts if part)


def variable_page(name: str) -> str:
    """Describe a variable: its row, an example, and what a wrong value is answered."""
    heading, (kind, default, meaning) = {
        variable: (title, cells)
        for title, text in sections(DOCS / "configuration.md").items()
        for variable, cells in rows_by_name(text).items()
    }[name]
    row = [kind, default, f"`{VARIABLES[name].name}`"]
    parts = [
        relink(meaning, "docs/configuration.md") or heading,
        grid(["Type", "Default", "Field of `Settings`"], [row]),
        f"```bash\n{name}='{variable_examples()[name]}' flowmesh worker\n```",
        refusal(name),
        "[All variables](../../configuration.md)",
    ]
    return "\n\n".join(parts)


def variable_examples() -> dict[str, str]:
    """Return a value for each variable."""
    examples: dict[str, str] = yaml.safe_load(text_of(EXAMPLES))
    return examples


def refusal(name: str) -> str:
    """Return what is said of a value that cannot be read; empty when every text can."""
    for wrong in ("often", "-1", "a b", "~nobody/x"):
        try:
            load_settings({name: wrong})
        except errors.ConfigError as exc:
            return f"A value that cannot be read stops the start:\n\n```text\nerror: {exc}\n```"
    return "Every text can be read."


def event_page(name: str) -> str:
    """Describe an event: its row in the contract, and its section."""
    row = rows_by_name(sections(DOCS / "contract.md")["Events"])[name]
    parts = [
        grid(["When", "Fields"], [[relink(cell, "docs/contract.md") for cell in row]]),
        relink(sections(DOCS / "events.md")[name], "docs/events.md"),
        "[All events](../../events.md)",
    ]
    return "\n\n".join(parts)


def error_page(code: str) -> str:
    """Describe an error code: its class, its rows, an event that carries it."""
    cls = ERRORS.get(code, errors.CrashError)
    page = DOCS / "errors.md"
    _, retriable, meaning, advice = rows_by_name(sections(page, 1)["Errors"])[code]
    bases = [base.code for base in cls.__mro__[1:] if issubclass(base, errors.FlowmeshError)]
    kinds = ", ".join(f"[`{base}`]({base}.md)" for base in bases)
    crashes = [row for row in table(sections(page)["Crashes"]) if row[1] == f"`{code}`"]
    parts = [
        docstring(cls),
        relink(meaning, "docs/errors.md") + ".",
        relink(f"**What to do.** {advice}.", "docs/errors.md") if advice else "",
        grid(["Class", "Retriable", "Is also"], [[f"`{cls.__name__}`", retriable, kinds]]),
        grid(["The process", "Code", "Retriable", "Because"], crashes) if crashes else "",
        carried(code, cls),
        "[All codes](../../errors.md)",
    ]
    return "\n\n".join(part for part in parts if part)


def carried(code: str, cls: type[errors.FlowmeshError]) -> str:
    """Return an event with the words of the page; empty for the name of a group."""
    told = rows_by_name(sections(DOCS / "errors.md")["What they say"])
    if code not in told:
        return ""
    error = cls(told[code][0].strip("`"))
    error.code = code
    event = json.loads(TaskEvent.failed("75de", error).to_json())
    shown = {key: event[key] for key in ("type", "task_id", "error", "payload")}
    return f"## For instance\n\n```json\n{json.dumps(shown, indent=2)}\n```"


def grid(heads: list[str], cells: list[list[str]]) -> str:
    """Return a table."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@attrs.frozen
class Kind:
    """A kind of thing that has pages: the written page about all, and how to build the others."""

    overview: str
    build: Callable[[str], str]
    names: Iterable[str]


KINDS: Mapping[str, Kind] = {
    "hooks": Kind("hooks.md", hook_page, HOOKS),
    "capabilities": Kind("capabilities.md", capability_page, [c.value for c in Capability]),
    "events": Kind("events.md", event_page, EVENTS),
    "errors": Kind("errors.md", error_page, [*ERRORS, OUT_OF_MEMORY]),
    "variables": Kind("configuration.md", variable_page, VARIABLES),
}


def build_pages() -> dict[str, str]:
    """Return every generated page by its path below docs/."""
    return {
        f"reference/{folder}/{name}.md": build_page(folder, name)
        for folder, kind in KINDS.items()
        for name in kind.names
    }


def build_page(folder: str, name: str) -> str:
    """Return one generated page.

    Raises:
        KeyError: What it is made of lacks a row, a section or an example with its name.
    """
    return f"# `{name}`\n\n{KINDS[folder].build(name)}\n"


# What MkDocs calls.


def on_config(config: Any) -> None:
    """Put the pages that no one wrote, and those of the plugins, into the navigation."""
    plugins = {path.parent.name: path for path in sorted(ROOT.glob("plugins/*/README.md"))}
    config.nav.append(
        {"Plugins": [{name: str(path.relative_to(ROOT))} for name, path in plugins.items()]}
    )
    kinds = []
    for folder, kind in KINDS.items():
        pages = [{name: f"reference/{folder}/{name}.md"} for name in kind.names]
        kinds.append({folder.capitalize(): [kind.overview, *pages]})
    config.nav.append({"Reference": kinds})


def outside() -> list[str]:
    """Return what is on the site and lies outside of docs/; the site's first page is its own."""
    found = [path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found if path != ROOT / "README.md"]


def on_files(files: Any, config: Any) -> None:
    """Add them, and what pages link to outside of docs/."""
    file = import_module("mkdocs.structure.files").File  # the tests do without it
    for path, text in build_pages().items():
        files.append(file.generated(config, path, content=text))
    for place in outside():
        files.append(file.generated(config, place, abs_src_path=str(ROOT / place)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Have links lead to where the pages lie on the site."""
    place = page.file.src_uri
    outside = (ROOT / place).exists()
    return relink(markdown, place if outside else f"docs/{place}", place)
