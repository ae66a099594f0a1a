from __future__ import annotations

import builtins
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from flowmesh_trl.rewards import GROUP, Reward, answer_text, load_rewards

from flowmesh_core import (
    ContractError,
    ExecutionError,
    ExecutorUnavailableError,
    InputError,
)

MODULE = """
def vowels(prompts, completions, completion_ids, **columns):
    return [columns.get("factor", 1) * sum(c in "aeiou" for c in text) for text in completions]

class Bonus:
    def __init__(self, amount):
        self.amount = amount
    def __call__(self, *, completions, **columns):
        return [self.amount] * len(completions)

async def slow(**columns):
    return []

number = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with rewards of its own."""
    (tmp_path / "acme_rewards.py").write_text(MODULE)
    info = tmp_path / "acme_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rewards\nVersion: 1.0\n")
    names = {"vowels": "vowels", "bonus": "Bonus", "slow": "slow", "number": "number"}
    points = "\n".join(f"{name} = acme_rewards:{target}" for name, target in names.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\ngone = acme_rewards:gone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def score(name: str, *texts: Any, columns: Any = None, **options: Any) -> list[float | None]:
    """Score texts with one rule, a token for each word."""
    (reward,) = load_rewards([{"name": name, "options": options}])
    return reward(
        prompts=["?"] * len(texts),
        completions=list(texts),
        completion_ids=[str(text).split() for text in texts],
        trainer_state=object(),
        **(columns or {}),
    )


def test_length_is_right_at_its_target_and_less_beside_it() -> None:
    assert score("length", "a b", "a", "a b c", "a b c d e", target=2) == [1, 0.5, 0.5, 0]
    assert score("length", "abcd", "ab", target=4, unit="chars") == [1, 0.5]


def test_length_is_right_between_its_bounds() -> None:
    texts = ["a", "a b", "a b c", "a b c d e f"]
    assert score("length", *texts, min=2, max=3, unit="words") == [0.5, 1, 1, 0.5]
    assert score("length", "", "a b", max=1) == [1, 0.5]


def test_regex_searches_or_takes_the_whole_answer() -> None:
    assert score("regex", "is 42!", "42", "no", pattern=r"\d+") == [1, 1, 0]
    assert score("regex", "is 42!", "42", pattern=r"\d+", match="full") == [0, 1]


def test_contains_gives_the_share_that_is_found() -> None:
    assert score("contains", "Red and blue", "none", texts=["red", "blue"]) == [0.5, 0]
    assert score("contains", "Red and blue", texts=["red", "blue"], ignore_case=True) == [1]
    assert score("contains", "Red", texts="Red") == [1]


def test_exact_match_compares_with_a_column() -> None:
    columns = {"answer": ["Paris", "Rome", None, 4]}
    given = [" Paris\n", "rome", "x", "4"]
    assert score("exact_match", *given, columns=columns) == [1, 0, None, 1]
    columns = {"city": ["Rome"]}
    assert score("exact_match", "rome", columns=columns, column="city", ignore_case=True) == [1]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("so 3 + 1 = 4", 4, 1),
        ("so 3 + 1 = 4 apples of 5", 4, 0),
        ("it is $1,234.50.", "#### 1234.5", 1),
        ("1,2", 2, 1),
        ("10-5", "5", 1),
        ("minus: -5", -5, 1),
        ("5", -5, 0),
        (".5", 0.5, 1),
        ("2e3", 2000, 1),
        ("no idea", 0, 0),
        ("0.3000001", 0.3, 1),
        ("0.31", 0.3, 0),
        ("anything", None, None),
    ],
)
def test_numeric_match_compares_the_last_numbers(text: str, reference: Any, expected: Any) -> None:
    assert score("numeric_match", text, columns={"answer": [reference]}) == [expected]


def test_numeric_match_needs_a_number_to_compare_with() -> None:
    with pytest.raises(InputError, match="'numeric_match': the column 'answer' must hold a number"):
        score("numeric_match", "4", columns={"answer": ["four"]})


def test_json_valid_takes_nothing_but_json() -> None:
    assert score("json_valid", '{"a": 1}', "[", "NaN", "x {}", " 3 ") == [1, 0, 0, 0, 1]
    assert score("json_valid", "[" * 100_000) == [0]


