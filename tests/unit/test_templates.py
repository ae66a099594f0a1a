from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core.errors import ContractError
from flowmesh_core.templates import (
    MAX_DEPTH,
    Reference,
    graph_template_stages,
    listing,
    map_strings,
    references,
    render,
    render_env,
    render_graph_template,
    type_name,
    walk,
)

RESULT = {
    "task_id": "t-1",
    "result": {
        "items": [{"output": "blue"}, {"output": "red"}],
        "grid": [[1, 2], [3, 4]],
        "usage": {"tokens": 7},
        "empty": [],
        "nothing": None,
    },
}

# Pieces, since single letters would hardly ever spell a reference.
PIECES = ["$", "{", "}", "${", "$${", "env.", "A", "A}", "${env.A}", "{env.A}", " ", "a.b", "é"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
KEYS = st.text(alphabet="abc_-", min_size=1, max_size=4)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


def find(reference: Reference) -> object:
    return walk({"a": RESULT}[reference.stage], reference.path, reference=reference.text)


def nested(depth: int) -> list[Any]:
    document: list[Any] = []
    for _ in range(depth - 1):
        document = [document]
    return document


class TestWalk:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("task_id", "t-1"),
            ("result.items.1.output", "red"),
            ("result.items[1].output", "red"),
            ("result.grid[1][0]", 3),
            ("result.grid.1[0]", 3),
            ("result.grid[1].0", 3),
            ("result.usage", {"tokens": 7}),
        ],
    )
    def test_both_spellings_of_an_index_lead_to_the_same_place(
        self, path: str, expected: object
    ) -> None:
        assert walk(RESULT, path, reference=f"a.{path}") == expected

    def test_a_path_may_begin_with_an_index(self) -> None:
        assert walk([[5, 6]], "[0][1]", reference="x") == 6

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("results", "no key 'results' in the result; keys: task_id, result"),
            ("result.item", "no key 'item' in 'result'; keys: items, grid, usage, empty, nothing"),
            ("result.items.2", "'result.items' is a list and takes an index below 2, got '2'"),
            ("result.items[-1]", "no key 'items[-1]' in 'result'; keys: items"),
            ("result.items.x", "'result.items' is a list and takes an index below 2, got 'x'"),
            ("result.items.-1", "takes an index below 2, got '-1'"),
            ("result.items." + "9" * 5000, "takes an index below 2, got '99"),
            ("result.items.\u0661", "takes an index below 2, got '\u0661'"),
            ("result.empty[0]", "'result.empty' is a list and takes nothing, the list is empty"),
            ("task_id.0", "'task_id' is str and has no '0'"),
            ("result.nothing.x", "'result.nothing' is null and has no 'x'"),
            ("result.nothing", "'result.nothing' is null"),
            ("", "no key '' in the result"),
            ("result..items", "no key '' in 'result'"),
        ],
    )
    def test_a_step_that_leads_nowhere_is_named(self, path: str, reason: str) -> None:
        wanted = f"^Missing value for reference 'a.x': .*{re.escape(reason)}"
        with pytest.raises(ContractError, match=wanted):
            walk(RESULT, path, reference="a.x")

    def test_at_most_eight_keys_are_named(self) -> None:
        with pytest.raises(
            ContractError, match=r"keys: k0, k1, k2, k3, k4, k5, k6, k7 and 92 more"
        ):
            walk({f"k{number}": 1 for number in range(100)}, "x", reference="a.x")

    @given(document=JSON, data=st.data())
    def test_every_value_that_is_not_null_is_found_by_its_path(
        self, document: Any, data: st.DataObject
    ) -> None:
        value, path = document, ""
        while isinstance(value, (dict, list)) and value:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = data.draw(st.sampled_from(keys))
            bracket = isinstance(value, list) and data.draw(st.booleans())
            path += f"[{key}]" if bracket else f".{key}" if path else str(key)
            value = value[key]
        if path and value is not None:
            assert walk(document, path, reference="r") is value


class TestReferences:
    def test_each_is_split_at_its_first_dot(self) -> None:
        found = references({"a": ["${s.x.y} ${ t.z }", {"b": "${env.TOKEN}${bare}"}], "n": 1})
        assert found == {
            Reference(text="s.x.y", stage="s", path="x.y"),
            Reference(text="t.z", stage="t", path="z"),
            Reference(text="env.TOKEN", stage="env", path="TOKEN"),
            Reference(text="bare", stage="bare", path=""),
        }
        assert {item.text for item in found if item.is_env} == {"env.TOKEN"}

    def test_keys_escapes_and_upstream_results_hold_none(self) -> None:
        document = {"${k.x}": "$${s.x}", "_upstreamResults": {"s": {"result": "${s.x}"}}, "b": "${"}
        assert references(document) == set()


