"""What inference engines write alike: prompts, seeds, items and results."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh_core import EmbeddingResult, InferenceResult, InputError, ModelRef, Row
from flowmesh_core.answers import (
    Answer,
    build_item,
    build_messages,
    build_result,
    build_text,
    build_vector_item,
    derive_seed,
    normalize,
)

USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief"}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=5)}
    ),
    min_size=1,
    max_size=4,
)
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.integers(0, 2**40)
VECTORS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20)
ANSWERS = st.lists(
    st.builds(
        Answer,
        text=st.text(max_size=5),
        finish_reason=st.sampled_from(["stop", "length", None]),
        tokens=st.integers(0, 9),
    ),
    min_size=1,
    max_size=4,
)
COUNTS = {"prompt_tokens": 3, "completion_tokens": 4, "latency_s": 0.5}


def row(prompt: Any = "hi", **fields: Any) -> Row:
    return Row(index=5, prompt=prompt, **fields)


def answer(text: str = "yes", **fields: Any) -> Answer:
    return Answer(**{"text": text, "finish_reason": "stop", "tokens": 1, **fields})


# Prompts.


def test_a_plain_prompt_gets_the_system_prompt_as_its_first_line() -> None:
    assert build_text(row("hi"), "Be brief") == "Be brief\nhi"
    assert build_text(row("hi"), None) == build_text(row("hi"), "") == "hi"
    assert build_text(row("hi", add_system_prompt=False), "Be brief") == "hi"


def test_a_chat_gets_the_system_prompt_as_a_message() -> None:
    assert build_messages(row("hi"), "Be brief") == [SYSTEM, USER]
    assert build_messages(row([USER]), "Be brief") == [SYSTEM, USER]
    assert build_messages(row([USER]), None) == build_messages(row([USER]), "") == [USER]
    assert build_messages(row([USER], add_system_prompt=False), "Be brief") == [USER]


def test_messages_with_a_system_message_keep_their_own() -> None:
    own = [{"role": "system", "content": "mine"}, USER]
    assert build_messages(row(own), "theirs") == own
    late = [USER, {"role": "system", "content": "mine"}]
    assert build_messages(row(late), "Be brief") == [SYSTEM, *late]


@given(MESSAGES, st.none() | st.text(max_size=5), st.booleans())
def test_messages_stay_as_they_are_behind_at_most_one_of_ours(
    own: list[dict[str, Any]], system_prompt: str | None, add: bool
) -> None:
    before = copy.deepcopy(own)
    built = build_messages(row(own, add_system_prompt=add), system_prompt)
    added = len(built) - len(own)
    assert built[added:] == own == before
    wanted = bool(system_prompt) and add and own[0]["role"] != "system"
    assert built[:added] == [{"role": "system", "content": system_prompt}] * wanted
    built.append(USER)
    assert own == before


def test_messages_without_a_chat_template_are_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"need a chat template: use .* model that has one, or"):
        build_text(row([USER]), None)


# Seeds.


@given(SEEDS, ROWS, st.integers(0, 63))
def test_a_seed_fits_every_engine_and_seeds_add_up(seed: int, index: int, choice: int) -> None:
    derived = derive_seed(seed, index, choice)
    assert derived is not None
    assert 0 <= derived < 2**32 - 1
    assert derived == derive_seed(seed + choice, index, 0)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_rows_and_choices_have_seeds_of_their_own(seed: int) -> None:
    seeds = {derive_seed(seed, index, choice) for index in range(50) for choice in range(50)}
    assert len(seeds) == 2500


def test_a_seed_gives_the_same_answers_in_every_version_and_process() -> None:
    assert derive_seed(0, 0, 0) == 1_285_674_079
    assert derive_seed(7, 3, 2) == derive_seed(9, 3, 0) == 1_661_461_920


def test_the_largest_number_is_never_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    class AllOnes:  # no seed is known whose own digest is this one
        def __init__(self, _data: bytes, *, digest_size: int) -> None:
            self.size = digest_size

        def digest(self) -> bytes:
            return b"\xff" * self.size

    monkeypatch.setattr("hashlib.blake2b", AllOnes)
    assert derive_seed(1, 2, 3) == 0


def test_without_a_seed_there_is_none() -> None:
    assert derive_seed(None, 3, 2) is None


# Vectors.


@given(VECTORS)
def test_a_normalized_vector_has_length_one_and_its_direction(vector: list[float]) -> None:
    length = math.hypot(*vector)
    if length == 0:
        assert normalize(vector) == vector
        return
    unit = normalize(vector)
    assert math.hypot(*unit) == pytest.approx(1)
    assert [value * length for value in unit] == pytest.approx(vector)


def test_what_is_normalized_stays_as_it_was() -> None:
    vector = (3.0, 4.0)
    assert normalize(vector) == [0.6, 0.8]
    assert vector == (3.0, 4.0)


# Items and results.


@given(ANSWERS)
def test_an_item_holds_its_first_answer_and_all_when_there_are_several(
    answers: list[Answer],
) -> None:
    item = build_item(row("hi"), "<hi>", answers)
    told = [{"output": one.text, "finish_reason": one.finish_reason} for one in answers]
    assert {key: item[key] for key in ("output", "finish_reason")} == told[0]
    assert item.get("choices") == (told if len(told) > 1 else None)
    read = InferenceResult.model_validate(build_result(None, [item], **COUNTS)).items[0]
    assert json.loads(json.dumps(item)) == read.model_dump(exclude_unset=True)


def test_an_item_keeps_the_rows_own_fields_beside_the_prompts() -> None:
    item = build_item(row([USER], metadata={"k": 1, "prompt": "its own"}), "<user>hi", [answer()])
    assert item == {
        "index": 5,
        "prompt": "<user>hi",
        "output": "yes",
        "finish_reason": "stop",
        "metadata": {"k": 1, "prompt": [USER], "rendered_prompt": "<user>hi"},
    }


def test_log_probabilities_stand_beside_the_answer_that_has_them() -> None:
    logprobs = [{"token": "yes", "logprob": -0.5}]
    item = build_item(row(), "hi", [answer(logprobs=logprobs), answer("no"), answer(logprobs=())])
    assert item["logprobs"] == logprobs
    assert item["choices"][0]["logprobs"] == logprobs
    assert "logprobs" not in item["choices"][1]
    assert item["choices"][2]["logprobs"] == []


def test_a_result_is_the_shared_one() -> None:
    items = [build_item(row(), "hi", [answer()]), build_item(row("b"), "b", [answer()])]
    built = build_result(ModelRef(identifier="acme/small"), items, **COUNTS)
    assert list(built) == ["ok", "model", "items", "usage"]
    result = InferenceResult.model_validate(built)
    assert (result.model, [item.prompt for item in result.items]) == ("acme/small", ["hi", "b"])
    assert built["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "latency_sec": 0.5,
        "num_requests": 2,
    }
    assert json.loads(json.dumps(built)) == built


def test_a_result_of_a_task_that_names_no_model_has_an_empty_name() -> None:
    assert build_result(None, [], **COUNTS)["model"] == ""


def test_vectors_come_with_the_rows_own_fields_and_further_ones_of_the_result() -> None:
    item = build_vector_item(row(metadata={"k": 1, "prompt": "its own"}), (0.5, 1.0))
    metadata = {"k": 1, "prompt": "hi"}
    assert item == {"index": 5, "embedding": [0.5, 1.0], "metadata": metadata}
    built = build_result(None, (item,), **COUNTS, dimensions=2)
    assert list(built) == ["ok", "model", "dimensions", "items", "usage"]
    assert built["items"] == [item]
    assert EmbeddingResult.model_validate(built).dimensions == 2


def test_none_of_it_loads_an_ml_library_or_the_models_of_specs(tmp_path: Path) -> None:
    for name in ("torch", "pydantic", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was loaded')")
    code = (
        "from flowmesh_core import Answer, Row, build_item, build_messages, build_result\n"
        "row = Row(index=0, prompt='hi')\n"
        "answer = Answer(text='yes', finish_reason=None, tokens=1)\n"
        "items = [build_item(row, str(build_messages(row, 's')), [answer])]\n"
        "print(build_result(None, items, prompt_tokens=1, completion_tokens=1, latency_s=0)['ok'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "True\n", done.stderr
