from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowmesh_core.contract import parse_task
from flowmesh_core.errors import ContractError, ResourceError
from flowmesh_core.resources import Grant, ResourceLedger, ResourceRequest, parse_resources
from flowmesh_core.telemetry.probes import Gpu

GIB = 1024**3
NOTHING = ResourceRequest()
DOCUMENTS = Path(__file__).parent / "documents"


def hardware(**fields: Any) -> ResourceRequest:
    return parse_resources({"hardware": fields}, where="task t1")


def problems(resources: dict[str, Any]) -> Sequence[str]:
    with pytest.raises(ContractError, match=r"^task t1: ") as caught:
        parse_resources(resources, where="task t1")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "cores"),
    [(4, 4), ("4", 4), ("500m", 0.5), (0.5, 0.5), (" 1.5 ", 1.5), ("2500m", 2.5), (0, 0)],
)
def test_cores_come_whole_in_parts_and_in_thousandths(text: object, cores: float) -> None:
    assert hardware(cpu=text) == ResourceRequest(cpu=cores)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16Gi", 16 * GIB),
        ("1.5Gi", 3 * GIB // 2),
        ("16 GB", 16 * GIB),
        ("512M", 512 * 1024**2),
        ("512mib", 512 * 1024**2),
        (" 3k ", 3072),
        ("1T", 1024**4),
        ("1024Ti", 1024**5),
        ("7b", 7),
        ("8192", 8192),
        (8192, 8192),
        (8192.0, 8192),
        ("0.3K", 308),
        ("0.1B", 1),
    ],
)
def test_sizes_count_in_powers_of_1024_and_round_up(text: object, size: int) -> None:
    assert hardware(memory=text).memory_bytes == size
    assert hardware(gpu={"memory": text}).gpu_memory_bytes == size


@given(
    number=st.integers(1, 9999),
    power=st.integers(0, 3),
    inner=st.sampled_from(["", "i"]),
    last=st.sampled_from(["", "b"]),
    gap=st.sampled_from(["", " "]),
    upper=st.booleans(),
)
def test_every_spelling_of_a_unit_means_the_same(
    number: int, power: int, inner: str, last: str, gap: str, upper: bool
) -> None:
    unit = f"{'kmg'[power - 1]}{inner}{last}" if power else last
    text = f"{number}{gap}{unit.upper() if upper else unit}"
    assert hardware(memory=text).memory_bytes == number * 1024**power


@pytest.mark.parametrize("wanted", [2, "2", " 2 ", 2.0])
def test_gpus_are_counted_in_a_block_or_alone(wanted: object) -> None:
    alone = hardware(gpu=wanted)
    assert alone == hardware(gpu={"count": wanted}) == ResourceRequest(gpu_count=2)


@pytest.mark.parametrize("kind", ["", "any", "Auto", " * ", None])
def test_some_words_ask_for_any_gpu(kind: object) -> None:
    assert hardware(gpu={"type": kind}) == ResourceRequest()


@pytest.mark.parametrize(("kind", "name"), [("A100", "a100"), (" L40S ", "l40s"), (4090, "4090")])
def test_a_type_is_part_of_a_name_in_any_case(kind: object, name: str) -> None:
    assert hardware(gpu={"type": kind}).gpu_type == name


@pytest.mark.parametrize(
    "resources",
    [
        {},
        {"hardware": None},
        {"hardware": {}},
        {"hardware": {"cpu": None, "memory": None, "gpu": None}},
        {"hardware": {"gpu": {"count": None, "type": None, "memory": None}}},
        {"replicas": 3, "parallel": {"degree": 2}, "estimatedLoad": "high"},
    ],
)
def test_null_is_absent_and_keys_of_others_pass(resources: dict[str, Any]) -> None:
    assert parse_resources(resources, where="task t1") == ResourceRequest()


def test_the_documented_block_is_read() -> None:
    document = yaml.safe_load((DOCUMENTS / "resources.yaml").read_text())
    task = parse_task(document, task_id="t1")
    assert parse_resources(task.common.resources, where="task t1") == ResourceRequest(
        cpu=4, memory_bytes=16 * GIB, gpu_count=1, gpu_memory_bytes=24 * GIB
    )


ODD: tuple[object, ...] = (
    "",
    "many",
    "-1",
    -1,
    True,
    False,
    math.nan,
    math.inf,
    "nan",
    [4],
    {},
    10**400,
    "9" * 400,
)
NO_SIZES = ("16X", "16i", "1,5Gi", "Gi", "1e9", "16 Gi b", "16\u212a", "\u0661Gi", "1025Ti")


@pytest.mark.parametrize("value", [*ODD, "4 cores", "500M", "0.5.5", "1000001"])
def test_cores_that_cannot_be_read_are_refused(value: object) -> None:
    (problem,) = problems({"hardware": {"cpu": value}})
    assert problem.startswith("spec.resources.hardware.cpu must be like 4, 0.5 or 500m, got ")


@pytest.mark.parametrize("value", [*ODD, *NO_SIZES, 0, "0Gi", 0.0])
@pytest.mark.parametrize("field", ["memory", "gpu.memory"])
def test_sizes_that_cannot_be_read_are_refused(field: str, value: object) -> None:
    block = {"memory": value} if field == "memory" else {"gpu": {"memory": value}}
    (problem,) = problems({"hardware": block})
    assert problem.startswith(f"spec.resources.hardware.{field} must be like 16Gi (above 0, ")


@pytest.mark.parametrize("value", [*ODD, 1.5, "1.5", "two", 10_001])
def test_counts_that_cannot_be_read_are_refused(value: object) -> None:
    (problem,) = problems({"hardware": {"gpu": {"count": value}}})
    assert problem.startswith("spec.resources.hardware.gpu.count must be a whole number of GPUs")


@pytest.mark.parametrize("value", [True, 1.5, ["a100"], {}])
def test_a_type_that_is_no_name_is_refused(value: object) -> None:
    (problem,) = problems({"hardware": {"gpu": {"type": value}}})
    assert problem.startswith("spec.resources.hardware.gpu.type must be part of a GPU's name")


@pytest.mark.parametrize("value", ["big", 4, ["cpu"]])
def test_a_block_that_is_no_object_is_refused(value: object) -> None:
    (problem,) = problems({"hardware": value})
    assert problem.startswith("spec.resources.hardware must be an object, got ")


def test_every_problem_is_named_at_once() -> None:
    fields = {"cpu": "fast", "memory": "16X", "gpu": {"count": -1, "type": [], "memory": "1.2.3"}}
    names = [problem.split(" must")[0] for problem in problems({"hardware": fields})]
    expected = ["cpu", "memory", "gpu.count", "gpu.type", "gpu.memory"]
    assert names == [f"spec.resources.hardware.{name}" for name in expected]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"memry": "1Gi"}, "spec.resources.hardware: unknown key 'memry', did you mean 'memory'?"),
        (
            {"gpu": {"cuont": 1}},
            "spec.resources.hardware.gpu: unknown key 'cuont', did you mean 'count'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(block: Any, problem: str) -> None:
    assert problems({"hardware": block}) == (problem,)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["hardware", "cpu", "memory", "gpu", "count", "type"]), inner
            )
        ),
        max_leaves=6,
    )
)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    try:
        request = parse_resources({"hardware": value}, where="task t1")
    except ContractError as exc:
        wrong = [text for text in exc.problems if not text.startswith("spec.resources.hardware")]
    else:
        sizes = (request.memory_bytes, request.gpu_memory_bytes)
        wrong = [f"{size} bytes" for size in sizes if size is not None and size <= 0]
        wrong += [f"{amount}" for amount in (request.cpu, request.gpu_count) if (amount or 0) < 0]
    assert wrong == []


@pytest.mark.parametrize(
    ("asked", "wants"),
    [
        (ResourceRequest(), False),
        (ResourceRequest(cpu=4, memory_bytes=GIB), False),
        (ResourceRequest(gpu_count=1), True),
        (ResourceRequest(gpu_count=0, gpu_type="a100", gpu_memory_bytes=GIB), False),
        (ResourceRequest(gpu_type="a100"), True),
        (ResourceRequest(gpu_memory_bytes=GIB), True),
    ],
)
def test_a_request_knows_whether_it_wants_a_gpu(asked: ResourceRequest, wants: bool) -> None:
    assert asked.wants_gpu is wants


class Desk:
    """A ledger on a loop that runs only when told, by a clock that is set by hand."""

    def __init__(
        self,
        *,
        slots: int = 8,
        memory: int | None = 16 * GIB,
        gpus: Sequence[Gpu] = (),
        patience_s: float = 30.0,
    ) -> None:
        self.now = 1000.0
        self.loop = asyncio.new_event_loop()
        self.ledger = ResourceLedger(
            slots, 8, memory, gpus, clock=lambda: self.now, patience_s=patience_s
        )

    def ask(
        self, request: ResourceRequest = NOTHING, *, gpu: bool = False, **how: Any
    ) -> asyncio.Task[Grant]:
        task = self.loop.create_task(self.ledger.acquire(request, uses_gpu=gpu, **how))
        self.settle()
        return task

    def take(self, request: ResourceRequest = NOTHING, *, gpu: bool = False, **how: Any) -> Grant:
        task = self.ask(request, gpu=gpu, **how)
        assert task.done(), "must be granted at once"
        return task.result()

    def settle(self) -> None:
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def cancel(self, *tasks: asyncio.Task[Grant]) -> None:
        for task in tasks:
            task.cancel()
        self.settle()

    def close(self) -> None:
        self.cancel(*asyncio.all_tasks(self.loop))
        self.loop.close()


@pytest.fixture
def desk() -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(**how: Any) -> Desk:
        made.append(Desk(**how))
        return made[-1]

    yield make
    for each in made:
        each.close()


def gpu(index: int, name: str = "NVIDIA A100", memory: int | None = 40 * GIB) -> Gpu:
    return Gpu(index=index, name=name, uuid=f"GPU-{index}", memory_bytes=memory)


def memory(size_gib: int) -> ResourceRequest:
    return ResourceRequest(memory_bytes=size_gib * GIB)


def gpus(number: int) -> ResourceRequest:
    return ResourceRequest(gpu_count=number)


def test_slots_are_granted_in_order_of_arrival(desk: Callable[..., Desk]) -> None:
    one = desk(slots=1)
    first = one.take()
    assert one.ledger.full
    second, third = one.ask(), one.ask()
    assert one.ledger.waiting == 2
    first.release()
    one.settle()
    assert second.done()
    assert not third.done()


def test_the_highest_priority_goes_first(desk: Callable[..., Desk]) -> None:
    one = desk(slots=1)
    first = one.take()
    low, high, middle = (one.ask(priority=priority) for priority in (0, 5, 3))
    first.release()
    one.settle()
    assert high.done()
    high.result().release()
    one.settle()
    assert middle.done()
    assert not low.done()


def test_a_context_gives_everything_back_once(desk: Callable[..., Desk]) -> None:
    two = desk(slots=2, gpus=[gpu(0)])
    empty = two.ledger.snapshot()
    with two.take(attrs.evolve(memory(4), gpu_count=1), gpu=True) as grant:
        assert two.ledger.snapshot() == {
            "slots": 2,
            "free_slots": 1,
            "free_memory_bytes": 12 * GIB,
            "devices_in_use": ["0"],
            "waiting": 0,
        }
        assert grant.devices == ("0",)
    grant.release()
    grant.release_slot()
    assert two.ledger.snapshot() == empty
    assert not two.ledger.full


def test_a_service_keeps_all_but_its_slot(desk: Callable[..., Desk]) -> None:
    one = desk(slots=1, gpus=[gpu(0)])
    service = one.take(attrs.evolve(memory(4), gpu_count=1), gpu=True)
    waiting = one.ask()
    service.release_slot()
    service.release_slot()
    one.settle()
    waiting.result().release()
    held = one.ledger.snapshot()
    assert (held["free_slots"], held["free_memory_bytes"]) == (1, 12 * GIB)
    assert held["devices_in_use"] == ["0"]
    service.release()
    freed = one.ledger.snapshot()
    assert (freed["free_slots"], freed["free_memory_bytes"]) == (1, 16 * GIB)
    assert freed["devices_in_use"] == []


def test_unknown_memory_is_never_short(desk: Callable[..., Desk]) -> None:
    any_size = desk(memory=None)
    any_size.take(memory(1000))
    any_size.take(memory(1000))
    assert any_size.ledger.snapshot()["free_memory_bytes"] is None


def test_memory_is_reserved_and_cores_are_not(desk: Callable[..., Desk]) -> None:
    many = desk()
    first = many.take(attrs.evolve(memory(10), cpu=8))
    many.take(attrs.evolve(memory(6), cpu=8))
    last = many.ask(memory(1))
    assert not last.done()
    first.release()
    many.settle()
    assert last.done()


MIXED = [gpu(0, "NVIDIA A100"), gpu(1, "NVIDIA L4", 23 * GIB), gpu(2, "NVIDIA A100", 80 * GIB)]
OLD = [gpu(0, "NVIDIA K80", None)]


@pytest.mark.parametrize(
    ("gpu_list", "asked", "uses_gpu", "message"),
    [
        ((), ResourceRequest(cpu=9), False, "9 CPU cores, this machine has 8; ask for less"),
        ((), memory(17), False, "17 GiB of memory, this machine has 16 GiB; ask for less"),
        ((), gpus(1), True, "1 GPU, this machine has no GPU; ask for less"),
        ((), ResourceRequest(gpu_type="a100"), True, "1 GPU named like 'a100', this machine has"),
        ((), ResourceRequest(gpu_memory_bytes=1), True, "1 GPU with .* has no GPU"),
        (
            MIXED,
            gpus(4),
            True,
            r"4 GPUs, this machine has 3 that match among 1 x NVIDIA A100 with 40 GiB, "
            r"1 x NVIDIA L4 with 23 GiB, 1 x NVIDIA A100 with 80 GiB; ask for less",
        ),
        (
            MIXED,
            ResourceRequest(gpu_count=2, gpu_type="a100", gpu_memory_bytes=48 * GIB),
            True,
            "2 GPUs named like 'a100' with 48 GiB, this machine has 1 that match among",
        ),
        (MIXED, ResourceRequest(gpu_type="h100"), True, "1 GPU named like 'h100', .* has 0 that"),
        (
            OLD,
            ResourceRequest(gpu_memory_bytes=GIB),
            True,
            "1 GPU with 1 GiB, .* 0 that match among .*K80 with unk",
        ),
        (MIXED, gpus(1), False, r"1 GPU, but runs on the CPU \(gpu.count 0 would be right there"),
    ],
)
def test_what_the_machine_can_never_meet_is_refused_at_once(
    desk: Callable[..., Desk],
    gpu_list: Sequence[Gpu],
    asked: ResourceRequest,
    uses_gpu: bool,
    message: str,
) -> None:
    ledger = desk(gpus=gpu_list, slots=1)
    ledger.take()
    with pytest.raises(ResourceError, match=f"^spec.resources.hardware asks for {message}"):
        ledger.ledger.check(asked, uses_gpu=uses_gpu)
    with pytest.raises(ResourceError, match=message):
        ledger.ask(asked, gpu=uses_gpu).result()
    assert ledger.ledger.waiting == 0


def test_everything_asked_for_in_vain_is_named(desk: Callable[..., Desk]) -> None:
    asked = ResourceRequest(cpu=9, memory_bytes=17 * GIB, gpu_count=1)
    message = "9 CPU cores, .*; for 17 GiB of memory, .*; for 1 GPU, this machine has no GPU; ask"
    with pytest.raises(ResourceError, match=message):
        desk().ledger.check(asked, uses_gpu=True)


@pytest.mark.parametrize(
    ("asked", "uses_gpu"),
    [
        (ResourceRequest(cpu=8, memory_bytes=16 * GIB), False),
        (ResourceRequest(gpu_type="h100", gpu_memory_bytes=1000 * GIB), False),
        (ResourceRequest(gpu_count=0, gpu_type="h100"), False),
        (ResourceRequest(gpu_count=0, gpu_type="h100"), True),
    ],
)
def test_what_runs_on_the_cpu_is_granted_no_gpu(
    desk: Callable[..., Desk], asked: ResourceRequest, uses_gpu: bool
) -> None:
    ledger = desk(gpus=MIXED)
    ledger.ledger.check(asked, uses_gpu=uses_gpu)
    assert ledger.take(asked, gpu=uses_gpu).devices == ()


def test_an_executor_that_can_use_gpus_runs_where_there_are_none(
    desk: Callable[..., Desk],
) -> None:
    assert desk().take(gpu=True).devices == ()


def test_count_type_and_memory_are_met_together(desk: Callable[..., Desk]) -> None:
    ledger = desk(gpus=MIXED)
    asked = ResourceRequest(gpu_count=1, gpu_type="a100", gpu_memory_bytes=48 * GIB)
    assert ledger.take(asked, gpu=True).devices == ("2",)
    assert not ledger.ask(asked, gpu=True).done()
    assert ledger.take(ResourceRequest(gpu_type="a100"), gpu=True).devices == ("0",)


def test_without_a_count_one_slot_gets_all_that_match_and_several_get_one(
    desk: Callable[..., Desk],
) -> None:
    a100 = ResourceRequest(gpu_type="a100")
    assert desk(slots=1, gpus=MIXED).take(gpu=True).devices == ("0", "1", "2")
    assert desk(slots=1, gpus=MIXED).take(a100, gpu=True).devices == ("0", "2")
    assert desk(slots=1, gpus=MIXED).take(gpus(1), gpu=True).devices == ("0",)
    assert desk(slots=2, gpus=MIXED).take(gpu=True).devices == ("0",)


def test_without_a_count_one_slot_leaves_a_service_its_gpus(desk: Callable[..., Desk]) -> None:
    ledger = desk(slots=1, gpus=MIXED)
    ledger.take(gpus(1), gpu=True).release_slot()
    assert ledger.take(gpu=True).devices == ("1", "2")


def test_a_mig_instance_is_named_by_its_uuid(desk: Callable[..., Desk]) -> None:
    by_uuid = Gpu(index=3, name="NVIDIA A100 MIG 1g.5gb", uuid="MIG-77", memory_bytes=None)
    by_name = Gpu(index=3, name="MIG 1g.5gb", uuid="abc", memory_bytes=None)
    ledger = desk(slots=1, gpus=[gpu(5), by_uuid, by_name])
    assert ledger.take(gpu=True).devices == ("5", "MIG-77", "abc")


def test_the_least_recently_used_gpu_is_taken(desk: Callable[..., Desk]) -> None:
    ledger = desk(gpus=[gpu(0), gpu(1), gpu(2)])
    first, second = ledger.take(gpus(1), gpu=True), ledger.take(gpus(1), gpu=True)
    second.release()
    first.release()
    order = [ledger.take(gpus(1), gpu=True).devices[0] for _ in range(3)]
    assert order == ["2", "1", "0"]


@pytest.mark.parametrize("shared", [True, False])
def test_an_engine_goes_back_to_where_it_was(desk: Callable[..., Desk], shared: bool) -> None:
    ledger = desk(gpus=[gpu(0), gpu(1), gpu(2)])
    other = ledger.take(gpu=True)
    ledger.take(gpu=True, engine="llm", shared=shared).release()
    other.release()
    assert ledger.take(gpu=True, engine="llm", shared=shared).devices == ("1",)
    assert ledger.take(gpu=True, engine="new", shared=shared).devices == ("2",)


def test_only_the_last_thousand_engines_are_remembered(desk: Callable[..., Desk]) -> None:
    ledger = desk(gpus=[gpu(0), gpu(1)])
    for name in ("first", "second"):
        ledger.take(gpu=True, engine=name).release()  # on GPU 0, then 1
    held = ledger.take(gpus(1), gpu=True)  # keeps 0: all the others land on 1
    for number in range(998):
        ledger.take(gpu=True, engine=f"e{number}").release()
    held.release()
    assert ledger.take(gpu=True, engine="first").devices == ("0",)  # and is the newest now
    ledger.take(gpu=True, engine="e998").release()
    assert "second" not in ledger.ledger._placed
    assert "first" in ledger.ledger._placed
    assert len(ledger.ledger._placed) == 1000


def test_tasks_of_one_engine_share_its_gpus_and_its_largest_memory(
    desk: Callable[..., Desk],
) -> None:
    ledger = desk(gpus=[gpu(0), gpu(1)])
    first = ledger.take(memory(4), gpu=True, engine="llm")
    second = ledger.take(memory(6), gpu=True, engine="llm")
    third = ledger.take(memory(2), gpu=True, engine="llm")
    assert first.devices == second.devices == third.devices == ("0",)
    assert ledger.take(gpu=True, engine="other").devices == ("1",)
    for grant in (second, first):
        assert ledger.ledger.snapshot()["free_memory_bytes"] == 10 * GIB
        grant.release()
    assert ledger.ledger.snapshot()["devices_in_use"] == ["0", "1"]
    third.release()
    assert ledger.ledger.snapshot()["free_memory_bytes"] == 16 * GIB
    assert ledger.ledger.snapshot()["devices_in_use"] == ["1"]


def test_an_engine_grows_only_into_memory_that_is_free(desk: Callable[..., Desk]) -> None:
    ledger = desk()
    ledger.take(memory(8), engine="llm")
    neighbour = ledger.take(memory(4))
    growing = ledger.ask(memory(13), engine="llm")
    assert not growing.done()
    assert ledger.take(memory(12), engine="llm").devices == ()
    neighbour.release()
    ledger.settle()
    assert growing.done()
    assert ledger.ledger.snapshot()["free_memory_bytes"] == 3 * GIB


@pytest.mark.parametrize(
    ("asked", "uses_gpu", "engine", "shared"),
    [
        (gpus(2), True, "llm", True),
        (ResourceRequest(gpu_type="l4"), True, "llm", True),
        (gpus(1), True, "llm", False),
        (gpus(1), True, "other", True),
        (gpus(1), True, "", True),
        (ResourceRequest(), False, "llm", True),
        (gpus(0), True, "llm", True),
    ],
)
def test_an_engine_is_not_shared_by_a_task_that_asks_for_something_else(
    desk: Callable[..., Desk],
    asked: ResourceRequest,
    uses_gpu: bool,
    engine: str,
    shared: bool,
) -> None:
    ledger = desk(gpus=MIXED)
    assert ledger.take(gpu=True, engine="llm").devices == ("0",)
    assert "0" not in ledger.take(asked, gpu=uses_gpu, engine=engine, shared=shared).devices


def test_an_engine_that_is_not_shared_is_joined_by_nobody(desk: Callable[..., Desk]) -> None:
    ledger = desk(gpus=[gpu(0)])
    ledger.take(gpu=True, engine="llm", shared=False)
    assert not ledger.ask(gpu=True, engine="llm").done()