def test_json_valid_checks_a_schema() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"]}
    assert score("json_valid", '{"a": 1}', '{"b": 1}', "[", schema=schema) == [1, 0, 0]
    with pytest.raises(InputError, match="schema of 'json_valid' is no JSON schema"):
        load_rewards([{"name": "json_valid", "options": {"schema": {"type": 5}}}])


def test_a_schema_needs_its_package_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name == "jsonschema":
            raise builtins.ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ExecutorUnavailableError, match="needs the package jsonschema"):
        load_rewards([{"name": "json_valid", "options": {"schema": {}}}])
    assert score("json_valid", "{}") == [1]


def test_repetition_is_punished() -> None:
    assert score("repetition", "a b c d", "a a a a", "a", words=1) == [0, -0.75, 0]
    assert score("repetition", "go on go on go on", words=2) == [pytest.approx(2 / 5 - 1)]


def test_a_missing_column_is_named_with_the_reward() -> None:
    with pytest.raises(InputError, match=r"'exact_match': the data has no column 'answer'.* n$"):
        score("exact_match", "a", columns={"n": ["1"]})


def test_a_chat_is_scored_by_what_the_assistant_said() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "let me see"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "2"},
    ]
    assert answer_text(turns) == "let me see\n2"
    assert score("regex", turns, pattern="1") == [0]


def test_rewards_have_weights_and_names_of_their_own() -> None:
    rules: list[Any] = [
        {"name": "regex", "weight": 2, "options": {"pattern": "a"}},
        {"name": "regex", "options": {"pattern": "b"}},
        {"name": "repetition"},
    ]
    found = load_rewards(rules)
    assert [(reward.name, reward.weight) for reward in found] == [
        ("regex", 2),
        ("regex_2", 1),
        ("repetition", 1),
    ]
    assert [reward.__name__ for reward in found] == ["regex", "regex_2", "repetition"]


@pytest.mark.usefixtures("installed")
def test_installed_functions_get_columns_and_options() -> None:
    entries: list[Any] = [
        {"name": "vowels", "options": {"factor": 10}},
        {"name": "vowels"},
        {"name": "bonus", "options": {"amount": 7}},
    ]
    given = {"prompts": ["?"], "completions": ["abe"], "completion_ids": [[1]]}
    assert [reward(**given) for reward in load_rewards(entries)] == [[20], [2], [7]]
    first, plain, _bonus = load_rewards(entries)
    assert (first(**given, factor=3), plain(**given, factor=3)) == ([20], [6])


@pytest.mark.usefixtures("installed")
def test_what_is_installed_and_no_reward_is_refused() -> None:
    entries = [{"name": name} for name in ("beauty", "gone", "slow", "number", "bonus")]
    with pytest.raises(ContractError) as caught:
        load_rewards(entries)
    told = caught.value.problems
    assert told[0].startswith("spec.reward[0]: 'beauty' is none of the rules (contains, exact_")
    assert "known are bonus, gone, number, slow, vowels" in told[0]
    assert "driver 'gone' cannot be loaded" in told[1]
    assert "'slow' of flowmesh.trl.rewards must be a function that is not async" in told[2]
    assert "'number' of flowmesh.trl.rewards must be a function" in told[3]
    assert "options of 'bonus' do not fit" in told[4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'mine' must return a value for each of 2 completions, got 1"),
        ([1.0, 2.0, 3.0], "for each of 2 completions, got 3"),
        ([1.0, math.nan], "finite numbers or None, got nan for completion 1"),
        ([math.inf, 1.0], "finite numbers or None, got inf for completion 0"),
        (["good", 1.0], "finite numbers or None, got 'good' for completion 0"),
        (None, "'mine' must return a list of 2 numbers, got NoneType"),
    ],
)
def test_what_a_reward_returns_is_checked(values: Any, message: str) -> None:
    reward = Reward(name="mine", function=lambda **_columns: values)
    with pytest.raises(ExecutionError, match=message):
        reward(prompts=["a", "b"], completions=["c", "d"])


def test_a_reward_may_have_nothing_to_say() -> None:
    reward = Reward(name="mine", function=lambda **_columns: (None, 2))
    assert reward(prompts=["a", "b"], completions=["c", "d"]) == [None, 2.0]
