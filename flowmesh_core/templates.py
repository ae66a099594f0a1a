"""``${stage.path}`` references, ``${env.NAME}`` secrets and graph templates: values in, values out.

Nothing here reads a file, a clock or the environment, and no argument is changed. ``$${`` stands
for a literal ``${``. Text that comes out of a stage's result is data: whatever it looks like, it is
never read as a reference to a secret. What lies under ``_upstreamResults`` is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from attrs import frozen

from flowmesh_core.errors import ContractError

__all__ = [
    "MAX_DEPTH",
    "UPSTREAM_KEY",
    "Reference",
    "graph_template_stages",
    "listing",
    "map_strings",
    "references",
    "render",
    "render_env",
    "render_graph_template",
    "type_name",
    "walk",
]

MAX_DEPTH = 100
UPSTREAM_KEY = "_upstreamResults"

_TOKEN = re.compile(r"\$\$\{|\$\{([^}]+)\}")
_WHOLE = re.compile(r"\$\{([^}]+)\}")
_ENV_TOKEN = re.compile(r"\$\$\{(?=\s*env\.)|\$\{\s*env\.([^}]+)\}")
_ENV_START = re.compile(r"\$\{(?=\s*env\.)")
_BRACKET = re.compile(r"\[([0-9]+)\]")
_INDEX = re.compile(r"[0-9]{1,9}")
_COLUMN_FIELD = re.compile(r"\{col[0-9]+_(?:label|value)\}")
_BRIEFING = "two_column_briefing"


@frozen(kw_only=True)
class Reference:
    """What stands between ``${`` and ``}``.

    Attributes:
        text: The whole reference, as messages quote it.
        stage: The part before the first dot.
        path: The rest; empty when there is no dot.
    """

    text: str
    stage: str
    path: str

    @property
    def is_env(self) -> bool:
        """Whether it names a variable of the worker and not a stage."""
        return self.stage == "env" and bool(self.path)


def type_name(value: object) -> str:
    """Name a value's type for a message, null as documents spell it."""
    return "null" if value is None else type(value).__name__


def listing(names: Iterable[object]) -> str:
    """List at most eight names for a message and count the others."""
    words = [str(name) for name in names]
    rest = f" and {len(words) - 8} more" if len(words) > 8 else ""
    return (", ".join(words[:8]) or "none") + rest


