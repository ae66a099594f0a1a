from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from flowmesh_core.telemetry.probes import (
    GpuMemory,
    GpuReader,
    cpu_model,
    probe_hardware,
    usable_cores,
    usable_memory_bytes,
)

GIB = 1 << 30
UUIDS = ("GPU-aaaa1111", "GPU-aaab2222", "GPU-cccc3333")
MIG = "MIG-dddd4444"
without_driver = pytest.mark.skipif(
    Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver"
)


def process(pid: int, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


class FakeNvml(ModuleType):
    """Three GPUs and one MIG instance of the second; names are bytes, as in older bindings."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *, broken: tuple[str, ...] = (), lost: int | None = None) -> None:
        super().__init__("pynvml")
        self.broken = broken
        self.lost = lost
        self.inits = 0
        self.nvmlSystemGetDriverVersion = self.answer("driver", lambda: b"570.86.15")
        self.nvmlSystemGetCudaDriverVersion_v2 = self.answer("cuda", lambda: 12080)
        self.nvmlDeviceGetCount = self.answer("count", lambda: len(UUIDS))
        self.nvmlDeviceGetIndex = self.answer("index", int)
        self.nvmlDeviceGetName = self.answer("name", lambda handle: b"NVIDIA H200")
        self.nvmlDeviceGetUUID = self.answer("uuid", self.uuid)
        self.nvmlDeviceGetMemoryInfo = self.answer(
            "memory",
            lambda handle: SimpleNamespace(total=8 * GIB if handle == MIG else 80 * GIB, free=GIB),
        )
        self.nvmlDeviceGetComputeRunningProcesses = self.answer(
            "processes",
            lambda handle: [process(7, GIB), process(8 + handle, 2 * GIB)],
        )
        self.nvmlDeviceGetGraphicsRunningProcesses = self.answer(
            "drawing", lambda handle: [process(8 + handle, 2 * GIB), process(99, None)]
        )
        self.nvmlDeviceGetPowerUsage = self.answer("power", lambda handle: 70_500 + handle)

    def answer(self, name: str, call: Any) -> Any:
        def function(*arguments: Any) -> Any:
            if name in self.broken:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return call(*arguments)

        return function

    def uuid(self, handle: int | str) -> str:
        return handle if isinstance(handle, str) else UUIDS[handle]

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        self.inits += 1
        self.answer("init", lambda: None)()

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML's name
        if index == self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        if uuid != MIG:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:  # noqa: N802 - NVML's name
        assert handle == MIG
        return 1


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run_python(code: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True)


PRINT_HARDWARE = (
    "import json; from flowmesh_core.telemetry.probes import probe_hardware;"
    "print(json.dumps(probe_hardware()))"
)


def test_this_machine_is_described_in_the_shape_of_the_contract() -> None:
    hardware: Any = json.loads(json.dumps(probe_hardware()))
    assert list(hardware) == ["cpu", "memory", "gpu", "network"]
    assert list(hardware["network"]) == ["ip"]
    assert set(hardware["gpu"]) == {"driver_version", "cuda_version", "gpus"}
    assert 1 <= hardware["cpu"]["logical_cores"] <= len(os.sched_getaffinity(0))
    assert hardware["cpu"]["model"]
    assert GIB // 16 < hardware["memory"]["total_bytes"] <= psutil.virtual_memory().total


def test_bandwidth_is_what_the_operator_states() -> None:
    network: Any = probe_hardware(network_bandwidth_bytes_per_s=1.25e9)["network"]
    assert network["bandwidth_bytes_per_sec"] == 1.25e9


@without_driver
def test_gpus_are_absent_without_a_driver() -> None:
    nothing: dict[str, Any] = {"driver_version": None, "cuda_version": None, "gpus": []}
    assert probe_hardware(visible_devices="0")["gpu"] == nothing
    assert GpuReader().power_w(0) is None


def test_a_driver_that_does_not_start_is_absent_and_asked_once() -> None:
    nvml = FakeNvml(broken=("init",))
    reader = GpuReader(nvml=nvml)
    assert reader.list_gpus() == []
    assert reader.power_w(0) is None
    assert nvml.inits == 1


def test_gpus_carry_memory_in_both_spellings_and_text_for_bytes() -> None:
    wire: Any = GpuReader(nvml=FakeNvml()).to_wire()
    assert (wire["driver_version"], wire["cuda_version"]) == ("570.86.15", "12.8")
    assert wire["gpus"][1] == {
        "index": 1,
        "name": "NVIDIA H200",
        "uuid": UUIDS[1],
        "memory_total_bytes": 80 * GIB,
        "memory": {"total_bytes": 80 * GIB},
    }


def test_unreadable_parts_of_a_gpu_leave_the_rest() -> None:
    nvml = FakeNvml(broken=("driver", "cuda", "memory", "name", "power"))
    wire: Any = GpuReader(nvml=nvml).to_wire()
    assert (wire["driver_version"], wire["cuda_version"]) == (None, None)
    assert wire["gpus"][0] == {"index": 0, "name": "", "uuid": UUIDS[0]}
    assert GpuReader(nvml=nvml).power_w(0) is None


def test_power_is_in_watts() -> None:
    assert GpuReader(nvml=FakeNvml()).power_w(2) == 70.502


def test_memory_is_that_of_the_device_that_is_asked() -> None:
    reader = GpuReader(nvml=FakeNvml(lost=1))
    assert reader.memory_bytes("0") == GpuMemory(total=80 * GIB, free=GIB)
    assert reader.memory_bytes(MIG) == GpuMemory(total=8 * GIB, free=GIB)
    assert reader.memory_bytes("1") is None
    assert reader.memory_bytes("MIG-unknown") is None
    assert GpuReader(nvml=FakeNvml(broken=("memory",))).memory_bytes("0") is None


def test_each_process_has_its_memory_on_each_gpu_once() -> None:
    assert GpuReader(nvml=FakeNvml(lost=1)).process_memory() == {
        (0, 7): GIB,
        (0, 8): 2 * GIB,
        (0, 99): 0,
        (2, 7): GIB,
        (2, 10): 2 * GIB,
        (2, 99): 0,
    }


def test_one_unreadable_list_of_processes_leaves_the_other() -> None:
    reader = GpuReader(nvml=FakeNvml(broken=("drawing",)))
    assert set(reader.process_memory()) == {(0, 7), (0, 8), (1, 7), (1, 9), (2, 7), (2, 10)}
    assert GpuReader(nvml=FakeNvml(broken=("drawing", "processes"))).process_memory() == {}
    assert GpuReader(nvml=FakeNvml(broken=("init",))).process_memory() == {}


@pytest.mark.parametrize(
    ("text", "indexes"),
    [
        (None, [0, 1, 2]),
        ("0,1,2", [0, 1, 2]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,2", [0]),
        ("1,7,2", [1]),
        ("none", []),
        ("1gpu,2", [1, 2]),
        ("0,0", []),
        ("0,1,GPU-aaaa1111", []),
        ("0,,1", [0]),
        ("9" * 5000, []),
        ("GPU-cccc3333,GPU-aaaa1111", [2, 0]),
        ("GPU-c,GPU-aaab", [2, 1]),
        ("GPU-aaa", []),
        ("2,GPU-ffff,0", [2]),
    ],
)
def test_visible_devices_are_chosen_as_cuda_chooses(text: str | None, indexes: list[int]) -> None:
    reader = GpuReader(visible_devices=text, nvml=FakeNvml())
    assert [gpu.index for gpu in reader.list_gpus()] == indexes


def test_mig_instances_pass_when_nvml_knows_them() -> None:
    reader = GpuReader(visible_devices=f"{MIG},MIG-unknown,0", nvml=FakeNvml())
    (instance,) = reader.list_gpus()
    assert (instance.index, instance.uuid, instance.memory_bytes) == (1, MIG, 8 * GIB)


def test_a_lost_gpu_leaves_the_numbers_of_the_others() -> None:
    nvml = FakeNvml(lost=1)
    assert [gpu.index for gpu in GpuReader(nvml=nvml).list_gpus()] == [0, 2]
    chosen = GpuReader(visible_devices="2,1,0", nvml=nvml).list_gpus()
    assert [gpu.index for gpu in chosen] == [2]


def test_affinity_limits_the_cores() -> None:
    one = str(min(os.sched_getaffinity(0)))
    answer = run_python(PRINT_HARDWARE, "taskset", "-c", one)
    assert json.loads(answer.stdout)["cpu"]["logical_cores"] == 1, answer.stderr


def test_no_route_means_no_address() -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    answer = run_python(PRINT_HARDWARE, "unshare", "-rn")
    assert json.loads(answer.stdout)["network"] == {"ip": None}, answer.stderr


def test_the_address_is_one_of_this_machine() -> None:
    network: Any = probe_hardware()["network"]
    own = {entry.address for card in psutil.net_if_addrs().values() for entry in card}
    assert network["ip"] is None or network["ip"] in own - {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/pod/worker\n",
            "sys/fs/cgroup/pod/memory.max": "268435456\n",
            "sys/fs/cgroup/pod/worker/memory.max": "max\n",
            "sys/fs/cgroup/pod/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/pod/worker/cpu.max": "max 100000\n",
        },
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "268435456\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        {
            "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/docker/1f/memory.limit_in_bytes": "268435456\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/docker/1f/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/docker/1f/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        {
            "proc/self/cgroup": "5:memory:/outer/path\n4:cpu:/outer/path\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["v2-parent-limits", "v2-half-a-core", "v1", "v1-in-a-container"],
)
def test_control_groups_limit_cores_and_memory(tmp_path: Path, files: dict[str, str]) -> None:
    root = write_tree(tmp_path, files)
    assert usable_memory_bytes(root) == 256 << 20
    assert usable_cores(root) == 1


@pytest.mark.parametrize(
    "files",
    [
        {},
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
            "sys/fs/cgroup/a/cpu.max": "max 100000\n",
        },
        {
            "proc/self/cgroup": "0::/../b\n",
            "sys/fs/cgroup/memory.max": "no number",
            "sys/fs/cgroup/cpu.max": "100000 0\n",
        },
    ],
    ids=["no-groups", "unlimited", "unreadable"],
)
def test_without_limits_the_machine_counts(tmp_path: Path, files: dict[str, str]) -> None:
    root = write_tree(tmp_path, files)
    assert usable_memory_bytes(root) == psutil.virtual_memory().total
    assert usable_cores(root) == len(os.sched_getaffinity(0))


def test_the_processor_is_named_or_at_least_its_architecture(tmp_path: Path) -> None:
    assert cpu_model(tmp_path) == os.uname().machine
    write_tree(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n"})
    assert cpu_model(tmp_path) == "Some CPU @ 2 GHz"


def test_importing_telemetry_does_not_import_the_gpu_library() -> None:
    code = (
        "import sys, flowmesh_core.telemetry.heartbeat as h, flowmesh_core.telemetry.power;"
        "sys.exit('pynvml' in sys.modules)"
    )
    answer = run_python(code)
    assert answer.returncode == 0, answer.stderr
