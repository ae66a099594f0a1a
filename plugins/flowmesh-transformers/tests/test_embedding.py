from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import EmbeddingResult, InputError

torch = pytest.importorskip("torch")
TEXTS = ["the quick brown fox", "a dog", "seven wizards brew strong black tea", "tea"]


@pytest.fixture(scope="session")
def roberta(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder that counts positions from the tokens that are no padding."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = AutoTokenizer.from_pretrained(tiny, pad_token="<|user|>", model_max_length=40)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "roberta"])
def model(request: Any) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture
def embed(make_context: Any) -> Any:
    from flowmesh_transformers.executor import TransformersExecutor

    def embed(texts: list[str], folder: Path, **kwargs: Any) -> Any:
        ctx = make_context(texts, folder, task_type="embedding", **kwargs)
        executor = TransformersExecutor()
        executor.load(ctx)
        try:
            return executor.run(ctx).result
        finally:
            executor.unload()

    return embed


def vectors(result: Any) -> Any:
    return torch.tensor([item["embedding"] for item in result["items"]])


def states_of(folder: Path, text: str) -> Any:
    """Compute a text's token vectors with the library alone."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder).eval()(input_ids=tokens).last_hidden_state[0]


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("mean", lambda states: states.mean(0)),
        ("last", lambda states: states[-1]),
        ("cls", lambda states: states[0]),
    ],
)
def test_vectors_in_a_padded_batch_are_those_of_each_text_alone(
    embed: Any, model: Path, pooling: str, pool: Any
) -> None:
    got = vectors(embed(TEXTS, model, options={"pooling": pooling}, normalize=False))
    expected = torch.stack([pool(states_of(model, text)) for text in TEXTS])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_result_is_the_shared_one(embed: Any, roberta: Path) -> None:
    result = EmbeddingResult.model_validate(embed(TEXTS, roberta))
    assert result.dimensions == 32
    assert [item["index"] for item in result.items] == [0, 1, 2, 3]
    assert result.items[1]["metadata"] == {"prompt": "a dog"}
    torch.testing.assert_close(vectors(result.model_dump()).norm(dim=1), torch.ones(4))
    assert result.usage.completion_tokens == 0
    assert result.usage.prompt_tokens == result.usage.total_tokens > 8


def test_the_pooling_of_the_models_own_files_is_taken(
    embed: Any, roberta: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(roberta, tmp_path / "copy"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    by_files = vectors(embed(TEXTS, folder))
    torch.testing.assert_close(by_files, vectors(embed(TEXTS, roberta, options={"pooling": "cls"})))
    by_document = vectors(embed(TEXTS, folder, options={"pooling": "mean"}))
    torch.testing.assert_close(by_document, vectors(embed(TEXTS, roberta)))
    assert (by_files - by_document).abs().max() > 0.01


def test_a_text_longer_than_the_tokenizer_says_is_refused(embed: Any, roberta: Path) -> None:
    with pytest.raises(
        InputError, match=r"row 1: the prompt has \d+ tokens and the model takes 40"
    ):
        embed(["short", "long " * 30], roberta)


def test_members_of_a_group_normalize_each_in_its_own_way(tiny: Path, make_context: Any) -> None:
    from flowmesh_transformers.executor import TransformersExecutor

    ctxs = [
        make_context(TEXTS[:2], tiny, task_id=str(on), task_type="embedding", normalize=on)
        for on in (True, False)
    ]
    executor = TransformersExecutor()
    executor.load(ctxs[0])
    got = dict(executor.run_group(ctxs))
    executor.unload()
    raw = vectors(got["False"].result)
    torch.testing.assert_close(
        vectors(got["True"].result), raw / raw.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )
