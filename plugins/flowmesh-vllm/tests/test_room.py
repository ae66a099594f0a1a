from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pynvml
import pytest
from flowmesh_vllm import room
from flowmesh_vllm.arguments import Room
from flowmesh_vllm.room import find_room

from flowmesh_core import GpuReader, available_memory_bytes

GIB = 1 << 30


class FakeNvml(ModuleType):
    """GPUs by number or UUID, each with its total and free memory; others are lost."""

    NVMLError = pynvml.NVMLError

    def __init__(self, **memory: tuple[int, int]) -> None:
        super().__init__("pynvml")
        self.memory = memory

    def nvmlInit(self) -> None: ...  # noqa: N802 - NVML's name

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802 - NVML's name
        return self.nvmlDeviceGetHandleByUUID(f"gpu{index}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        if uuid.replace("-", "_") not in self.memory:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid.replace("-", "_")

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802 - NVML's name
        total, free = self.memory[handle]
        return SimpleNamespace(total=total, free=free)


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory_bytes", lambda: 5 * GIB)


def reader(**memory: tuple[int, int]) -> GpuReader:
    return GpuReader(nvml=FakeNvml(**memory))


def test_on_the_cpu_only_the_machine_is_measured() -> None:
    gpus = reader(gpu0=(80 * GIB, GIB))
    assert find_room((), gpus) == Room(gpus=0, gpu_free=None, free_bytes=5 * GIB)


def test_the_fullest_of_the_tasks_gpus_decides() -> None:
    gpus = reader(
        gpu0=(80 * GIB, GIB),  # another task's
        gpu1=(80 * GIB, 60 * GIB),
        gpu2=(80 * GIB, 20 * GIB),
        gpu3=(16 * GIB, 8 * GIB),
    )
    assert find_room(("1", "2", "3"), gpus) == Room(gpus=3, gpu_free=0.25, free_bytes=5 * GIB)
    assert find_room(("3",), gpus).gpu_free == 0.5


def test_a_small_gpu_is_fuller_than_a_large_one_with_less_left() -> None:
    gpus = reader(gpu0=(8 * GIB, 4 * GIB), gpu1=(80 * GIB, 20 * GIB))
    assert find_room(("0", "1"), gpus).gpu_free == 0.25


def test_a_part_of_a_gpu_goes_by_its_name() -> None:
    gpus = reader(gpu0=(80 * GIB, 80 * GIB), MIG_dddd4444=(8 * GIB, 2 * GIB))
    assert find_room(("MIG-dddd4444",), gpus).gpu_free == 0.25


def test_a_gpu_that_does_not_answer_is_left_out_of_the_measure_and_counts_as_a_gpu() -> None:
    gpus = reader(gpu0=(80 * GIB, 40 * GIB))
    assert find_room(("0", "7"), gpus) == Room(gpus=2, gpu_free=0.5, free_bytes=5 * GIB)
    assert find_room(("7",), gpus) == Room(gpus=1, gpu_free=None, free_bytes=5 * GIB)


def test_a_full_gpu_is_known_to_be_full() -> None:
    assert find_room(("0",), reader(gpu0=(80 * GIB, 0))).gpu_free == 0.0


def test_without_a_double_the_driver_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory_bytes", available_memory_bytes)
    monkeypatch.setattr(room, "GpuReader", lambda: reader(gpu0=(GIB, GIB // 4)))
    found = find_room(("0",))
    assert found.gpu_free == 0.25
    assert found.free_bytes is None or found.free_bytes > 0
