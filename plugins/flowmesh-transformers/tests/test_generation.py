"""Answers of a real, tiny model: against the library's own ``generate``, and against themselves."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.prompts import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh_core import InferenceParams, InferenceResult

torch = pytest.importorskip("torch")

PROMPTS = [
    "the quick brown fox",
    "a dog",
    "seven wizards brew strong black tea over the lazy fox while a dog jumps",
    "x",
    "tea tea tea",
]


@pytest.fixture
def engine(executor: Any) -> Any:
    return executor._engine


def ask(engine: Any, prompts: list[str], *, seed: Any = 7, **params: Any) -> list[Any]:
    """Answer prompts in one batch; each one's stream is that of its own text."""
    full = InferenceParams.model_validate({"max_tokens": 24, "temperature": 0, **params})
    requests = [
        Request(
            tokens=engine.encode(prompt, rendered=False),
            limit=full.max_tokens,
            params=full,
            seed=None if seed is None else zlib.crc32(f"{seed}{prompt}".encode()),
        )
        for prompt in prompts
    ]
    answers = dict(engine.generate(requests, lambda _number: False))
    return [answers[number] for number in range(len(prompts))]


def generate_plain(engine: Any, prompts: list[str]) -> list[str]:
    """Answer greedily as the library's documentation does it for one batch."""
    tokenizer, model = engine._tokenizer, engine._model
    tokenizer.pad_token, tokenizer.padding_side = "<s>", "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = tokens[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def test_greedy_answers_are_those_of_generate_for_single_prompts(engine: Any) -> None:
    for prompt in PROMPTS:
        (answer,) = ask(engine, [prompt])
        assert [answer.text] == generate_plain(engine, [prompt])


def test_greedy_answers_are_those_of_generate_for_a_padded_batch(engine: Any) -> None:
    answers = ask(engine, PROMPTS)
    assert [answer.text for answer in answers] == generate_plain(engine, PROMPTS)
    assert len({answer.tokens for answer in answers}) > 1  # so that some left before others


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(PROMPTS), st.integers(1, len(PROMPTS)))
@pytest.mark.parametrize("params", [{}, {"temperature": 1, "frequency_penalty": 0.4}], ids=str)
def test_order_and_batch_size_change_no_answer(
    engine: Any, params: Any, order: list[str], size: int
) -> None:
    # The tiny model's likeliest tokens are far apart, and its draws far from a boundary: the last
    # bits of a batched product, which do move, turn none of them.
    alone = {prompt: ask(engine, [prompt], **params)[0] for prompt in PROMPTS}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        assert ask(engine, part, **params) == [alone[prompt] for prompt in part]


def test_a_seed_repeats_an_answer_and_another_seed_does_not(engine: Any) -> None:
    def say(seed: Any) -> list[str]:
        return [answer.text for answer in ask(engine, PROMPTS, seed=seed, temperature=1.5)]

    assert say(1) == say(1)
    assert say(1) != say(2)
    assert say(None) != say(None)


def test_an_answer_ends_at_max_tokens_or_at_the_end_mark(engine: Any) -> None:
    answers = ask(engine, PROMPTS, max_tokens=40)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        assert (answer.tokens == 40) == (answer.finish_reason == "length")
        assert "<|end|>" not in answer.text


def test_each_prompt_of_a_batch_has_a_limit_of_its_own(engine: Any) -> None:
    params = InferenceParams(temperature=0)
    tokens = engine.encode("x", rendered=False)
    requests = [Request(tokens=tokens, limit=limit, params=params) for limit in (3, 11, 1)]
    answers = dict(engine.generate(requests, lambda _number: False))
    assert [answers[number].tokens for number in range(3)] == [3, 11, 1]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_ends_its_answer_at_once_and_is_not_in_it(engine: Any, length: int) -> None:
    (whole,) = ask(engine, ["x"])
    stop = whole.text[9 : 9 + length]
    first = whole.text.index(stop)
    others = [answer.text for answer in ask(engine, PROMPTS)]
    answers = ask(engine, PROMPTS, stop=["never said", stop])
    assert answers[3].text == whole.text[:first]
    assert answers[3].finish_reason == "stop"
    shortest = next(
        count for count in range(1, 24) if stop in ask(engine, ["x"], max_tokens=count)[0].text
    )
    assert answers[3].tokens == shortest < whole.tokens
    for answer, other in zip(answers, others, strict=True):
        assert answer.text == other.partition(stop)[0]


def test_the_earliest_of_several_stop_texts_in_one_token_counts() -> None:
    from flowmesh_transformers.generation import _Row

    class Letters:
        def decode(self, tokens: list[int]) -> str:
            return "".join({1: "ab", 2: "cdef"}[token] for token in tokens)

        def ends(self, stop: list[str]) -> frozenset[int]:
            return frozenset()

    request = Request(tokens=[1], limit=9, params=InferenceParams(stop=["f", "d", "never"]))
    row = _Row(0, request, Letters())  # type: ignore[arg-type]
    assert [row.take(1), row.take(2)] == [False, True]
    assert (row.answer().text, row.answer().tokens) == ("abc", 2)


def test_a_special_token_may_be_a_stop_text(engine: Any) -> None:
    from flowmesh_transformers.generation import Reader

    tokenizer = engine._tokenizer
    reader = Reader(tokenizer, {7})
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert reader.ends(["<|user|>", "tea"]) == {7, user}
    assert reader.ends([]) == {7}


