from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import InputError, RowSource

pytest.importorskip("datasets")

from flowmesh_trl.data import build_dataset, build_datasets

Build = Callable[..., list[dict[str, Any]]]

ASK = {"role": "user", "content": "how much?"}
SAY = {"role": "assistant", "content": "four"}
OTHER = {"role": "assistant", "content": "five"}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(task_type: str, *records: Any, data: Any = None, **options: Any) -> Any:
        rows = RowSource.from_records(records)
        return list(build_dataset(task_type, rows, data or {}, folder=tmp_path, **options))

    return build


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize(
    ("record", "data", "expected"),
    [
        ({"text": "a", "n": 1}, {}, {"text": "a"}),
        ({"body": "a", "text": "b"}, {"text_field": "body"}, {"text": "a"}),
        ({"body": "a"}, {"jsonl": {"text_field": "body"}}, {"text": "a"}),
        ({"prompt": "a", "response": "b"}, {}, {"text": "a\n\nb"}),
        ({"question": "a", "answer": "b"}, {"separator": ""}, {"text": "ab"}),
        (
            {"q": "a", "r": "b", "text": "c"},
            {"prompt_field": "q", "response_field": "r", "separator": " "},
            {"text": "a b"},
        ),
        ({"prompt": "a", "response": "b"}, {"prompt_field": "prompt"}, {"text": "a"}),
        ({"prompt": "a", "response": "b"}, {"response_field": "response"}, {"text": "b"}),
        ({"prompt": "a"}, {}, {"text": "a"}),
        ({"messages": [ASK, SAY]}, {}, {"messages": [ASK, SAY]}),
        ({"prompt": [ASK], "completion": "four"}, {}, {"messages": [ASK, SAY]}),
        (
            {"conversations": [{"from": "human", "value": "how much?"}, {**SAY}]},
            {},
            {"messages": [ASK, SAY]},
        ),
    ],
)
def test_supervised_rows_become_one_text_or_one_chat(
    build: Build, record: Any, data: Any, expected: Any
) -> None:
    assert build("lora_sft", record, data=data) == [expected]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "response": "b"}, {"prompt": "a\n\n", "completion": "b"}),
        ({"messages": [ASK, SAY]}, {"prompt": [ASK], "completion": [SAY]}),
        ({"prompt": [ASK], "completion": "four"}, {"prompt": [ASK], "completion": [SAY]}),
    ],
)
def test_with_loss_on_answers_alone_prompt_and_answer_stay_apart(
    build: Build, record: Any, expected: Any
) -> None:
    assert build("sft", record, completion_only=True) == [expected]


def test_loss_on_answers_alone_needs_an_answer(build: Build) -> None:
    with pytest.raises(InputError, match=r"record 1: training.completion_only_loss needs a prompt"):
        build("sft", {"text": "a"}, completion_only=True)
    with pytest.raises(InputError, match="messages must end with the assistant's answer"):
        build("sft", {"messages": [SAY, ASK]}, completion_only=True)


def test_messages_keep_their_own_keys_alone(build: Build) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    rows: list[dict[str, Any]] = [
        {"messages": [ASK, call], "tools": [{"name": "add"}]},
        {"messages": [ASK, SAY]},
    ]
    assert build("sft", *rows) == [rows[0], {**rows[1], "tools": None}]


def test_what_the_first_row_lacks_is_not_dropped_from_later_ones(build: Build) -> None:
    with pytest.raises(InputError, match="record 2: has tools, which the first row has not"):
        build("sft", {"messages": [ASK, SAY]}, {"messages": [ASK, SAY], "tools": []})
    with pytest.raises(InputError, match="record 2: the column 'b' is not in the first row"):
        build("grpo", {"prompt": "x", "a": 1}, {"prompt": "y", "b": 2})


