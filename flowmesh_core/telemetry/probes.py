"""What the machine has, in the JSON shape that REGISTER carries.

Nothing here raises: a reading that the machine does not offer is null or left out.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import attrs
import psutil

__all__ = [
    "Gpu",
    "GpuMemory",
    "GpuReader",
    "control_groups",
    "probe_hardware",
    "read_number",
    "read_text",
]

_ROOT = Path("/")
# Reserved for documentation (RFC 5737, RFC 3849), on no local network: the default route answers.
_FAR_AWAY = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))


def probe_hardware(
    *, network_bandwidth_bytes_per_s: float | None = None, visible_devices: str | None = None
) -> dict[str, object]:
    """Describe this machine as far as this process may use it.

    Args:
        network_bandwidth_bytes_per_s: What the operator states; nothing is measured.
        visible_devices: Text of ``CUDA_VISIBLE_DEVICES``; None means that it is not set.

    Returns:
        ``cpu``, ``memory``, ``gpu`` and ``network`` with the keys of the wire contract.
    """
    network: dict[str, object] = {"ip": _local_ip()}
    if network_bandwidth_bytes_per_s is not None:
        network["bandwidth_bytes_per_sec"] = network_bandwidth_bytes_per_s
    return {
        "cpu": {"logical_cores": usable_cores(), "model": cpu_model()},
        "memory": {"total_bytes": usable_memory_bytes()},
        "gpu": GpuReader(visible_devices=visible_devices).to_wire(),
        "network": network,
    }


@attrs.frozen(kw_only=True)
class Gpu:
    """One GPU, or one MIG instance, that this process may use.

    Attributes:
        index: Number of the physical GPU in PCI bus order; MIG instances of one GPU share it.
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int | None

    def to_wire(self) -> dict[str, object]:
        """Spell the memory both ways: the earlier orchestrator needs one or the other."""
        gpu: dict[str, object] = {"index": self.index, "name": self.name, "uuid": self.uuid}
        if self.memory_bytes is not None:
            gpu["memory_total_bytes"] = self.memory_bytes
            gpu["memory"] = {"total_bytes": self.memory_bytes}
        return gpu


@attrs.frozen(kw_only=True)
class GpuMemory:
    """Bytes of one GPU or MIG instance: all there are, and those that nobody holds now."""

    total: int
    free: int


