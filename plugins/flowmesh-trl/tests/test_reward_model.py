from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import ExecutionError, InputError, ModelRef, RowSource

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from flowmesh_trl.data import build_dataset  # noqa: E402 - needs torch
from flowmesh_trl.queries import QueryCollator, QueryRewards, query_width  # noqa: E402 - needs torch
from flowmesh_trl.reward_model import load_reward_model  # noqa: E402 - needs torch
from flowmesh_trl.rewards import Reward, load_rewards  # noqa: E402 - needs torch

Classifier = Callable[..., ModelRef]

PLAIN = {"prompt_format": "plain"}

GIVEN = {"prompts": ["the fox", "a dog"], "completions": [" jumps", " brews tea"]}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def classifier(tiny: Path, tmp_path: Path) -> Classifier:
    """Make a classifier with these labels of the tiny model."""

    def make(*labels: str) -> ModelRef:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = tmp_path / "classifier"
        shutil.copytree(tiny, folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        tokenizer.pad_token = "<|system|>"  # so that the end token counts
        tokenizer.save_pretrained(folder)
        torch.manual_seed(3)
        names = dict(enumerate(labels or ["score"]))
        model = AutoModelForSequenceClassification.from_pretrained(tiny, id2label=names)
        model.save_pretrained(folder)
        return ModelRef(identifier="acme/judge", path=folder, format="hf")

    return make


def logits_of(ref: ModelRef, tokenizer: Any, *texts: str) -> Any:
    """Compute what the model says at the end of each text, one by one and without padding."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(ref.path).eval()
    with torch.inference_mode():
        lines = [torch.tensor([tokenizer(f"{text}<|end|>")["input_ids"]]) for text in texts]
        hidden = [model.model(line).last_hidden_state for line in lines]
        return torch.cat([model.score(states[:, -1]) for states in hidden])


def test_one_output_scores_prompt_and_answer(classifier: Classifier, tokenizer: Any) -> None:
    ref = classifier()
    reward = load_reward_model(ref, scale=2.0)
    texts = [p + c for p, c in zip(*GIVEN.values(), strict=True)]
    expected = 2 * logits_of(ref, tokenizer, *texts)[:, 0]
    assert reward(**GIVEN) == pytest.approx(expected.tolist(), abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_many_texts_are_scored_in_order(classifier: Classifier) -> None:
    reward = load_reward_model(classifier())
    many = {"prompts": [f"{i} the fox" for i in range(40)], "completions": [" jumps"] * 40}
    alone = [reward(prompts=[prompt], completions=[" jumps"])[0] for prompt in many["prompts"]]
    assert reward(**many) == pytest.approx(alone, abs=1e-4)


def test_labels_decide_which_outputs_count(classifier: Classifier, tokenizer: Any) -> None:
    ref = classifier("dull", "POSITIVE", "NEGATIVE")
    texts = [p + c for p, c in zip(*GIVEN.values(), strict=True)]
    logits = logits_of(ref, tokenizer, *texts)
    shares = logits.softmax(dim=1)

    def scored(**options: Any) -> Any:
        return load_reward_model(ref, **options)(**GIVEN)

    both = (logits[:, 1] - logits[:, 2]).tolist()
    assert scored() == pytest.approx(both, abs=1e-4)
    named = (logits[:, 0] - logits[:, 1]).tolist()
    labels = {"positive_label": "Dull", "negative_label": "positive"}
    assert scored(**labels) == pytest.approx(named, abs=1e-4)
    share = (shares[:, 1] - shares[:, 2]).tolist()
    assert scored(kind="sentiment") == pytest.approx(share, abs=1e-4)


def test_labels_that_are_not_there_are_refused(classifier: Classifier) -> None:
    ref = classifier("good", "bad")
    with pytest.raises(InputError, match=r"positive_label is required, acme/judge has .*good, bad"):
        load_reward_model(ref)
    with pytest.raises(InputError, match=r"negative_label must be a label of .*\(good, bad\)"):
        load_reward_model(ref, positive_label="good", negative_label="ugly")


def test_a_long_text_loses_its_beginning(classifier: Classifier) -> None:
    reward = load_reward_model(classifier(), max_length=8)
    long = {"prompts": ["the quick brown fox " * 9, "x"], "completions": [" brews tea now"] * 2}
    first, second = reward(**long)
    other = reward(prompts=long["prompts"][:1], completions=[" jumps over a dog"])[0]
    assert first is not None
    assert other is not None
    assert second is not None
    assert abs(first - other) > 1e-3


def test_a_chat_goes_through_the_template(classifier: Classifier) -> None:
    reward = load_reward_model(classifier())
    said = [{"role": "assistant", "content": "tea"}]
    asked = [{"role": "user", "content": "the fox"}]
    chat = reward(prompts=[asked], completions=[said])
    text = reward(prompts=["<|user|>the fox<|end|>"], completions=["<|assistant|>tea<|end|>"])
    assert chat != text  # the latter begins with the beginning token
    bare = reward(prompts=["the fox"], completions=["tea"])
    assert chat != bare


def test_a_language_model_is_no_reward_model(tiny: Path) -> None:
    ref = ModelRef(identifier="acme/small", path=tiny, format="hf")
    with pytest.raises(InputError, match=r"no trained classifier: it has no weights for score"):
        load_reward_model(ref)


def test_what_cannot_be_loaded_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load reward_model acme/none"):
        load_reward_model(ModelRef(identifier="acme/none", path=tmp_path, format="hf"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="acme/none is an adapter; give the whole model"):
        load_reward_model(ModelRef(identifier="acme/none", path=tmp_path, format="hf"))
    with pytest.raises(InputError, match="acme/q4 is a GGUF file"):
        load_reward_model(ModelRef(identifier="acme/q4", path=tmp_path, format="gguf"))


@pytest.fixture
def queries(tmp_path: Path, tokenizer: Any) -> Any:
    rows = [{"query": "the fox", "answer": "1"}, {"query": "the fox jumps over", "answer": "2"}]
    source = RowSource.from_records(rows)
    return build_dataset("ppo", source, PLAIN, folder=tmp_path, tokenizer=tokenizer)


def asked_for(queries: Any, tokenizer: Any, *answers: str) -> tuple[Any, int]:
    """Put answers behind the queries as TRL's PPO does, ended and padded."""
    width = query_width(queries)
    collate = QueryCollator(width=width, pad_token_id=tokenizer.pad_token_id)
    padded = collate(list(queries))["input_ids"]
    tails = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    longest = max(map(len, tails)) + 1
    pad = tokenizer.pad_token_id
    tail = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in tails])
    return torch.cat((padded, tail), 1), width


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl_gets_rewards_of_functions_from_what_it_takes_for_a_model(
    queries: Any, tokenizer: Any
) -> None:
    from trl.experimental.utils import get_reward

    seen: list[dict[str, Any]] = []

    def spy(**columns: Any) -> list[float | None]:
        seen.append(columns)
        return [10.0, None]

    rewards = [
        *load_rewards([{"name": "exact_match", "weight": 3}]),
        Reward(name="spy", weight=0.5, function=spy),
    ]
    lines, width = asked_for(queries, tokenizer, " 1", " lazy dog 2")
    model = QueryRewards(rewards, tokenizer=tokenizer, queries=[queries], width=width)
    every, scores, _ = get_reward(model, lines, tokenizer.pad_token_id, width)
    assert scores.tolist() == [3 + 5, 0]
    assert every.shape == (*lines.shape, 1)
    assert seen == [
        {
            "prompts": ["the fox", "the fox jumps over"],
            "completions": [" 1", " lazy dog 2"],
            "completion_ids": [
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (" 1", " lazy dog 2")
            ],
            "answer": ["1", "2"],
        }
    ]


