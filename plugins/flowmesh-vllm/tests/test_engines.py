"""Several engines on one worker: embeddings, merged adapters, checkpoints, and room for one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowmesh_core import EmbeddingResult
from flowmesh_core.testing import build_lora, build_tiny_llama

Spec = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def make_spec(options: dict[str, Any]) -> Spec:
    def make(
        model: Path, *prompts: str, adapters: tuple[dict[str, Any], ...] = (), **blocks: Any
    ) -> dict[str, Any]:
        return {
            "taskType": "inference",
            "executor": "vllm",
            "model": {
                "source": {"identifier": str(model)},
                "vllm": {**options, "max_model_len": 128, "kv_cache_memory_bytes": 2**26},
                "adapters": list(adapters),
            },
            "data": {"type": "list", "items": list(prompts)},
            "inference": {"temperature": 0, "max_tokens": 8},
            **blocks,
        }

    return make


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("other"), seed=12)


@pytest.fixture(scope="module")
def tuned(fleet: Any, tiny_llama: Path) -> str:
    """Id of an earlier task that left a LoRA for the tiny model."""
    folder = fleet.results / "tuning" / "final_lora"
    folder.mkdir(parents=True)
    build_lora(folder, tiny_llama, seed=5, strength=0.5)
    return "tuning"


def outputs(result: dict[str, Any]) -> list[str]:
    return [item["output"] for item in result["items"]]


def test_what_an_earlier_task_tuned_is_used_and_never_the_base_alone(
    fleet: Any, make_spec: Spec, tiny_llama: Path, tuned: str
) -> None:
    prompts = ("the quick brown fox", "seven wizards brew")
    load = {"load": {"taskId": tuned}}
    fleet.send("checkpoint", make_spec(tiny_llama, *prompts, checkpoint=load))
    said = outputs(fleet.result("checkpoint"))
    fleet.send("base", make_spec(tiny_llama, *prompts))
    assert said != outputs(fleet.result("base"))
    fleet.send("requested", make_spec(tiny_llama, *prompts, adapters=({"taskId": tuned},)))
    assert outputs(fleet.result("requested")) == said
    engines = fleet.engines()
    assert len(engines) == 2  # base and requested share one
    adapters = ({"taskId": tuned, "apply": "merge"},)
    fleet.send("merged", make_spec(tiny_llama, *prompts, adapters=adapters))
    assert outputs(fleet.result("merged")) == said
    assert not list(fleet.results.glob("*/.merged"))


def test_a_checkpoint_that_cannot_be_found_is_an_error(
    fleet: Any, make_spec: Spec, tiny_llama: Path
) -> None:
    load = {"load": {"taskId": "never-was"}}
    fleet.send("lost", make_spec(tiny_llama, "hello", checkpoint=load))
    assert "never-was" in fleet.error("lost")


def test_texts_become_vectors(fleet: Any, make_spec: Spec, tiny_llama: Path) -> None:
    texts = ("the quick brown fox", "seven wizards brew", "the quick brown fox")
    fleet.send("vectors", make_spec(tiny_llama, *texts, taskType="embedding"))
    result = EmbeddingResult.model_validate(fleet.result("vectors"))
    first, second, third = (item["embedding"] for item in result.items)
    assert result.dimensions == 64
    assert math.isclose(math.hypot(*first), 1, rel_tol=1e-5)
    assert math.dist(first, third) < 0.02
    assert math.dist(first, second) > 0.1
    assert result.usage.completion_tokens == 0
    assert result.usage.prompt_tokens > 0


def test_two_models_alternate_where_there_is_memory_for_one(
    fleet: Any, make_spec: Spec, tiny_llama: Path, other_llama: Path
) -> None:
    seen = []
    answers: dict[Path, set[str]] = {tiny_llama: set(), other_llama: set()}
    for number, model in enumerate((other_llama, tiny_llama, other_llama)):
        # More than is ever free beside another engine.
        memory = psutil.virtual_memory().total * 99 // 100
        hardware = {"hardware": {"memory": memory}}
        fleet.send(f"turn-{number}", make_spec(model, "the quick brown fox", resources=hardware))
        answers[model] |= set(outputs(fleet.result(f"turn-{number}")))
        seen.append(fleet.engines())
        assert len(seen[-1]) == 1
    assert len({engine for (engine,) in seen}) == 3
    assert [len(said) for said in answers.values()] == [1, 1]
    assert answers[tiny_llama] != answers[other_llama]


def test_weights_that_were_replaced_are_loaded_anew(
    fleet: Any, make_spec: Spec, tmp_path: Path
) -> None:
    said = []
    for seed in (21, 22):
        build_tiny_llama(tmp_path / "model", seed=seed)
        fleet.send(f"weights-{seed}", make_spec(tmp_path / "model", "the quick brown fox"))
        said.append(outputs(fleet.result(f"weights-{seed}")))
    assert said[0] != said[1]


def test_who_loads_the_engine_spoils_it_for_nobody(
    fleet: Any, make_spec: Spec, tiny_llama: Path, tmp_path: Path
) -> None:
    model = build_tiny_llama(tmp_path / "model", seed=31)
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    fleet.send("first", make_spec(model, "hello", adapters=({"path": str(wrong)},)))
    fleet.send("cancelled", make_spec(model, "the quick brown fox"))
    fleet.send("second", make_spec(model, "the quick brown fox"))
    fleet.order(type="CANCEL", task_id="cancelled")
    assert "peft_type must be LORA" in fleet.error("first")
    assert fleet.result("second")["ok"]
    assert "cancelled" in fleet.error("cancelled")


def test_a_worker_serves_a_model_until_it_is_told_to_stop(
    fleet: Any, make_spec: Spec, tiny_llama: Path
) -> None:
    openai = pytest.importorskip("openai")
    spec = make_spec(tiny_llama, taskType="serve", executor="vllm.serve", serve={"api_key": "k"})
    before = set(fleet.engines())
    fleet.send("endpoint", spec)
    result = fleet.result("endpoint")
    with openai.OpenAI(base_url=result["endpoint"], api_key="k", max_retries=0) as client:
        said = client.completions.create(
            model=result["model"], prompt="the quick brown fox", max_tokens=8, temperature=0
        )
        assert said.usage.completion_tokens > 0
        assert len(set(fleet.engines()) - before) == 1
        fleet.order(type="CANCEL", task_id="endpoint")
        fleet.wait_for(lambda: set(fleet.engines()) <= before)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