def test_a_task_without_a_count_joins_an_engine_on_several_gpus(
    desk: Callable[..., Desk],
) -> None:
    ledger = desk(gpus=MIXED)
    ledger.take(gpus(2), gpu=True, engine="llm")
    assert ledger.take(gpu=True, engine="llm").devices == ("0", "1")


def test_small_tasks_pass_a_large_one_until_its_patience_ends(desk: Callable[..., Desk]) -> None:
    ledger = desk()
    running = ledger.take(memory(10))
    large = ledger.ask(memory(12))
    ledger.now += 30
    passing = ledger.take(memory(1))
    ledger.now += 0.1
    small = ledger.ask(memory(1))
    joining = ledger.ask()
    passing.release()
    ledger.settle()
    assert not small.done()
    assert not joining.done()
    running.release()
    ledger.settle()
    assert large.done()
    assert small.done()
    assert joining.done()


def test_a_higher_priority_may_still_pass_an_impatient_task(desk: Callable[..., Desk]) -> None:
    ledger = desk()
    ledger.take(memory(10))
    large = ledger.ask(memory(12))
    ledger.now += 31
    assert ledger.ask(memory(1), priority=1).done()
    assert not large.done()


def test_an_impatient_task_is_not_passed_while_a_younger_one_stands_before_it(
    desk: Callable[..., Desk],
) -> None:
    ledger = desk()
    ledger.take(memory(10))
    large = ledger.ask(memory(12))
    ledger.now += 31
    urgent = ledger.ask(memory(7), priority=1)
    assert not ledger.ask(memory(1)).done()
    assert not urgent.done()
    assert not large.done()


def test_a_stream_of_tasks_for_a_loaded_engine_does_not_starve_its_neighbour(
    desk: Callable[..., Desk],
) -> None:
    ledger = desk(gpus=[gpu(0)])
    sharing = ledger.take(gpu=True, engine="llm")
    other = ledger.ask(gpu=True, engine="tts")
    joined = ledger.take(gpu=True, engine="llm")
    ledger.now += 31
    late = ledger.ask(gpu=True, engine="llm")
    assert not late.done()
    sharing.release()
    joined.release()
    ledger.settle()
    assert other.result().devices == ("0",)
    assert not late.done()


def test_cancelling_an_impatient_task_frees_those_behind_it(desk: Callable[..., Desk]) -> None:
    ledger = desk()
    ledger.take(memory(10))
    large = ledger.ask(memory(12))
    ledger.now += 31
    small = ledger.ask(memory(1))
    assert not small.done()
    ledger.cancel(large)
    assert small.done()
    assert large.cancelled()


def test_a_task_that_waits_for_a_service_holds_up_nobody(desk: Callable[..., Desk]) -> None:
    ledger = desk(gpus=[gpu(0), gpu(1)])
    service = ledger.take(attrs.evolve(memory(10), gpu_count=1), gpu=True)
    pair, large = ledger.ask(gpus(2), gpu=True), ledger.ask(memory(12))
    ledger.now += 31
    blocked = [ledger.ask(gpus(1), gpu=True), ledger.ask(memory(1))]
    assert not any(task.done() for task in blocked)
    service.release_slot()
    ledger.settle()
    assert all(task.done() for task in blocked)
    assert not pair.done()
    assert not large.done()
    assert ledger.ask(memory(1)).done()
    service.release()
    assert not ledger.ask(memory(1)).done(), "what they wait for will come now"


def test_a_service_that_ended_no_longer_excuses_the_engine_it_shared(
    desk: Callable[..., Desk],
) -> None:
    ledger = desk(gpus=[gpu(0)])
    service = ledger.take(gpu=True, engine="llm")
    ledger.take(gpu=True, engine="llm")
    service.release_slot()
    other = ledger.ask(gpu=True)
    ledger.now += 31
    assert ledger.ask().done()
    service.release()
    assert not ledger.ask().done()
    assert not other.done()


def test_a_task_cancelled_while_it_waits_leaves_the_queue(desk: Callable[..., Desk]) -> None:
    one = desk(slots=1)
    first = one.take()
    waiting, next_one = one.ask(), one.ask()
    one.cancel(waiting)
    assert one.ledger.waiting == 1
    first.release()
    one.settle()
    assert next_one.done()


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_task_cancelled_in_the_moment_of_its_grant_leaks_nothing(
    desk: Callable[..., Desk], cancelled_first: bool
) -> None:
    one = desk(slots=1, gpus=[gpu(0)])
    empty = one.ledger.snapshot()
    first = one.take(gpus(1), gpu=True)
    waiting = one.ask(gpus(1), gpu=True)
    last = one.ask(gpus(1), gpu=True)
    steps: list[Callable[[], object]] = [waiting.cancel, first.release]
    for step in steps if cancelled_first else reversed(steps):
        step()
    one.settle()
    assert waiting.cancelled()
    last.result().release()
    assert one.ledger.snapshot() == empty