class TestDepth:
    def test_the_limit_itself_is_allowed(self) -> None:
        assert render(nested(MAX_DEPTH), find) == nested(MAX_DEPTH)

    @pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 50_000])
    def test_a_deeper_document_is_refused(self, depth: int) -> None:
        document = nested(depth)
        with pytest.raises(ContractError, match="nested 100 levels deep, got more"):
            references(document)
        with pytest.raises(ContractError, match="nested 100 levels deep"):
            render(document, find)
        with pytest.raises(ContractError, match="nested 100 levels deep"):
            render_env(document, (), {})

    def test_a_document_that_contains_itself_is_refused(self) -> None:
        document: dict[str, Any] = {"a": "b"}
        document["again"] = [document]
        with pytest.raises(ContractError, match="alias that makes it contain itself"):
            references(document)

    def test_a_deep_value_within_text_is_refused(self) -> None:
        with pytest.raises(ContractError, match="nested 100 levels deep"):
            render("see ${a.b}", lambda _: nested(MAX_DEPTH + 1))


class TestRender:
    def test_a_whole_reference_keeps_its_type(self) -> None:
        document = {"n": "${a.result.usage.tokens}", "l": ["${a.result.grid}"], "s": "${a.task_id}"}
        assert render(document, find) == {"n": 7, "l": [[[1, 2], [3, 4]]], "s": "t-1"}

    def test_a_reference_within_text_becomes_text(self) -> None:
        values = {"t": True, "n": 1.5, "s": "ü", "l": ["ü", None], "m": {"k": "ü"}}
        text = render("${v.t}|${v.n}|${v.s}|${v.l}|${v.m}", lambda item: values[item.path])
        assert text == 'True|1.5|ü|["ü", null]|{"k": "ü"}'

    def test_keys_numbers_and_upstream_results_stay(self) -> None:
        document = {"${a.task_id}": 1, "x": None, "_upstreamResults": {"a": ["${a.task_id}"]}}
        assert render(document, find) == document

    def test_no_argument_changes(self) -> None:
        document = {"spec": {"x": ["${a.result.grid}"]}}
        before, result = copy.deepcopy(document), copy.deepcopy(RESULT)
        rendered: Any = render(document, find)
        rendered["spec"]["x"][0][0][0] = "changed"
        assert document == before
        assert result == RESULT

    def test_an_escape_is_literal_text(self) -> None:
        assert render("$${HOME}/$${a.task_id}/${a.task_id}", find) == "${HOME}/${a.task_id}/t-1"

    def test_environment_references_stay(self) -> None:
        document = ["${env.KEY}", "Bearer ${env.KEY} for ${a.task_id}"]
        assert render(document, find) == ["${env.KEY}", "Bearer ${env.KEY} for t-1"]

    def test_what_looks_up_badly_is_raised(self) -> None:
        with pytest.raises(ContractError, match=r"reference 'a\.result\.model'"):
            render("x ${a.result.model}", find)

    @given(text=TEXT)
    def test_escaped_text_comes_through_both_renderings_as_it_was(self, text: str) -> None:
        escaped = text.replace("${", "$${")
        assert render_env(render(escaped, find), {"A"}, {"A": "secret"}) == (text, {})

    @given(value=JSON)
    def test_a_result_is_never_read_as_a_reference_to_a_secret(self, value: Any) -> None:
        rendered = render("${a.b}", lambda _: value)
        assert render_env(rendered, {"A", "nv.A"}, {"A": "secret"}) == (value, {})

    @given(parts=st.lists(TEXT, min_size=1, max_size=4))
    def test_results_side_by_side_spell_no_reference_to_a_secret(self, parts: list[str]) -> None:
        template = "".join(f"${{p.{number}}}" for number in range(len(parts))) + "!"
        rendered = render(template, lambda item: parts[int(item.path)])
        assert render_env(rendered, {"A"}, {"A": "secret"}) == ("".join(parts) + "!", {})

    def test_a_secret_split_over_two_results_stays_split(self) -> None:
        halves = {"x": "$", "y": "{env.A}"}
        rendered = render("${p.x}${p.y} ${env.A}", lambda item: halves[item.path])
        assert render_env(rendered, {"A"}, {"A": "s3cret"}) == ("${env.A} s3cret", {"A": "s3cret"})


