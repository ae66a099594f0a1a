"""Which of several engines gets a task: by rule, whatever was installed first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from flowmesh_core.errors import ExecutorUnavailableError, PluginLoadError
from flowmesh_core.executor import Executor, ExecutorInfo
from flowmesh_core.registry import ExecutorRegistry

HUB = {"model": {"source": {"identifier": "acme/small"}}}
GGUF = {"model": {"source": {"type": "file", "path": "/models/q4.gguf"}}}
NO_MODEL: dict[str, Any] = {}


def declare(name: str, **fields: Any) -> ExecutorInfo:
    return ExecutorInfo(**{"name": name, "task_types": {"inference"}, "target": "m:C", **fields})


# As these engines declare themselves.
LLAMACPP = declare("llamacpp", capabilities={"cpu", "concurrent"}, model_formats={"gguf"})
TRANSFORMERS = declare(
    "transformers",
    capabilities={"cpu", "gpu", "group"},
    model_formats={"hf", "gguf"},
    priority=-1,
)
VLLM = declare(
    "vllm",
    capabilities={"cpu", "gpu", "concurrent"},  # as no build of it is: what the rule says of both
    model_formats={"hf"},
    priority=1,
    cpu_priority=-2,
)
FOR_GPUS = attrs.evolve(VLLM, capabilities=["gpu", "concurrent"])
FOR_CPUS = attrs.evolve(VLLM, capabilities=["cpu", "concurrent"])


def registries(*infos: ExecutorInfo, **options: Any) -> Iterator[ExecutorRegistry]:
    """Yield a registry for each order in which the engines may have been installed."""
    for some in itertools.permutations(infos):
        yield ExecutorRegistry(some, **options)


def chosen(*infos: ExecutorInfo, spec: Any, enforce_cpu: bool = False, **options: Any) -> set[str]:
    return {
        registry.resolve("inference", spec, enforce_cpu=enforce_cpu).name
        for registry in registries(*infos, **options)
    }


@pytest.mark.parametrize("vllm", [FOR_GPUS, FOR_CPUS, VLLM], ids=["gpus", "cpus", "both"])
@pytest.mark.parametrize(
    ("spec", "gpu_count", "enforce_cpu", "names"),
    [
        (HUB, 1, False, ("vllm", "transformers")),
        (HUB, 0, False, ("transformers",)),  # vLLM takes longer to start there
        (HUB, 1, True, ("transformers",)),
        (GGUF, 0, False, ("llamacpp",)),
        (GGUF, 1, True, ("llamacpp",)),
        (GGUF, 1, False, ("transformers",)),  # the one that uses the GPU
        (NO_MODEL, 1, False, ("vllm", "transformers")),
        (NO_MODEL, 0, False, ("llamacpp",)),
        (NO_MODEL, 1, True, ("llamacpp",)),
    ],
)
def test_the_order_of_installation_decides_nothing(
    vllm: ExecutorInfo, spec: Any, gpu_count: int, enforce_cpu: bool, names: tuple[str, ...]
) -> None:
    """``names``: who gets it, and who does where this vLLM cannot use a GPU."""
    found = chosen(
        LLAMACPP, TRANSFORMERS, vllm, spec=spec, gpu_count=gpu_count, enforce_cpu=enforce_cpu
    )
    assert found == {names[-1] if vllm is FOR_CPUS else names[0]}


@pytest.mark.parametrize(("gpu_count", "enforce_cpu"), [(0, False), (1, False), (2, True)])
def test_who_is_the_only_one_for_a_format_gets_it_whatever_its_rank(
    gpu_count: int, enforce_cpu: bool
) -> None:
    options: dict[str, Any] = {"gpu_count": gpu_count, "enforce_cpu": enforce_cpu}
    assert chosen(LLAMACPP, VLLM, spec=HUB, **options) == {"vllm"}
    assert chosen(LLAMACPP, VLLM, spec=GGUF, **options) == {"llamacpp"}


def test_a_build_for_gpus_is_no_choice_where_there_are_none_or_none_may_be_used() -> None:
    for registry in registries(LLAMACPP, FOR_GPUS):
        with pytest.raises(ExecutorUnavailableError, match=r"executor 'vllm' needs a GPU"):
            registry.resolve("inference", HUB)
    for registry in registries(LLAMACPP, FOR_GPUS, gpu_count=2):
        with pytest.raises(ExecutorUnavailableError, match=r"'vllm' needs a GPU, and enforce_cpu"):
            registry.resolve("inference", HUB, enforce_cpu=True)


@pytest.mark.parametrize(("gpu_count", "enforce_cpu"), [(0, False), (1, False), (1, True)])
def test_the_operators_preference_goes_before_every_rank(gpu_count: int, enforce_cpu: bool) -> None:
    options: dict[str, Any] = {"gpu_count": gpu_count, "enforce_cpu": enforce_cpu}
    for first in ("vllm", "transformers"):
        prefer = {"inference": [first]}
        infos = (LLAMACPP, TRANSFORMERS, VLLM)
        assert chosen(*infos, spec=HUB, preferences=prefer, **options) == {first}


def test_the_rank_on_a_cpu_is_the_other_one_only_when_it_is_given() -> None:
    plain, both = declare("a", priority=3), declare("b", priority=3, cpu_priority=0)
    assert (plain.rank(on_gpu=True), plain.rank(on_gpu=False)) == (3, 3)
    assert (both.rank(on_gpu=True), both.rank(on_gpu=False)) == (3, 0)
    assert ExecutorInfo.from_dict(both.to_dict()) == both


def test_an_executor_without_a_gpu_of_its_own_has_its_rank_of_the_cpu_everywhere() -> None:
    slow = declare("slow", capabilities={"cpu"}, priority=9, cpu_priority=-9)
    other = declare("other", capabilities={"cpu"})
    for gpu_count in (0, 2):
        assert chosen(slow, other, spec=NO_MODEL, gpu_count=gpu_count) == {"other"}


def test_what_uses_the_gpu_goes_before_what_does_not_whatever_their_ranks() -> None:
    infos = (declare("high", priority=100), declare("low", capabilities={"gpu"}, priority=-100))
    assert chosen(*infos, spec=NO_MODEL, gpu_count=1) == {"low"}
    assert chosen(*infos, spec=NO_MODEL) == {"high"}


def test_equals_are_told_apart_by_their_names() -> None:
    infos = [declare(name) for name in ("c", "a", "b")]
    assert chosen(*infos, spec=NO_MODEL) == {"a"}


def test_whoever_chooses_gets_the_candidates_best_first() -> None:
    seen: list[list[str]] = []

    def choose(*, candidates: Any, **_about: Any) -> None:
        seen.append([info.name for info in candidates])

    for registry in registries(LLAMACPP, TRANSFORMERS, VLLM, gpu_count=1, choose=choose):
        registry.resolve("inference", NO_MODEL)
        registry.resolve("inference", NO_MODEL, enforce_cpu=True)
    best_first = {("vllm", "transformers", "llamacpp"), ("llamacpp", "transformers", "vllm")}
    assert {tuple(names) for names in seen} == best_first


def test_a_class_that_cannot_run_tasks_is_refused_and_its_name_stays_free() -> None:
    class Idle(Executor):
        pass

    registry = ExecutorRegistry()
    info = declare("acme", target="acme.tts:Idle")
    with pytest.raises(PluginLoadError, match=r"acme\.tts:Idle must define run, or run_group"):
        registry.register(info, Idle)
    with pytest.raises(PluginLoadError, match=r"must be a subclass of flowmesh_core\.Executor"):
        registry.register(info, str)  # type: ignore[arg-type]
    assert not registry.infos
    assert registry.places(info) == info.places