class Counting(ResourceLedger):
    """Counts how often it looks for room."""

    looks = 0

    def _find_room(self, *arguments: Any) -> Any:
        self.looks += 1
        return super()._find_room(*arguments)


@pytest.mark.parametrize(
    ("slots", "requests"),
    [(2, [gpus(1)] * 200), (1, [memory(1 + number % 16) for number in range(200)])],
    ids=["gpus are short", "slots are short"],
)
def test_a_long_queue_is_not_searched_again_for_every_release(
    desk: Callable[..., Desk], slots: int, requests: list[ResourceRequest]
) -> None:
    waiters = desk()
    waiters.ledger = ledger = Counting(slots, 8, 16 * GIB, [gpu(0)])
    running = waiters.take(gpus(1), gpu=True)
    queue = [waiters.ask(each, gpu=True) for each in requests]
    ledger.looks = 0
    running.release()
    waiters.settle()
    assert [task.done() for task in queue] == [True] + [False] * 199
    assert ledger.looks <= 3


def test_requests_that_are_granted_at_once_never_yield() -> None:
    ledger = ResourceLedger(1, 1, None, [])
    asking = ledger.acquire(ResourceRequest(), uses_gpu=False)
    with pytest.raises(StopIteration, match="Grant"):
        asking.send(None)


@attrs.define(eq=False)
class Asked:
    """A task as the model sees it."""

    request: ResourceRequest
    uses_gpu: bool
    priority: int
    engine: str
    shared: bool
    since: float
    number: int
    task: asyncio.Task[Grant]
    grant: Grant | None = None
    has_slot: bool = True

    @property
    def order(self) -> tuple[int, int]:
        return -self.priority, self.number

    @property
    def kind(self) -> tuple[object, ...]:
        return self.request, self.uses_gpu, self.engine, self.shared


FLEET = [gpu(0), gpu(1, "NVIDIA L4", 23 * GIB), gpu(2), gpu(3, "NVIDIA L4", 23 * GIB)]
MATCHING = {"": {"0", "1", "2", "3"}, "l4": {"1", "3"}, "a100": {"0", "2"}}
REQUESTS = st.builds(
    ResourceRequest,
    memory_bytes=st.sampled_from([None, 2 * GIB, 5 * GIB, 16 * GIB]),
    gpu_count=st.sampled_from([None, None, 0, 1, 2, 4]),
    gpu_type=st.sampled_from(["", "", "l4", "a100"]),
)
SOME = st.integers(0, 100)