class TestRenderEnv:
    def test_only_environment_references_are_resolved(self) -> None:
        document = {"h": ["Bearer ${env.KEY}", "${ env.URL }"], "o": "${a.b} $${c} ${d}", "n": 3}
        rendered, used = render_env(document, ["KEY", "URL"], {"KEY": "k", "URL": "u", "X": "x"})
        assert rendered == {"h": ["Bearer k", "u"], "o": "${a.b} $${c} ${d}", "n": 3}
        assert used == {"KEY": "k", "URL": "u"}

    def test_upstream_results_are_data(self) -> None:
        document = {"_upstreamResults": {"a": {"result": "${env.KEY}"}}}
        assert render_env(document, ["KEY"], {"KEY": "k"}) == (document, {})

    def test_a_value_is_not_rendered_again(self) -> None:
        environ = {"A": "${env.B}", "B": "b"}
        assert render_env("${env.A}", ["A", "B"], environ) == ("${env.B}", {"A": "${env.B}"})

    def test_an_escape_is_literal_text(self) -> None:
        assert render_env("$${env.KEY}", ["KEY"], {"KEY": "k"}) == ("${env.KEY}", {})

    def test_an_empty_variable_is_set(self) -> None:
        assert render_env("<${env.A}>", ["A"], {"A": ""}) == ("<>", {"A": ""})

    def test_every_problem_is_told_once_and_no_value_with_it(self) -> None:
        document = ["${env.ROOT}", "${env.GONE} ${env.ROOT}", "${env.KEY}"]
        with pytest.raises(ContractError, match="GONE") as caught:
            render_env(document, ["GONE", "KEY"], {"ROOT": "r00t", "KEY": "k3y"})
        assert list(caught.value.problems) == [
            "'${env.ROOT}' is not allowed on this worker;"
            " its operator must add ROOT to FLOWMESH_ENV_ALLOW",
            "'${env.GONE}' is allowed but GONE is not set; set it where the worker runs",
        ]


UPSTREAM: dict[str, dict[str, Any]] = {
    "solar": {"result": {"items": [{"output": "sunny"}], "n": 3, "ok": True}},
    "wind-b": {"result": {"items": ["{col1_value}"], "none": None, "map": {"k": "é"}}},
}
COLUMNS = [
    {"label": "Solar", "expr": "solar.result.items[0].output"},
    {"node": "wind-b", "path": "result.map"},
]