@pytest.mark.parametrize(
    ("record", "data", "expected"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "n": 1},
            {},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        (
            {"q": "a", "good": "b", "bad": "c"},
            {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        ({"chosen": "ab", "rejected": "ac"}, {}, {"chosen": "ab", "rejected": "ac"}),
        (
            {"prompt": "how much?", "chosen": [SAY], "rejected": [OTHER]},
            {},
            {"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        ),
        (
            {"prompt": [ASK], "chosen": "four", "rejected": "five"},
            {},
            {"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        ),
        (
            {"prompt": "how much?", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
            {},
            {"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        ),
        (
            {"chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
            {},
            {"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        ),
    ],
)
def test_preferences_come_with_their_prompt_or_hold_it(
    build: Build, record: Any, data: Any, expected: Any
) -> None:
    assert build("dpo", record, data=data) == [expected]


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [ASK, SAY], "rejected": [SAY, OTHER]},
        {"chosen": [ASK, SAY], "rejected": [ASK, SAY]},
        {"chosen": [SAY], "rejected": [OTHER]},
    ],
)
def test_preferences_need_one_prompt_and_two_answers(build: Build, record: Any) -> None:
    with pytest.raises(InputError, match="must be two answers to one prompt"):
        build("dpo", record)


def test_reward_rows_keep_their_margin(build: Build) -> None:
    row = {"chosen": "b", "rejected": "c", "margin": 2}
    assert build("reward", row) == [row]
    assert "margin" not in build("dpo", row)[0]
    with pytest.raises(InputError, match="record 2: margin must be a number, got 'much'"):
        build("reward", row, {**row, "margin": "much"})


def test_unpaired_rows_have_a_label(build: Build) -> None:
    rows = [
        {"prompt": "a", "response": "b", "label": 1},
        {"prompt": "a", "response": "c", "label": False},
    ]
    assert build("kto", *rows) == [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False},
    ]
    chat = {"prompt": [ASK], "completion": [SAY], "liked": True}
    assert build("kto", chat, data={"label_field": "liked"}) == [
        {"prompt": [ASK], "completion": [SAY], "label": True}
    ]
    with pytest.raises(InputError, match="label must be true or false, got 'good'"):
        build("kto", {**rows[0], "label": "good"})


def test_unpaired_training_takes_preferences_too(build: Build) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert build("kto", row) == [row]


def test_queries_keep_every_other_column_as_it_was(build: Build) -> None:
    values = ["42", 42, "null", None, 0.5, [1, "2"], {"a": {"b": None}}, "x"]
    rows = [{"question": "a", "solution": value} for value in values]
    assert build("grpo", *rows) == [{"prompt": "a", "solution": value} for value in values]


def test_queries_may_be_chats_that_wait_for_an_answer(build: Build) -> None:
    assert build("grpo", {"messages": [ASK], "n": 1}) == [{"prompt": [ASK], "n": 1}]
    named = build("grpo", {"q": [ASK], "messages": [SAY]}, data={"prompt_field": "q"})
    assert named == [{"prompt": [ASK], "messages": [SAY]}]
    with pytest.raises(InputError, match=r"must end with a message of user or tool.*'assistant'"):
        build("grpo", {"messages": [ASK, SAY]})


@pytest.mark.parametrize("name", ["completions", "trainer_state", "prompt"])
def test_columns_that_trl_calls_otherwise_are_refused(build: Build, name: str) -> None:
    with pytest.raises(InputError, match=f"no column may be called '{name}'"):
        build("grpo", {"q": "a", name: "b"}, data={"prompt_field": "q"})


def test_ppo_gets_tokens_beside_prompt_and_columns(build: Build, tokenizer: Any) -> None:
    plain = {"prompt_format": "plain"}
    (text,) = build("ppo", {"query": "the fox", "n": "1"}, data=plain, tokenizer=tokenizer)
    assert text == {
        "prompt": "the fox",
        "n": "1",
        "input_ids": tokenizer("the fox")["input_ids"],
    }
    (chat,) = build("ppo", {"messages": [ASK]}, tokenizer=tokenizer)
    assert tokenizer.decode(chat["input_ids"]) == "<|user|>how much?<|end|><|assistant|>"


def test_a_query_that_is_too_long_is_left_out_only_when_asked(build: Build, tokenizer: Any) -> None:
    rows = [{"query": "the fox"}, {"query": "the fox " * 20}]
    known: dict[str, Any] = {"tokenizer": tokenizer, "max_query_length": 10}
    plain = {"prompt_format": "plain"}
    with pytest.raises(InputError, match=r"record 2: the prompt has .* at most 10 are allowed"):
        build("ppo", *rows, data=plain, **known)
    kept = build("ppo", *rows, data={"drop_too_long": True, **plain}, **known)
    assert [row["prompt"] for row in kept] == ["the fox"]
    with pytest.raises(InputError, match="every row is too long"):
        build("ppo", rows[1], data={"drop_too_long": True, **plain}, **known)


def test_a_chat_needs_a_template(build: Build, tokenizer: Any) -> None:
    from copy import copy

    assert build("sft", {"messages": [ASK, SAY]}, tokenizer=tokenizer)
    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(InputError, match=r"record 1: becomes a chat, and .* no chat template"):
        build("sft", {"messages": [ASK, SAY]}, tokenizer=bare)
    assert build("sft", {"text": "a"}, tokenizer=bare)
    pair = {"prompt": "a", "response": "b"}
    assert build("sft", pair, tokenizer=bare) == [{"text": "a\n\nb"}]
    with pytest.raises(InputError, match=r"record 1: becomes a chat, .*prompt_format: plain"):
        build("sft", pair, data={"prompt_format": "chat"}, tokenizer=bare)


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("task_type", "record", "expected"),
    [
        ("sft", {"prompt": "a", "response": "b"}, {"messages": [USER, ASSISTANT]}),
        ("sft", {"text": "a"}, {"text": "a"}),
        (
            "dpo",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        ),
        ("dpo", {"chosen": "b", "rejected": "c"}, {"chosen": "b", "rejected": "c"}),
        (
            "kto",
            {"prompt": "a", "completion": "b", "label": True},
            {"prompt": [USER], "completion": [ASSISTANT], "label": True},
        ),
        ("grpo", {"prompt": "a"}, {"prompt": [USER]}),
    ],
)
def test_texts_become_what_the_model_will_be_asked(
    build: Build,
    tokenizer: Any,
    task_type: str,
    record: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    assert build(task_type, record, tokenizer=tokenizer) == [expected]
    for plain in ({"prompt_format": "plain"}, {"separator": "\n"}):
        rows = build(task_type, record, data=plain, tokenizer=tokenizer)
        assert "role" not in str(rows), "as it is"


@pytest.mark.parametrize(
    ("task_type", "record", "message"),
    [
        ("sft", {"body": "a"}, "needs messages, a text, or a prompt .* got the columns body"),
        ("sft", {"answer": "a"}, "needs messages, a text, or a prompt"),
        ("dpo", {"prompt": "a", "chosen": "b"}, "needs a column rejected, .*rejected_field names"),
        ("kto", {"prompt": "a", "completion": "b"}, "needs a column label"),
        ("grpo", {"x": 1}, "needs a column messages or conversations or prompt .* got x"),
        ("sft", {"text": ["a"]}, "text must be a text with something in it, got list"),
        ("sft", {"text": ""}, "text must be a text with something in it, got ''"),
        ("sft", {"messages": []}, "messages must be a list of chat messages, got an empty list"),
        ("sft", {"messages": ["a"]}, r"messages\[0\] must be a message with role and content"),
        ("sft", {"messages": [{"role": "user"}]}, r"messages\[0\] has neither content nor"),
        ("sft", {"messages": [{**ASK, "at": {1}}]}, "record 1: holds what JSON cannot: .*set"),
    ],
)
def test_a_row_that_cannot_be_used_says_what_is_wrong(
    build: Build, task_type: str, record: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(task_type, record)


def test_a_named_column_must_be_in_every_row(build: Build) -> None:
    with pytest.raises(InputError, match=r"record 2: body must be .* no such column among text"):
        build("sft", {"body": "a"}, {"text": "b"}, data={"text_field": "body"})


def test_a_bad_row_of_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": 5}\n')
    rows = RowSource(kind="jsonl", params={"path": str(file)})
    with pytest.raises(InputError, match=r"rows\.jsonl, record 2: text must be .* got 5"):
        build_dataset("sft", rows, {}, folder=tmp_path)
    file.write_text('{"text": "a"}\nnonsense\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2 must be a JSON object"):
        build_dataset("sft", rows, {}, folder=tmp_path)


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        build_dataset("sft", RowSource.from_records([]), {}, folder=tmp_path)
    with pytest.raises(InputError, match=r"spec\.data is required to train \(sft\)"):
        build_datasets("sft", None, None, {}, folder=tmp_path)


def test_rows_for_evaluation_may_name_their_columns_anew(tmp_path: Path) -> None:
    train, held = build_datasets(
        "sft",
        RowSource.from_records([{"a": "1", "b": "2"}]),
        RowSource.from_records([{"a": "3", "c": "4"}]),
        {
            "jsonl": {"prompt_field": "a", "response_field": "b"},
            "separator": "-",
            "eval": {"response_field": "c"},
        },
        folder=tmp_path,
    )
    assert held is not None
    assert (list(train), list(held)) == ([{"text": "1-2"}], [{"text": "3-4"}])


def test_a_share_of_the_rows_can_be_held_back(tmp_path: Path) -> None:
    rows = RowSource.from_records([{"text": str(i)} for i in range(10)])

    def split(fraction: float, seed: int = 1) -> tuple[list[str], list[str]]:
        data = {"eval_fraction": fraction}
        train, held = build_datasets("sft", rows, None, data, folder=tmp_path, seed=seed)
        assert held is not None
        return list(train["text"]), list(held["text"])

    train, held = split(0.3)
    assert len(held) == 3
    assert sorted(train + held) == [str(i) for i in range(10)]
    assert split(0.3) == (train, held)
    assert split(0.3, seed=2) != (train, held)
    assert [len(part) for part in split(0.001)] == [9, 1]
    assert [len(part) for part in split(0.999)] == [1, 9]
    single = RowSource.from_records([{"text": "a"}])
    with pytest.raises(InputError, match=r"eval_fraction 0\.5 needs two rows at least"):
        build_datasets("sft", single, None, {"eval_fraction": 0.5}, folder=tmp_path)


def test_another_source_in_the_same_folder_is_read_anew(build: Build) -> None:
    assert build("sft", {"text": "a"}) == [{"text": "a"}]
    assert build("sft", {"text": "b"}) == [{"text": "b"}]
    assert build("sft", {"text": "b", "body": "c"}, data={"text_field": "body"}) == [{"text": "c"}]


_MEASURE = """
import json, resource, sys
from pathlib import Path
from flowmesh_core import RowSource
from flowmesh_trl.data import build_dataset
folder = Path(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
warm = RowSource(kind="jsonl", params={"path": str(folder / "rows.jsonl")}, limit=2000)
build_dataset("sft", warm, {}, folder=folder)
before = peak()
rows = RowSource(kind="jsonl", params={"path": str(folder / "rows.jsonl")})
built = build_dataset("sft", rows, {}, folder=folder)
print(len(built), peak() - before)
"""


def test_many_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(40_000):
            file.write(json.dumps({"messages": [{**ASK, "content": f"{i} " * 400}, SAY]}) + "\n")
    size_mb = (tmp_path / "rows.jsonl").stat().st_size >> 20
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    count, grown_mb = map(int, done.stdout.split())
    assert count == 40_000
    assert size_mb > 80
    assert grown_mb < size_mb / 2