class AnySchedule(RuleBasedStateMachine):
    """Requests, releases, services and cancels in any order, against the ledger's promises."""

    slots = 3

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.numbers = count()

    @initialize(slots=st.integers(1, 4))
    def start(self, slots: int) -> None:
        self.desk = Desk(slots=slots, gpus=FLEET, patience_s=10.0)
        self.slots = slots
        self.empty = self.desk.ledger.snapshot()

    @property
    def waiting(self) -> list[Asked]:
        return sorted((a for a in self.asked if a.grant is None), key=lambda a: a.order)

    @property
    def granted(self) -> list[Asked]:
        return [a for a in self.asked if a.grant is not None]

    def settle(self) -> None:
        """Let the loop run, and check the order of what it granted."""
        self.desk.settle()
        self.asked = [a for a in self.asked if not a.task.cancelled()]
        new = [a for a in self.waiting if a.task.done()]
        for each in new:
            each.grant = each.task.result()
        for each in new:
            for before in self.waiting:
                if before.order < each.order:
                    assert before.kind != each.kind, "equals go in order"
                    assert not self.must_not_be_passed(before)

    def must_not_be_passed(self, asked: Asked) -> bool:
        services = any(not a.has_slot for a in self.granted)
        return self.desk.now - asked.since > 10.0 and not services

    @rule(
        request=REQUESTS,
        uses_gpu=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 1]),
        engine=st.sampled_from(["", "", "llm", "tts"]),
        shared=st.sampled_from([True, True, False]),
    )
    def ask(self, request: ResourceRequest, uses_gpu: bool, **how: Any) -> None:
        try:
            self.desk.ledger.check(request, uses_gpu=uses_gpu)
        except ResourceError:
            assert request.gpu_count
            assert not uses_gpu or request.gpu_count > len(MATCHING[request.gpu_type])
            return
        coroutine = self.desk.ledger.acquire(request, uses_gpu=uses_gpu, **how)
        task = self.desk.loop.create_task(coroutine)
        number = next(self.numbers)
        self.asked.append(
            Asked(request, uses_gpu, since=self.desk.now, number=number, task=task, **how)
        )
        self.settle()

    @rule(seconds=st.sampled_from([1, 5, 11]))
    def wait(self, seconds: int) -> None:
        self.desk.now += seconds

    @precondition(lambda self: self.granted)
    @rule(which=SOME, twice=st.booleans())
    def release(self, which: int, twice: bool) -> None:
        self.let_go(which, twice)
        self.settle()

    @precondition(lambda self: self.granted)
    @rule(which=SOME, twice=st.booleans())
    def become_a_service(self, which: int, twice: bool) -> None:
        asked = self.granted[which % len(self.granted)]
        assert asked.grant is not None
        for _ in range(1 + twice):
            asked.grant.release_slot()
        asked.has_slot = False
        self.settle()

    @precondition(lambda self: self.waiting)
    @rule(which=SOME)
    def cancel(self, which: int) -> None:
        self.waiting[which % len(self.waiting)].task.cancel()
        self.settle()

    @precondition(lambda self: self.waiting and self.granted)
    @rule(released=SOME, cancelled=st.sets(st.integers(0, 3), min_size=1), first=st.booleans())
    def cancel_in_the_moment_of_a_grant(
        self, released: int, cancelled: set[int], first: bool
    ) -> None:
        waiting = self.waiting
        victims = [waiting[index].task for index in cancelled if index < len(waiting)]
        if not first:
            self.let_go(released)
        for task in victims:
            task.cancel()
        if first:
            self.let_go(released)
        self.settle()
        assert all(task.cancelled() for task in victims)

    def let_go(self, which: int, twice: bool = False) -> None:
        asked = self.granted[which % len(self.granted)]
        assert asked.grant is not None
        self.asked.remove(asked)
        for _ in range(1 + twice):
            asked.grant.release()

    @invariant()
    def slots_and_waiters_are_counted(self) -> None:
        if not hasattr(self, "desk"):
            return
        shown = self.desk.ledger.snapshot()
        used = sum(a.has_slot for a in self.granted)
        assert used <= self.slots
        assert shown["free_slots"] == self.slots - used
        assert self.desk.ledger.full == (used == self.slots)
        assert shown["waiting"] == self.desk.ledger.waiting == len(self.waiting)

    @invariant()
    def memory_and_gpus_are_held_once(self) -> None:
        groups: dict[object, list[Asked]] = {}
        for asked in self.granted:
            assert asked.grant is not None
            joint = bool(asked.engine) and asked.shared
            key = (asked.engine, asked.grant.devices) if joint else asked.number
            groups.setdefault(key, []).append(asked)
        held = [group[0].grant.devices for group in groups.values() if group[0].grant]
        devices = [device for each in held for device in each]
        assert len(devices) == len(set(devices)), "no GPU serves two groups"
        needed = sum(max(a.request.memory_bytes or 0 for a in g) for g in groups.values())
        if groups:
            shown = self.desk.ledger.snapshot()
            assert shown["devices_in_use"] == sorted(devices)
            assert 0 <= shown["free_memory_bytes"] <= 16 * GIB - needed

    @invariant()
    def every_grant_is_what_was_asked_for(self) -> None:
        for asked in self.granted:
            assert asked.grant is not None
            wanted, devices = asked.request.gpu_count, asked.grant.devices
            assert set(devices) <= MATCHING[asked.request.gpu_type]
            if not asked.uses_gpu or wanted is not None:
                assert len(devices) == (wanted or 0 if asked.uses_gpu else 0)
            else:
                assert devices

    @invariant()
    def nothing_waits_for_what_is_free(self) -> None:
        for position, asked in enumerate(self.waiting):
            if self.fits(asked):
                assert any(
                    self.desk.now - before.since > 10.0 for before in self.waiting[:position]
                )

    def fits(self, asked: Asked) -> bool:
        """Whether it would be served by what is free, not counting engines that it could join."""
        shown = self.desk.ledger.snapshot()
        free = MATCHING[asked.request.gpu_type] - set(shown["devices_in_use"])
        counted = 1 if asked.request.gpu_count is None else asked.request.gpu_count
        return (
            shown["free_slots"] > 0
            and (asked.request.memory_bytes or 0) <= shown["free_memory_bytes"]
            and len(free) >= (counted if asked.uses_gpu else 0)
        )

    def teardown(self) -> None:
        if not hasattr(self, "desk"):
            return
        while self.granted:
            self.let_go(0)
            self.settle()
        assert not self.waiting, "everything was released: all must have been served"
        assert self.desk.ledger.snapshot() == self.empty
        self.desk.close()


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
