"""What is loaded, and what is refused: real files, a real library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flowmesh_transformers.spec import TransformersOptions
from flowmesh_transformers.weights import Origin, Weights, find_weights

from flowmesh_core import AdapterRef, ExecutorUnavailableError, InputError, Inputs, ModelRef

torch = pytest.importorskip("torch")


@pytest.fixture
def load(tiny: Path) -> Callable[..., Any]:
    def load(
        folder: Path = tiny,
        *,
        adapters: tuple[AdapterRef, ...] = (),
        tokenizer: Path | None = None,
        embeds: bool = False,
        gpus: int = 0,
        **options: Any,
    ) -> Any:
        from flowmesh_transformers.engine import TransformersEngine

        weights = Weights(
            model=Origin(name=str(folder)),
            tokenizer=Origin(name=str(tokenizer or folder)),
            adapters=adapters,
        )
        return TransformersEngine(
            weights,
            TransformersOptions.model_validate(options),
            embeds=embeds,
            gpus=gpus,
            trust_remote_code=False,
        )

    return load


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def logits(engine: Any) -> Any:
    with torch.inference_mode():
        return engine._model(input_ids=torch.tensor([[7, 8, 9, 40]])).logits


def test_dtype_and_attention_are_what_the_document_asks_for(load: Any) -> None:
    model = load(dtype="bf16", attn_implementation="eager")._model
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load(low_cpu_mem_usage=False)._model.dtype is torch.float32


def test_auto_keeps_the_dtype_in_which_the_weights_were_stored(load: Any, copy: Path) -> None:
    load(dtype="float16")._model.save_pretrained(copy)
    assert load(copy)._model.dtype is torch.float16
    assert load(copy, dtype="float32")._model.dtype is torch.float32


def test_a_model_is_ready_for_inference(load: Any) -> None:
    assert not load()._model.training


@pytest.mark.parametrize("wanted", [None, "cpu", "auto", "balanced", "sequential"])
def test_without_a_gpu_everything_is_on_the_cpu(load: Any, wanted: Any) -> None:
    assert {p.device.type for p in load(device_map=wanted)._model.parameters()} == {"cpu"}


def test_a_gpu_that_is_not_there_is_an_error_and_not_the_cpu(load: Any) -> None:
    with pytest.raises(ExecutorUnavailableError, match="device_map is 'cuda', but the task has no"):
        load(device_map="cuda")
    if torch.cuda.is_available():
        pytest.skip("this torch sees a GPU")
    for wanted in (None, "cuda", "auto"):
        with pytest.raises(ExecutorUnavailableError, match="a GPU that this torch does not see"):
            load(device_map=wanted, gpus=1)
    assert load(device_map="cpu", gpus=1)._device.type == "cpu"


@pytest.mark.parametrize(
    ("wanted", "gpus", "found"),
    [
        *((None, 1, "cuda:0"), ("cuda", 2, "cuda:0"), ("auto", 2, "auto")),
        *(("balanced_low_0", 2, "balanced_low_0"), ("cpu", 2, "cpu"), ("auto", 0, "cpu")),
    ],
)
def test_with_a_gpu_the_document_decides_where_weights_go(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, gpus: int, found: str
) -> None:
    from flowmesh_transformers.loading import _device_map

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device_map(wanted, gpus) == found


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_quantization_without_its_package_names_it(load: Any, options: Any) -> None:
    with pytest.raises(ExecutorUnavailableError, match="bitsandbytes"):
        load(**options)


def test_an_attention_that_is_not_installed_or_not_known_is_an_error(load: Any) -> None:
    with pytest.raises((ExecutorUnavailableError, InputError), match=r"[Ff]lash.?[Aa]ttention.?2"):
        load(use_flash_attention_2=True)
    with pytest.raises(InputError, match="fastest"):
        load(attn_implementation="fastest")


def test_weights_that_are_missing_are_an_error_and_not_random(load: Any, copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "model.safetensors"
    whole = load_file(path)
    gone = [name for name in whole if "layers.1.mlp" in name]
    save_file({k: v for k, v in whole.items() if k not in gone}, path, metadata={"format": "pt"})
    message = r"has no weights for model\.layers\.1\.mlp\.down_proj\.weight and 2 more"
    with pytest.raises(InputError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"not weights"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "nothing-known"}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_files_that_cannot_be_read_are_the_documents_fault(
    load: Any, copy: Path, file: str, content: bytes
) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(InputError, match="transformers cannot load") as caught:
        load(copy)
    assert not caught.value.retriable


def test_a_model_of_the_hub_that_cannot_be_reached_may_be_tried_again(load: Any) -> None:
    with pytest.raises(InputError, match="transformers cannot load") as caught:
        load(Path("acme/never-there"))
    assert caught.value.retriable


def test_memory_that_ran_out_while_loading_is_left_to_the_core() -> None:
    from flowmesh_transformers.loading import readable

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), readable("a model"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_encoder_with_a_decoder_is_refused(load: Any, tiny: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=400, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="T5Model has an encoder and a decoder"):
        load(tmp_path / "t5", tokenizer=tiny, embeds=True)


def test_a_template_of_the_document_replaces_the_models(load: Any) -> None:
    engine = load(chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert engine.render([{"role": "user", "content": "hi"}]) == "[hi]"


def test_a_tokenizer_without_a_template_has_none(load: Any, copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    engine = load(copy)
    assert not engine.has_chat_template
    assert load().has_chat_template


def test_an_answer_ends_with_any_end_mark_that_the_files_name(load: Any, copy: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(copy)
    assert load(copy)._ends == {7, 8, 1}


def test_the_budget_grows_with_the_model_and_stays_within_free_memory(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowmesh_transformers import engine as module

    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1000)
    budget = load(max_batch_size=5).budget()
    # two layers of keys and values of one head of 32, beside what a layer computes with
    assert budget.token_bytes == 4 * (2 * 2 * 32 + 8 * 64 + 3 * 128)
    assert (budget.rows, budget.memory_bytes, budget.row_bytes) == (5, 500, 32 * 320)
    assert load(dtype="bf16").budget().token_bytes == budget.token_bytes // 2


def test_a_model_that_does_not_say_its_sizes_is_bounded_by_rows_alone() -> None:
    from flowmesh_transformers.engine import _measure

    class Bare:
        def get_text_config(self) -> Bare:
            return self

    model = type("Model", (), {"config": Bare()})()
    assert _measure(model, torch.device("cpu"), 3).memory_bytes is None


def test_unloading_twice_is_fine(load: Any) -> None:
    engine = load()
    engine.close()
    engine.close()


# Adapters.


@pytest.fixture
def make_lora(tiny: Path, tmp_path: Path) -> Callable[..., AdapterRef]:
    """Write a LoRA adapter with strong random weights."""

    def make(name: str, *, seed: int = 0, scale: float = 1, apply: str = "runtime", **config: Any):  # type: ignore[no-untyped-def]
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny)
        wanted = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **config}
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **wanted))
        for key, value in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.3)
        model.save_pretrained(tmp_path / name)
        return AdapterRef(name=name, path=tmp_path / name, scale=scale, apply=apply)

    return make


def add_by_hand(engine: Any, adapter: AdapterRef, *, factor: float) -> None:
    from safetensors.torch import load_file

    found = load_file(adapter.path / "adapter_model.safetensors")
    for name, down in found.items():
        if "lora_A" in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weight = engine._model.get_parameter(target)
            with torch.no_grad():
                weight += factor * found[name.replace("lora_A", "lora_B")] @ down


@pytest.mark.parametrize(
    "kinds", [("runtime", "runtime"), ("merge", "merge"), ("merge", "runtime")]
)
def test_adapters_add_up_each_with_its_scale(load: Any, make_lora: Any, kinds: Any) -> None:
    one = make_lora("one.v1", seed=1, scale=0.5, apply=kinds[0], lora_dropout=0.5)
    two = make_lora("two", seed=2, scale=-2, apply=kinds[1], target_modules=["o_proj", "q_proj"])
    expected = load()
    plain = logits(expected)
    add_by_hand(expected, one, factor=0.5 * 6 / 2)
    add_by_hand(expected, two, factor=-2 * 6 / 2)
    got = logits(load(adapters=(one, two)))
    torch.testing.assert_close(got, logits(expected), rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1


def test_merged_adapters_leave_nothing_of_themselves_in_the_model(
    load: Any, make_lora: Any
) -> None:
    def layers(apply: str) -> list[str]:
        model = load(adapters=(make_lora("one", apply=apply),))._model
        return [name for name, _ in model.named_modules() if "lora" in name]

    assert layers("merge") == []
    assert layers("runtime")


def test_an_adapter_of_scale_zero_changes_nothing(load: Any, make_lora: Any) -> None:
    torch.testing.assert_close(logits(load(adapters=(make_lora("one", scale=0),))), logits(load()))


def test_adapters_that_do_not_fit_the_model_are_refused_by_name(load: Any, make_lora: Any) -> None:
    from safetensors.torch import load_file, save_file

    other = make_lora("other")
    config = other.path / "adapter_config.json"
    written = config.read_text()
    config.write_text(written.replace('"q_proj"', '"query"').replace('"v_proj"', '"value"'))
    with pytest.raises(InputError, match=r"adapter other: .*[Tt]arget modules"):
        load(adapters=(other,))
    config.write_text(written)
    file = other.path / "adapter_model.safetensors"
    whole = load_file(file)
    first = min(whole)
    save_file({**whole, first: torch.zeros(2, 9)}, file)
    with pytest.raises(InputError, match=r"adapter other: .*size mismatch"):
        load(adapters=(other,))
    save_file({k: v for k, v in whole.items() if k != first}, file)
    with pytest.raises(InputError, match=r"adapter other: .*lora_A.* does not fit the model"):
        load(adapters=(other,))


def test_a_checkpoint_speaks_with_its_own_weights(
    tiny: Path, copy: Path, make_lora: Any, load: Any, make_context: Any
) -> None:
    from flowmesh_transformers.executor import TransformersExecutor

    tuned = load(adapters=(make_lora("tuned", apply="merge"),))
    tuned._model.save_pretrained(copy)
    lora = make_lora("tuned")

    def say(**inputs: Any) -> list[str]:
        executor = TransformersExecutor()
        ctx = make_context(["fox", "tea"], tiny, inputs=inputs, temperature=0, max_tokens=16)
        executor.load(ctx)
        items = executor.run(ctx).result["items"]
        executor.unload()
        return [item["output"] for item in items]

    base, whole, adapter = say(), say(checkpoint=copy), say(checkpoint=lora.path)
    assert whole == adapter != base


def test_the_weights_of_another_model_are_never_served(tiny: Path, copy: Path, load: Any) -> None:
    engine = load()
    with torch.no_grad():
        engine._model.lm_head.weight.mul_(-1)
    engine._model.save_pretrained(copy)
    found = [
        find_weights(Inputs(model=ModelRef(identifier="acme/small", path=path)))
        for path in (tiny, copy)
    ]
    one, other = (load(Path(weights.model.name)) for weights in found)
    torch.testing.assert_close(logits(one), -logits(other))
