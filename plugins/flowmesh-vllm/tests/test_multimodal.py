"""Pictures in messages, seen by a real vision-language model that vLLM loads without a GPU."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import InferenceResult

Message = dict[str, Any]
Spec = Callable[..., dict[str, Any]]
TEXT = "the quick brown fox"
SIDE = 28  # of a picture, once it is scaled
PATCHES = 4  # of a picture, two by two; each is a token of the prompt
FRAME = 3  # tokens around a picture
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def seeing(needs_vllm: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Idefics3 that has learnt nothing; most other kinds need the package torchvision."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<global-img>"], special_tokens=True)
    edge = {"longest_edge": SIDE}
    transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessorPil(
            size=edge, max_image_size=edge, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=PATCHES,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = _build_config(transformers, tiny_llama, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.Idefics3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def _build_config(transformers: Any, tiny_llama: Path, tokenizer: Any) -> Any:
    words = transformers.AutoConfig.from_pretrained(tiny_llama)
    words.vocab_size = len(tokenizer)
    sight = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": SIDE // 2,
        "initializer_range": 0.4,
    }
    return transformers.Idefics3Config(
        text_config=words,
        vision_config=sight,
        scale_factor=1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=None,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )


@pytest.fixture(scope="module")
def spec(seeing: Path, options: dict[str, Any]) -> Spec:
    def make(*rows: list[Message]) -> dict[str, Any]:
        return {
            "taskType": "inference",
            "executor": "vllm",
            "model": {
                "source": {"identifier": str(seeing)},
                # Equal pictures get equal answers whatever else is in the batch.
                "vllm": {**options, "max_model_len": 128, "dtype": "float32"},
            },
            "data": {"type": "list", "items": list(rows)},
            "inference": {"temperature": 0, "max_tokens": 8},
        }

    return make


def said(*parts: Message) -> list[Message]:
    return [{"role": "user", "content": [{"type": "text", "text": TEXT}, *parts]}]


def picture(url: str) -> Message:
    return {"type": "image_url", "image_url": {"url": url}}


def painted(colour: str) -> Message:
    image = pytest.importorskip("PIL.Image")
    png = io.BytesIO()
    image.new("RGB", (40, 30), colour).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {**picture(url), "uuid": "mine"}  # vLLM would take equal ones for one picture


def read(result: Any) -> InferenceResult:
    return InferenceResult.model_validate(result)


def test_the_model_sees_the_pictures_that_messages_carry(fleet: Any, spec: Spec) -> None:
    fleet.send("seen", spec(*(said(painted(colour)) for colour in ("red", "blue", "red"))))
    items = read(fleet.result("seen")).items
    red, blue, again = (item.output for item in items)
    assert len({item.prompt for item in items}) == 1
    assert red != blue
    assert red == again


def test_a_picture_counts_among_the_tokens_of_its_prompt(fleet: Any, spec: Spec) -> None:
    fleet.send("bare", spec(said()))
    bare = read(fleet.result("bare"))
    fleet.send("adorned", spec(said(painted("red")), said(painted("red"), painted("blue"))))
    adorned = read(fleet.result("adorned"))
    assert [item.prompt.count("<image>") for item in adorned.items] == [PATCHES, 2 * PATCHES]
    expected = 2 * bare.usage.prompt_tokens + 3 * (PATCHES + FRAME)
    assert adorned.usage.prompt_tokens == expected


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "row 1: a message points to 'file:///etc/passwd', which is no"),
        ("data:image/png;base64,aGVsbG8=", "row 1: vLLM refuses it: .*image"),
    ],
)
def test_a_picture_that_cannot_be_had_fails_its_row(
    fleet: Any, spec: Spec, url: str, says: str
) -> None:
    task_id = f"bad-{url.partition(':')[0]}"
    fleet.send(task_id, spec(said(painted("red")), said(picture(url))))
    assert re.search(says, fleet.error(task_id))
    assert len(fleet.engines()) == 1