def test_a_stopped_prompt_leaves_and_the_others_are_answered_as_ever(engine: Any) -> None:
    params = InferenceParams(temperature=0)
    requests = [
        Request(tokens=engine.encode(prompt, rendered=False), limit=24, params=params)
        for prompt in PROMPTS
    ]
    asked: list[int] = []

    def stopped(number: int) -> bool:
        asked.append(number)
        return number == 3 and asked.count(3) == 5

    answers = dict(engine.generate(requests, stopped))
    assert answers[3] is None
    assert asked.count(3) == 5
    expected = ask(engine, PROMPTS)
    assert all(answers[number] == expected[number] for number in (0, 1, 2, 4))


def test_whoever_iterates_is_not_left_in_inference_mode(engine: Any) -> None:
    params = InferenceParams(temperature=0)
    tokens = engine.encode("x", rendered=False)
    requests = [Request(tokens=tokens, limit=limit, params=params) for limit in (2, 4)]
    for _ in engine.generate(requests, lambda _number: False):
        assert not torch.is_inference_mode_enabled()


def test_a_task_gives_the_shared_result_with_counts_without_padding(
    executor: Any, make_context: Any, engine: Any
) -> None:
    ctx = make_context(PROMPTS, temperature=0, max_tokens=8, prompt_format="plain")
    result = InferenceResult.model_validate(executor.run(ctx).result)
    expected = ask(engine, PROMPTS, max_tokens=8)
    assert [item.output for item in result.items] == [answer.text for answer in expected]
    lengths = [len(engine.encode(prompt, rendered=False)) for prompt in PROMPTS]
    assert len(set(lengths)) > 2
    assert result.usage.prompt_tokens == sum(lengths)
    assert result.usage.completion_tokens == sum(answer.tokens for answer in expected)


def test_a_chat_is_written_by_the_models_template_without_a_second_begin_mark(
    executor: Any, make_context: Any, engine: Any
) -> None:
    ctx = make_context(["hi"], temperature=0, max_tokens=4, system_prompt="Be brief")
    (item,) = executor.run(ctx).result["items"]
    assert item["prompt"] == "<|system|>Be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert "<s>" not in engine._tokenizer.convert_ids_to_tokens(
        engine.encode(item["prompt"], rendered=True)
    )
    ctx = make_context([[{"role": "wizard", "content": "hi"}]])
    with pytest.raises(Exception, match=r"row 0: the chat template refuses .*no such role"):
        executor.run(ctx)


def test_members_of_a_group_get_what_they_would_have_got_alone(
    executor: Any, make_context: Any
) -> None:
    ctxs = [
        make_context(
            PROMPTS[number:],
            task_id=f"t{number}",
            system_prompt=f"s{number}",
            seed=5,
            max_tokens=12,
        )
        for number in range(3)
    ]
    together = dict(executor.run_group(ctxs))
    for ctx in ctxs:
        alone = executor.run(ctx).result
        assert together[ctx.task_id].result["items"] == alone["items"]


def test_rows_of_one_task_with_one_seed_say_different_things(
    executor: Any, make_context: Any
) -> None:
    ctx = make_context(["same"] * 4, n=2, seed=3, temperature=1.5, max_tokens=12)
    items = executor.run(ctx).result["items"]
    said = [choice["output"] for item in items for choice in item["choices"]]
    assert len(set(said)) == 8
    second = executor.run(make_context(["same"], seed=4, temperature=1.5, max_tokens=12)).result
    assert second["items"][0]["output"] == items[0]["choices"][1]["output"]


def test_a_prompt_longer_than_the_model_takes_is_refused(
    executor: Any, make_context: Any, engine: Any
) -> None:
    assert engine.context_tokens == 256
    with pytest.raises(
        Exception, match=r"row 1: the prompt has \d+ tokens and the model takes 256"
    ):
        executor.run(make_context(["short", "long " * 200]))


@pytest.fixture(params=["mistral", "gpt2", "mamba"])
def relative(request: Any, tiny: Path) -> Iterator[Any]:
    """Tiny models of other kinds: a sliding window, learned positions, no attention at all."""
    import transformers as library

    kinds: dict[str, Any] = {
        "mistral": lambda size: library.MistralForCausalLM(
            library.MistralConfig(
                vocab_size=size,
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                sliding_window=8,
                initializer_range=0.4,
            )
        ),
        "gpt2": lambda size: library.GPT2LMHeadModel(
            library.GPT2Config(
                vocab_size=size,
                n_embd=64,
                n_layer=2,
                n_head=2,
                n_positions=128,
                initializer_range=0.4,
            )
        ),
        "mamba": lambda size: library.MambaForCausalLM(
            library.MambaConfig(
                vocab_size=size,
                hidden_size=32,
                state_size=8,
                num_hidden_layers=2,
                initializer_range=0.4,
            )
        ),
    }
    torch.manual_seed(5)
    tokenizer = library.AutoTokenizer.from_pretrained(tiny)
    model = kinds[request.param](len(tokenizer)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def test_models_of_other_kinds_answer_as_generate_does(relative: Any) -> None:
    from flowmesh_transformers.generation import Reader, generate

    model, tokenizer = relative
    params = InferenceParams(temperature=0)
    requests = [
        Request(tokens=tokenizer(prompt)["input_ids"], limit=5 + 5 * number, params=params)
        for number, prompt in enumerate(PROMPTS)
    ]
    random.Random(1).shuffle(requests)
    reader = Reader(tokenizer, {tokenizer.eos_token_id})
    answers = dict(generate(model, requests, reader, "cpu", lambda _number: False))
    for number, request in enumerate(requests):
        ids = torch.tensor([request.tokens])
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.limit,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert answers[number].text == tokenizer.decode(tokens, skip_special_tokens=True)