def map_strings(value: object, change: Callable[[str], object], *, depth: int = 0) -> Any:
    """Copy a document, each string replaced by ``change`` of it; keys stay.

    Raises:
        ContractError: The document is nested deeper than ``MAX_DEPTH`` or contains itself.
    """
    if isinstance(value, str):
        return change(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if depth >= MAX_DEPTH:
        raise ContractError(
            f"documents may be nested {MAX_DEPTH} levels deep, got more; flatten it,"
            " or remove the alias that makes it contain itself"
        )
    if isinstance(value, Mapping):
        return {
            key: map_strings(item, str if key == UPSTREAM_KEY else change, depth=depth + 1)
            for key, item in value.items()
        }
    return [map_strings(item, change, depth=depth + 1) for item in value]


def walk(document: object, path: str, *, reference: str) -> object:
    """Follow a dotted path; lists take ``items.0`` and ``items[0]`` alike.

    Raises:
        ContractError: A step leads nowhere, or to null; the message quotes ``reference``.
    """
    steps = _BRACKET.sub(r".\1", path)
    value, seen = document, ""
    for step in (steps[1:] if path.startswith("[") else steps).split("."):
        value = _take(value, step, seen, reference)
        seen = f"{seen}.{step}" if seen else step
    if value is None:
        raise _missing(reference, f"'{seen}' is null")
    return value


def _take(value: object, step: str, seen: str, reference: str) -> object:
    place = f"'{seen}'" if seen else "the result"
    if isinstance(value, Mapping):
        if step not in value:
            raise _missing(reference, f"no key '{step}' in {place}; keys: {listing(value)}")
        return value[step]
    if isinstance(value, (list, tuple)):
        if not _INDEX.fullmatch(step) or int(step) >= len(value):
            wanted = f"an index below {len(value)}" if value else "nothing, the list is empty"
            raise _missing(reference, f"{place} is a list and takes {wanted}, got '{step}'")
        return value[int(step)]
    raise _missing(reference, f"{place} is {type_name(value)} and has no '{step}'")


def _missing(reference: str, reason: str) -> ContractError:
    return ContractError(f"Missing value for reference '{reference}': {reason}")


def _parse(inner: str) -> Reference:
    text = inner.strip()
    stage, _, path = text.partition(".")
    return Reference(text=text, stage=stage, path=path)


def references(value: object) -> set[Reference]:
    """Find every reference in the strings of a document, ``env`` ones included."""
    found: set[Reference] = set()

    def note(text: str) -> str:
        found.update(_parse(match[1]) for match in _TOKEN.finditer(text) if match[1])
        return text

    map_strings(value, note)
    return found


def render(value: object, lookup: Callable[[Reference], object]) -> object:
    """Replace stage references in all strings of a document.

    A string that is one reference takes the value with its type; within text a list or mapping
    becomes JSON and anything else ``str()``. References to ``env`` stay for ``render_env``, and
    text that only looks like one leaves with ``$${``, which ``render_env`` takes back.
    """

    def fill(text: str) -> object:
        whole = _WHOLE.fullmatch(text)
        if whole is None:
            return _fill(text, lookup)
        reference = _parse(whole[1])
        return text if reference.is_env else map_strings(lookup(reference), _shield)

    return map_strings(value, fill)


def _fill(text: str, lookup: Callable[[Reference], object]) -> str:
    done, run, at = "", "", 0
    for match in _TOKEN.finditer(text):
        run += text[at : match.start()]
        at = match.end()
        if match[1] is None:
            run += "${"
        elif (reference := _parse(match[1])).is_env:
            done, run = done + _shield(run) + match[0], ""
        else:
            run += _as_text(lookup(reference))
    # Shielded as a whole: two harmless values side by side can spell a reference.
    return done + _shield(run + text[at:])


def _shield(text: str) -> str:
    return _ENV_START.sub("$${", text)


def _as_text(value: object) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(map_strings(value, str), ensure_ascii=False, default=str)
    return str(value)


def render_env(
    value: object, allowed: Collection[str], environ: Mapping[str, str]
) -> tuple[object, dict[str, str]]:
    """Replace ``${env.NAME}`` in all strings of a document and touch no other placeholder.

    Returns:
        The document, and the secrets that it now holds: they must be masked wherever it is shown.

    Raises:
        ContractError: A name is not in ``allowed``, or not in ``environ``; all such names at once.
    """
    used: dict[str, str] = {}
    problems: dict[str, str] = {}

    def resolve(match: re.Match[str]) -> str:
        if match[1] is None:
            return "${"
        name = match[1].strip()
        if name not in allowed:
            problems[name] = (
                f"'${{env.{name}}}' is not allowed on this worker;"
                f" its operator must add {name} to FLOWMESH_ENV_ALLOW"
            )
        elif name not in environ:
            problems[name] = (
                f"'${{env.{name}}}' is allowed but {name} is not set; set it where the worker runs"
            )
        else:
            used[name] = environ[name]
        return used.get(name, "")

    rendered = map_strings(value, lambda text: _ENV_TOKEN.sub(resolve, text))
    if problems:
        raise ContractError(problems.values())
    return rendered, used


def graph_template_stages(template: Mapping[str, object]) -> set[str]:
    """Name the stages whose results the columns show; a column that names none adds none."""
    columns = template.get("columns")
    expressions = map(_expression, columns if isinstance(columns, list) else ())
    return {text.partition(".")[0] for text in expressions if text}


def render_graph_template(
    template: Mapping[str, object], upstream: Mapping[str, Mapping[str, object]]
) -> str:
    """Write the one prompt that a graph template makes of the results of earlier stages.

    Args:
        template: ``name``, ``columns``, ``options``, ``text`` of ``data.template``.
        upstream: Stage name to the stored result document.

    Raises:
        ContractError: With every fault found in the columns and the layout.
    """
    if not upstream:
        raise ContractError(
            "data.template needs the results of earlier stages, got none; name them in dependsOn"
        )
    columns = template.get("columns")
    if not isinstance(columns, list) or not columns:
        got = "an empty one" if columns == [] else type_name(columns)
        raise ContractError(f"data.template.columns must be a non-empty list, got {got}")
    problems: list[str] = []
    pairs = [
        _read_column(number, column, upstream, problems)
        for number, column in enumerate(columns, start=1)
    ]
    prompt = _lay_out(template, pairs, problems)
    if problems:
        raise ContractError(problems)
    return prompt


def _expression(column: object) -> str:
    """Return ``stage.path``, or nothing when the column is not readable."""
    if not isinstance(column, Mapping):
        return ""
    parts = [column["expr"]] if "expr" in column else [column.get("node"), column.get("path", "")]
    return ".".join(filter(None, parts)) if all(isinstance(part, str) for part in parts) else ""


def _read_column(
    number: int,
    column: object,
    upstream: Mapping[str, Mapping[str, object]],
    problems: list[str],
) -> tuple[str, str]:
    expression = _expression(column)
    if not isinstance(column, Mapping) or not expression:
        problems.append(
            f"column {number} must be a mapping with expr, or node and path, as strings;"
            f" got {column!r:.80}"
        )
        return "", ""
    value = column.get("default")
    try:
        value = _evaluate(expression, upstream)
    except ContractError as error:
        if value is None:
            problems.extend(f"column {number}: {problem}" for problem in error.problems)
    return str(column.get("label") or f"Column {number}"), _as_text(value)


def _evaluate(expression: str, upstream: Mapping[str, Mapping[str, object]]) -> object:
    stage, _, path = expression.partition(".")
    if stage not in upstream:
        raise _missing(expression, f"no result of stage '{stage}'; stages: {listing(upstream)}")
    return walk(upstream[stage], path, reference=expression) if path else upstream[stage]


def _lay_out(
    template: Mapping[str, object], columns: list[tuple[str, str]], problems: list[str]
) -> str:
    name, text = template.get("name"), template.get("text")
    if name == _BRIEFING or not (name or text):
        return _write_briefing(template.get("options") or {}, columns, problems)
    if isinstance(text, str) and text:
        return _fill_columns(text, columns)
    if text:
        problems.append(f"data.template.text must be a string, got {type_name(text)}")
    else:
        problems.append(
            f"data.template.name {name!r} is unknown; use {_BRIEFING}, or add data.template.text"
        )
    return ""


def _fill_columns(text: str, columns: list[tuple[str, str]]) -> str:
    # Not str.format: it would follow attributes of the values.
    fields = {
        f"{{col{number}_{field}}}": part
        for number, pair in enumerate(columns, start=1)
        for field, part in zip(("label", "value"), pair, strict=True)
    }
    return _COLUMN_FIELD.sub(lambda match: fields.get(match[0], match[0]), text)


def _write_briefing(options: object, columns: list[tuple[str, str]], problems: list[str]) -> str:
    if len(columns) < 2:
        problems.append(f"{_BRIEFING} needs two columns or more, got {len(columns)}")
    if not isinstance(options, Mapping):
        problems.append(f"data.template.options must be a mapping, got {type_name(options)}")
        return ""
    role, intro = options.get("role"), options.get("intro")
    lines: list[str] = []
    if role or not intro:
        lines.append(f"You are acting as {role or 'energy strategist'}.")
    lines += _read_lines("intro", intro or "Write one briefing from these findings:", problems)
    lines += [f"• {label}: {value}" for label, value in columns]
    lines += _read_lines("closing", options.get("closing") or [], problems)
    return "\n".join(lines)


def _read_lines(name: str, value: object, problems: list[str]) -> list[str]:
    lines = [value] if isinstance(value, str) else value
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        return lines
    problems.append(f"data.template.options.{name} must be text or a list of lines, got {value!r}")
    return []