class TestGraphTemplate:
    def test_the_briefing_is_the_default(self) -> None:
        assert render_graph_template({"columns": COLUMNS}, UPSTREAM).split("\n") == [
            "You are acting as energy strategist.",
            "Write one briefing from these findings:",
            "• Solar: sunny",
            '• Column 2: {"k": "é"}',
        ]

    def test_the_briefing_takes_role_intro_and_closing(self) -> None:
        options = {"role": "editor", "intro": ["One.", "Two."], "closing": "End."}
        template = {"name": "two_column_briefing", "columns": COLUMNS, "options": options}
        assert render_graph_template(template, UPSTREAM).split("\n") == [
            "You are acting as editor.",
            "One.",
            "Two.",
            "• Solar: sunny",
            '• Column 2: {"k": "é"}',
            "End.",
        ]

    def test_an_intro_alone_names_no_role(self) -> None:
        template = {"columns": COLUMNS, "options": {"intro": "Compare.", "closing": ["A", "B"]}}
        prompt = render_graph_template(template, UPSTREAM)
        assert prompt.startswith("Compare.\n• Solar")
        assert prompt.endswith("\nA\nB")

    @pytest.mark.parametrize("name", [None, "mine"])
    def test_another_name_fills_the_text(self, name: str | None) -> None:
        template = {
            "name": name,
            "columns": [*COLUMNS, {"expr": "solar.result.n"}, {"expr": "solar.result.ok"}],
            "text": "{col1_label}={col1_value} {col2_value} {col3_value}{col4_value}",
        }
        assert render_graph_template(template, UPSTREAM) == 'Solar=sunny {"k": "é"} 3True'

    def test_text_keeps_what_it_does_not_know_and_follows_no_attribute(self) -> None:
        text = "{col9_value} {col1_value.__class__} {x} {} {{ {col1_value!r} { {col0_label}"
        assert render_graph_template({"columns": COLUMNS, "text": text}, UPSTREAM) == text

    def test_a_value_is_not_filled_again(self) -> None:
        template = {"columns": [{"expr": "wind-b.result.items.0"}], "text": "<{col1_value}>"}
        assert render_graph_template(template, UPSTREAM) == "<{col1_value}>"

    @pytest.mark.parametrize("expr", ["gone.result", "solar.result.x", "wind-b.result.none"])
    @pytest.mark.parametrize("default", ["?", "", 0])
    def test_a_default_stands_for_what_is_missing_or_null(self, expr: str, default: object) -> None:
        template = {"columns": [{"expr": expr, "default": default}], "text": "<{col1_value}>"}
        assert render_graph_template(template, UPSTREAM) == f"<{default}>"

    def test_a_stage_alone_is_its_whole_document(self) -> None:
        template = {"columns": [{"node": "solar"}], "text": "{col1_value}"}
        assert json.loads(render_graph_template(template, UPSTREAM)) == UPSTREAM["solar"]

    @given(value=JSON.filter(lambda value: value is not None))
    def test_any_value_becomes_text_as_it_is_or_as_json(self, value: Any) -> None:
        template = {"columns": [{"expr": "s.v"}], "text": "{col1_value}"}
        prompt = render_graph_template(template, {"s": {"v": value}})
        if isinstance(value, (dict, list)):
            assert json.loads(prompt) == value
        else:
            assert prompt == str(value)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ({}, "columns must be a non-empty list, got null"),
            ({"columns": []}, r"columns must be a non-empty list, got an empty one"),
            ({"columns": {"a": 1}}, "columns must be a non-empty list, got dict"),
            ({"columns": COLUMNS[:1]}, "two_column_briefing needs two columns or more, got 1"),
            ({"columns": COLUMNS, "options": "x"}, "options must be a mapping, got str"),
            (
                {"columns": COLUMNS, "options": {"intro": 5, "closing": ["a", 1]}},
                r"intro must be text or a list of lines, got 5; .*closing .* got \['a', 1\]",
            ),
            (
                {"columns": COLUMNS, "name": "three"},
                "name 'three' is unknown; use two_column_briefing, or add data.template.text",
            ),
            ({"columns": COLUMNS, "text": ["a"]}, "template.text must be a string, got list"),
            (
                {"columns": ["solar", {"label": "x"}, {"node": "solar", "path": 1}], "text": "x"},
                "column 1 must be a mapping with expr.*'solar'; column 2 must.*; column 3 must",
            ),
            (
                {"columns": [{"expr": "sun.result"}, {"expr": "solar.result.x"}], "text": "x"},
                "column 1: .*'sun.result': no result of stage 'sun'; stages: solar, wind-b;"
                " column 2: .*'solar.result.x': no key 'x' in 'result'; keys: items, n, ok",
            ),
        ],
    )
    def test_a_faulty_template_is_refused(self, template: dict[str, Any], message: str) -> None:
        with pytest.raises(ContractError, match=message):
            render_graph_template(template, UPSTREAM)

    def test_without_results_there_is_nothing_to_show(self) -> None:
        with pytest.raises(ContractError, match="needs the results of earlier stages, got none"):
            render_graph_template({"columns": COLUMNS}, {})

    def test_the_stages_it_needs_are_named(self) -> None:
        columns = [*COLUMNS, {"expr": "c"}, {"label": "x"}, "y", {"node": 4}]
        assert graph_template_stages({"columns": columns}) == {"solar", "wind-b", "c"}
        assert graph_template_stages({"columns": "x"}) == set()
        assert graph_template_stages({}) == set()


def test_messages_spell_null_and_count_what_they_leave_out() -> None:
    assert (type_name(None), type_name([])) == ("null", "list")
    assert (listing([]), listing("ab")) == ("none", "a, b")
    assert listing(range(9)) == "0, 1, 2, 3, 4, 5, 6, 7 and 1 more"


@given(document=JSON)
def test_a_copy_is_equal_and_shares_no_container(document: Any) -> None:
    made = map_strings(document, str)
    assert made == document
    assert not isinstance(document, (dict, list)) or made is not document