class GpuReader:
    """Reads NVIDIA GPUs through NVML, which is opened by the first reading and stays open.

    Without a driver every reading is absent. A driver that hangs blocks the thread that reads.

    Args:
        visible_devices: Text of ``CUDA_VISIBLE_DEVICES``; None means that all are visible.
        nvml: Stands in for the module ``pynvml``.
    """

    def __init__(
        self, *, visible_devices: str | None = None, nvml: ModuleType | None = None
    ) -> None:
        self._visible_devices = visible_devices
        self._given = nvml
        self._nvml: ModuleType | None = None
        self._opened = False

    def to_wire(self) -> dict[str, object]:
        """Return driver, CUDA version and GPUs with the keys of the wire contract."""
        version = self._read("nvmlSystemGetCudaDriverVersion_v2")
        return {
            "driver_version": _text(self._read("nvmlSystemGetDriverVersion")) or None,
            "cuda_version": _cuda_version(version) if isinstance(version, int) else None,
            "gpus": [gpu.to_wire() for gpu in self.list_gpus()],
        }

    def list_gpus(self) -> list[Gpu]:
        """Return the visible GPUs in the order in which CUDA numbers them."""
        count = _integer(self._read("nvmlDeviceGetCount")) or 0
        handles = [self._read("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        # A GPU that was lost keeps its number, as with the driver.
        gpus = [
            None if handle is None else self._describe(handle, index)
            for index, handle in enumerate(handles)
        ]
        if self._visible_devices is None:
            return [gpu for gpu in gpus if gpu is not None]
        return self._visible(gpus, self._visible_devices)

    def power_w(self, index: int) -> float | None:
        """Return what the physical GPU draws now, in watts."""
        handle = self._read("nvmlDeviceGetHandleByIndex", index)
        milliwatts = self._read("nvmlDeviceGetPowerUsage", handle)
        return milliwatts / 1000 if isinstance(milliwatts, int) else None

    def memory_bytes(self, device: str) -> GpuMemory | None:
        """Return the memory of a device that ``CUDA_VISIBLE_DEVICES`` would name in full.

        Args:
            device: Number of the physical GPU, or UUID of a GPU or MIG instance.
        """
        if device.isdecimal():
            handle = self._read("nvmlDeviceGetHandleByIndex", int(device))
        else:
            handle = self._read("nvmlDeviceGetHandleByUUID", device)
        answer = self._read("nvmlDeviceGetMemoryInfo", handle)
        total, free = (_integer(getattr(answer, name, None)) for name in ("total", "free"))
        if total is None or free is None:
            return None
        return GpuMemory(total=total, free=free)

    def process_memory(self) -> dict[tuple[int, int], int]:
        """Return the bytes that each process holds on each physical GPU, by index and process id.

        Nothing is there for a process that the driver does not show, as in a container that
        has process ids of its own.
        """
        used: dict[tuple[int, int], int] = {}
        for index in range(_integer(self._read("nvmlDeviceGetCount")) or 0):
            handle = self._read("nvmlDeviceGetHandleByIndex", index)
            for kind in ("Compute", "Graphics"):
                answer = self._read(f"nvmlDeviceGet{kind}RunningProcesses", handle)
                for process in answer if isinstance(answer, list) else ():
                    key = (index, process.pid)
                    # Who computes and draws is in both lists with the same figure.
                    used[key] = max(used.get(key, 0), process.usedGpuMemory or 0)
        return used

    def _visible(self, gpus: list[Gpu | None], text: str) -> list[Gpu]:
        """Select as CUDA does: the first unknown entry ends the list, a repeated one empties it.

        Source: CUDA C++ Programming Guide, ``CUDA_VISIBLE_DEVICES``; repeats as PyTorch reads them.
        """
        chosen: list[Gpu] = []
        for entry in text.split(","):
            gpu = self._find(gpus, entry.strip())
            if gpu is None:
                break
            if gpu in chosen:
                return []
            chosen.append(gpu)
        return chosen

    def _find(self, gpus: list[Gpu | None], entry: str) -> Gpu | None:
        if entry.startswith("MIG-"):
            return self._find_instance(entry)
        if entry.startswith("GPU-"):
            matches = [gpu for gpu in gpus if gpu is not None and gpu.uuid.startswith(entry)]
            return matches[0] if len(matches) == 1 else None
        number = re.match("[0-9]{1,9}", entry)
        if number is None or int(number[0]) >= len(gpus):
            return None
        return gpus[int(number[0])]

    def _find_instance(self, uuid: str) -> Gpu | None:
        handle = self._read("nvmlDeviceGetHandleByUUID", uuid)
        physical = self._read("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        index = _integer(self._read("nvmlDeviceGetIndex", physical))
        return None if index is None else self._describe(handle, index)

    def _describe(self, handle: object, index: int) -> Gpu:
        memory = self._read("nvmlDeviceGetMemoryInfo", handle)
        return Gpu(
            index=index,
            name=_text(self._read("nvmlDeviceGetName", handle)),
            uuid=_text(self._read("nvmlDeviceGetUUID", handle)),
            memory_bytes=_integer(getattr(memory, "total", None)),
        )

    def _read(self, function: str, *arguments: object) -> object:
        """Return what NVML answers, or None where it cannot or an argument is itself missing."""
        if not self._opened:
            self._nvml = _open_nvml(self._given)
            self._opened = True
        if self._nvml is None or None in arguments:
            return None
        try:
            answer: object = getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None
        return answer


def _open_nvml(given: ModuleType | None) -> ModuleType | None:
    import pynvml  # noqa: PLC0415 - large, and of no use without a driver

    nvml: ModuleType = given or pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _text(answer: object) -> str:
    """Accept both kinds of string: which one NVML's binding returns depends on its version."""
    if isinstance(answer, bytes):
        return answer.decode(errors="replace")
    return answer if isinstance(answer, str) else ""


def _integer(answer: object) -> int | None:
    return answer if isinstance(answer, int) else None


def _cuda_version(number: int) -> str:
    """Spell NVML's ``1000 * major + 10 * minor``."""
    return f"{number // 1000}.{number % 1000 // 10}"


def usable_cores(root: Path = _ROOT) -> int:
    """Return the cores that affinity and control groups leave to this process, at least one."""
    quotas = [
        quota for group in control_groups(root, "cpu") if (quota := _cpu_quota(group)) is not None
    ]
    return max(1, min([_affinity(), *map(int, quotas)]))


def usable_memory_bytes(root: Path = _ROOT) -> int | None:
    """Return the machine's memory or the tightest limit of a control group, whichever is less."""
    sizes = [_machine_memory_bytes()]
    for group in control_groups(root, "memory"):
        sizes += [
            read_number(group / "memory.max"),
            read_number(group / "memory.limit_in_bytes"),
        ]
    return min((size for size in sizes if size is not None), default=None)


def cpu_model(root: Path = _ROOT) -> str:
    """Return the processor's name as the kernel has it, else its architecture."""
    named = re.search(r"^model name\s*:\s*(.+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine_memory_bytes() -> int | None:
    try:
        return psutil.virtual_memory().total
    except OSError:
        return None


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folder of every group that holds this process, in both hierarchies.

    A container may see its group's outer path but only its own subtree: folders that are not
    there read as no limit.
    Source: cgroups(7), ``/proc/pid/cgroup``.
    """
    mounts = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts / controller if controllers else mounts
        group = PurePosixPath("/", path)
        yield from (mount / folder.relative_to("/") for folder in (group, *group.parents))


def _cpu_quota(group: Path) -> float | None:
    """Return the cores that one group may use: ``cpu.max`` in version 2, two files in version 1."""
    quota, _, period = read_text(group / "cpu.max").strip().partition(" ")
    if not quota:
        quota = read_text(group / "cpu.cfs_quota_us").strip()  # -1 where there is none
        period = read_text(group / "cpu.cfs_period_us").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def read_number(path: Path) -> int | None:
    """Return the number that is all of the file's text, None for anything else."""
    text = read_text(path).strip()
    return int(text) if text.isdecimal() else None


def read_text(path: Path) -> str:
    """Return the file's text, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _local_ip() -> str | None:
    """Return the address from which the default route leaves, preferably of IPv4."""
    return next(filter(None, (_source_address(*target) for target in _FAR_AWAY)), None)


def _source_address(family: socket.AddressFamily, address: str) -> str | None:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # of UDP this chooses a route and sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None
