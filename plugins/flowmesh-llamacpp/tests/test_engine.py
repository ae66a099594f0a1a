"""Real weights, real llama.cpp."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flowmesh_llamacpp.executor import LlamacppExecutor

from flowmesh_core import (
    AdapterRef,
    CancelledError,
    ExecutorUnavailableError,
    InferenceResult,
    InputError,
)

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 2+2?",
    "Who wrote Hamlet?",
    "How do I cook rice? " * 14,
    "Why is the sky blue?",
    "Explain gravity briefly.",
    "Wie heißt du? 🦄",
]
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def ask(loaded: LlamacppExecutor, make_context: Any) -> Callable[..., InferenceResult]:
    def ask(*args: Any, **kwargs: Any) -> InferenceResult:
        ctx = make_context(*args, **{"max_tokens": 16, **kwargs})
        result = asyncio.run(loaded.run(ctx))
        return InferenceResult.model_validate(result)

    return ask


@pytest.fixture
def open_executor(make_context: Any) -> Iterator[Callable[..., LlamacppExecutor]]:
    opened = []

    def open_executor(*args: Any, **kwargs: Any) -> LlamacppExecutor:
        opened.append(LlamacppExecutor())
        opened[-1].load(make_context(*args, **kwargs))
        return opened[-1]

    yield open_executor
    for executor in opened:
        executor.unload()


def outputs(result: InferenceResult) -> list[str]:
    return [item.output for item in result.items]


def test_the_model_knows_what_it_is_asked(ask: Any) -> None:
    (item,) = ask(["What is 2+2?"], temperature=0).items
    assert "4" in item.output
    assert item.finish_reason == "stop"
    assert item.prompt.endswith("<|im_start|>assistant\n")


def test_greedy_answers_are_the_same_alone_and_beside_others(ask: Any) -> None:
    together = outputs(ask(QUESTIONS, temperature=0))
    alone = [outputs(ask([question], do_sample=False))[0] for question in QUESTIONS]
    assert together == alone
    assert len(set(together)) == len(QUESTIONS)


def test_the_same_seed_gives_the_same_answers_beside_others_too(ask: Any) -> None:
    first = outputs(ask(QUESTIONS, seed=7, temperature=1.0))
    assert outputs(ask(QUESTIONS, seed=7, temperature=1.0)) == first
    assert outputs(ask(QUESTIONS[:1], seed=7, temperature=1.0)) == first[:1]
    assert outputs(ask(QUESTIONS, seed=8, temperature=1.0)) != first


def test_equal_prompts_of_one_task_are_sampled_apart(ask: Any) -> None:
    assert len(set(outputs(ask(["Tell me a story."] * 4, seed=7, temperature=1.0)))) == 4


def test_choices_are_those_of_the_following_seeds(ask: Any) -> None:
    (item,) = ask(["Tell me a story."], seed=7, n=3, temperature=1.0).items
    texts = [choice.output for choice in item.choices]
    singles = [ask(["Tell me a story."], seed=7 + i, temperature=1.0) for i in range(3)]
    assert texts == [outputs(single)[0] for single in singles]
    assert item.output == texts[0]
    assert len(set(texts)) == 3


def test_two_tasks_at_once_share_the_slots(loaded: LlamacppExecutor, make_context: Any) -> None:
    contexts = [make_context(QUESTIONS[:3], temperature=0, max_tokens=n) for n in (5, 9)]

    async def both() -> Any:
        return await asyncio.gather(*(loaded.run(ctx) for ctx in contexts))

    short, long = asyncio.run(both())
    pairs = zip(short["items"], long["items"], strict=True)
    assert all(b["output"].startswith(a["output"].rstrip("\ufffd")) for a, b in pairs)
    assert short["usage"]["completion_tokens"] < long["usage"]["completion_tokens"]


def test_stop_ends_the_answer_and_is_not_part_of_it(ask: Any) -> None:
    (whole,) = ask(["Count from one to ten."], temperature=0, max_tokens=40).items
    middle = whole.output[len(whole.output) // 2 :].split()[1]
    cut = ask(["Count from one to ten."], temperature=0, max_tokens=40, stop=middle)
    assert cut.items[0].output == whole.output[: whole.output.index(middle)]
    assert cut.items[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40


def test_max_tokens_is_the_length_of_the_answer(ask: Any) -> None:
    result = ask(["Tell me a long story."], max_tokens=7)
    assert result.items[0].finish_reason == "length"
    assert result.usage.completion_tokens == 7


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_cut_down_to_one_token_is_greedy(ask: Any, narrow: Any) -> None:
    greedy = outputs(ask(QUESTIONS[:3], temperature=0))
    assert outputs(ask(QUESTIONS[:3], temperature=1.5, seed=1, **narrow)) == greedy
    assert outputs(ask(QUESTIONS[:3], temperature=1.5, seed=1)) != greedy


@pytest.mark.parametrize(
    "penalty",
    [{"repetition_penalty": 1.8}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}],
)
def test_each_penalty_makes_for_more_different_words(ask: Any, penalty: Any) -> None:
    greedy = {"temperature": 0, "max_tokens": 48}
    (plain,) = outputs(ask(QUESTIONS[:1], **greedy))
    (varied,) = outputs(ask(QUESTIONS[:1], **greedy, **penalty))
    assert share_of_new_words(varied) > share_of_new_words(plain)


def share_of_new_words(text: str) -> float:
    words = text.lower().split()
    return len(set(words)) / len(words)


def test_the_system_prompt_replaces_the_templates_own(ask: Any) -> None:
    (item,) = ask(["hi"], system_prompt="You are a pirate.", max_tokens=2).items
    assert "<|im_start|>system\nYou are a pirate.<|im_end|>" in item.metadata["rendered_prompt"]
    assert item.metadata["prompt"] == "hi"


def test_plain_prompts_reach_the_model_as_they_are(ask: Any) -> None:
    result = ask(["The sky is"], prompt_format="plain", system_prompt="Once.", max_tokens=2)
    assert result.items[0].prompt == "Once.\nThe sky is"
    assert result.usage.prompt_tokens < 10


def test_messages_are_taken_as_a_conversation(ask: Any) -> None:
    talk = [
        {"role": "user", "content": "My name is Zoe."},
        {"role": "assistant", "content": "Hello Zoe!"},
        {"role": "user", "content": "Again?"},
    ]
    (item,) = ask([talk], max_tokens=2).items
    assert item.prompt.count("<|im_start|>user") == 2
    assert "Hello Zoe!" in item.prompt


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_a_json_schema_binds_the_answer(ask: Any, prompt_format: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    result = ask(
        ["Describe a person."] * 3,
        response_format=asked,
        prompt_format=prompt_format,
        seed=3,
        max_tokens=64,
    )
    for text in outputs(result):
        person = json.loads(text)
        assert person["name"] in ("Ada", "Bob")
        assert person["age"] <= 99
        assert person.keys() == {"name", "age"}


def test_a_json_object_begins_with_a_brace(ask: Any) -> None:
    (item,) = ask(["Say hello."], response_format={"type": "json_object"}, temperature=0).items
    assert item.output.startswith("{")


def test_a_schema_that_cannot_be_compiled_is_an_error_not_a_free_answer(ask: Any) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    with pytest.raises(InputError, match="cannot compile this JSON schema"):
        ask(["Numbers."], response_format={"type": "json_schema", "json_schema": schema})


def test_characters_of_several_tokens_stay_whole(ask: Any) -> None:
    text = "日本語 🦄 é"
    schema = {"type": "json_schema", "schema": {"enum": [text]}}
    (item,) = ask([text], response_format=schema, prompt_format="plain", max_tokens=40).items
    assert json.loads(item.output) == item.prompt == text
    cut = ask([text], response_format=schema, max_tokens=4).items[0]
    assert text.startswith(cut.output.strip('"'))


def test_an_empty_prompt_is_answered_in_chat_and_refused_in_plain(ask: Any) -> None:
    assert ask([""], temperature=0).items[0].output
    with pytest.raises(InputError, match="row 1: the prompt is empty"):
        ask(["hello", ""], prompt_format="plain", max_tokens=2)


def test_a_prompt_longer_than_the_context_names_the_row_and_both_numbers(ask: Any) -> None:
    with pytest.raises(InputError, match=r"row 1: the prompt has 6\d\d tokens .* n_ctx 512"):
        ask(["hello", "word " * 600])


def test_a_cancel_is_felt_within_an_answer(ask: Any) -> None:
    cancelled = threading.Event()
    timer = threading.Timer(0.3, cancelled.set)
    timer.start()
    started_s = time.monotonic()
    with pytest.raises(CancelledError, match="was cancelled"):
        ask(
            ["Tell me a very long story."] * 4,
            max_tokens=450,
            stop=[],
            seed=1,
            repetition_penalty=1.3,
            context={"is_cancelled": cancelled.is_set},
        )
    timer.join()
    assert time.monotonic() - started_s < 15  # the four stories alone would take longer
    assert "4" in outputs(ask(["What is 2+2?"], temperature=0))[0]


def test_two_models_in_turn_are_never_mixed(
    ask: Any, open_executor: Any, make_context: Any, shallow_weights: Path
) -> None:
    other = open_executor(weights=shallow_weights)
    seen = []
    for _ in range(2):
        ctx = make_context(QUESTIONS[:2], shallow_weights, identifier="shallow", temperature=0)
        ctx.spec.inference.max_tokens = 8
        babble = asyncio.run(other.run(ctx))
        seen.append((outputs(ask(QUESTIONS[:2], temperature=0)), babble["items"]))
        assert babble["model"] == "shallow"
    assert seen[0] == seen[1]
    assert [item["prompt"] for item in seen[0][1]] == QUESTIONS[:2]  # it has no chat template
    assert "Paris" not in seen[0][1][0]["output"]


def test_an_adapter_changes_the_answers_as_much_as_its_scale(
    ask: Any, open_executor: Any, make_context: Any, weights: Path, lora: Path
) -> None:
    answers = {}
    for scale in (0.0, 1.0):
        adapters = {"adapters": (AdapterRef(name="a", path=lora, scale=scale),)}
        ctx = make_context(QUESTIONS[:2], weights, inputs=adapters, temperature=0, max_tokens=16)
        executor = open_executor(weights=weights, inputs=adapters)
        result = InferenceResult.model_validate(asyncio.run(executor.run(ctx)))
        answers[scale] = outputs(result)
    assert answers[0.0] == outputs(ask(QUESTIONS[:2], temperature=0))
    assert answers[1.0] != answers[0.0]


def test_every_option_is_taken(
    open_executor: Any, make_context: Any, weights: Path, tmp_path: Path
) -> None:
    options = {
        "n_ctx": 0,
        "n_parallel": 1,
        "n_threads": 2,
        "flash_attn": True,
        "cache_type_k": "q8_0",
        "cache_type_v": "q4_0",
        "cache_prompt": True,
        "mmap": False,
        "warmup": True,
        "chat_template": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
    }
    executor = open_executor(weights=weights, options=options)
    ctx = make_context(["hello " * 600], weights, options=options, max_tokens=2)
    (item,) = asyncio.run(executor.run(ctx))["items"]
    assert item["prompt"].startswith("[user] hello hello")


def test_weights_that_break_off_are_an_error(
    open_executor: Any, weights: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(weights.read_bytes()[:50_000_000])
    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*cut\.gguf"):
        open_executor(weights=cut)


def test_layers_on_a_gpu_that_is_not_there_are_an_error(open_executor: Any, weights: Path) -> None:
    import xllamacpp

    if len(xllamacpp.get_device_info()) > 1:
        pytest.skip("this build sees a GPU")
    with pytest.raises(ExecutorUnavailableError, match=r"n_gpu_layers is 9, .* sees no GPU"):
        open_executor(weights=weights, options={"n_gpu_layers": 9})


def test_loading_is_silent_opens_no_port_and_leaves_memory_as_it_was(weights: Path) -> None:
    script = Path(__file__).with_name("load_cycle.py")
    done = subprocess.run(
        [sys.executable, str(script), str(weights)], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["ports"] == 0
    assert report["loaded_mib"] - report["before_mib"] > 250
    assert report["after_mib"] - report["before_mib"] < 100