def test_chat_queries_are_found_though_they_hold_padding(tmp_path: Path, tokenizer: Any) -> None:
    turn = {"role": "user", "content": "tea"}
    source = RowSource.from_records(
        [{"messages": [turn, turn], "n": 1}, {"messages": [turn], "n": 2}]
    )
    rows = build_dataset("ppo", source, PLAIN, folder=tmp_path, tokenizer=tokenizer)
    assert rows[0]["input_ids"].count(tokenizer.pad_token_id) == 2
    lines, width = asked_for(rows, tokenizer, " black", " strong")
    seen: list[dict[str, Any]] = []

    def spy(**columns: Any) -> list[float]:
        seen.append(columns)
        return [1.0, 2.0]

    rewards = [Reward(name="spy", function=spy)]
    model = QueryRewards(rewards, tokenizer=tokenizer, queries=[rows], width=width)
    mask = lines != tokenizer.pad_token_id
    hidden = model.read(input_ids=lines.masked_fill(~mask, 0), attention_mask=mask).hidden_states
    assert model.score(hidden[-1])[:, 0, 0].tolist() == [1, 2]
    assert seen[0]["prompts"] == [[turn, turn], [turn]]
    assert seen[0]["n"] == [1, 2]
    assert seen[0]["completions"][1] == [{"role": "assistant", "content": " strong"}]


def test_a_response_without_any_reward_is_an_error(queries: Any, tokenizer: Any) -> None:
    lines, width = asked_for(queries, tokenizer, " a", " b")
    silent = Reward(name="silent", function=lambda **_columns: [1.0, None])
    model = QueryRewards([silent], tokenizer=tokenizer, queries=[queries], width=width)
    with pytest.raises(ExecutionError, match="none of the rewards silent has a value for ' b'"):
        model.score(lines)


def test_one_query_with_two_answers_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"query": "the fox", "answer": "1"}] * 2
    known: dict[str, Any] = {"folder": tmp_path, "tokenizer": tokenizer}
    same = build_dataset("ppo", RowSource.from_records(rows), PLAIN, **known)
    model = QueryRewards([], tokenizer=tokenizer, queries=[same, same], width=9)
    assert len(model._places) == 1
    other = RowSource.from_records([*rows, {"query": "the fox", "answer": "2"}])
    differing = build_dataset("ppo", other, PLAIN, **known)
    with pytest.raises(InputError, match="two rows ask the same and differ in another column"):
        QueryRewards([], tokenizer=tokenizer, queries=[differing], width=9)
