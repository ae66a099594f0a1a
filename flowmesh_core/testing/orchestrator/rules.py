"""Rules of the earlier orchestrator, pure: who fits, what merges, what a reference means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["NotReadyError", "deep_merge", "fits", "merge_key", "render", "strength", "walk"]

REFERENCE = re.compile(r"\$\{([^}]+)\}")
SIZE = re.compile(r"^(\d+) *([KMGT]?)I?B?$")
VRAM_PATHS = (
    "memory_total_bytes",
    "memory.total_bytes",
    "memory_bytes",
    "vram_bytes",
    "memory.total",
    "vram",
)  # the first truthy one counts
MERGEABLE = {"inference", "rag"}


class NotReadyError(Exception):
    """A reference points at a stage that is not done, or at a result that is not there yet."""


def merge_key(spec: Mapping[str, Any]) -> str | None:
    """Key of the tasks that may share one run, or None; the spec is the unrendered one."""
    if str(spec.get("taskType", "")).lower() not in MERGEABLE:
        return None
    rest = {key: value for key, value in spec.items() if key != "data"}
    if isinstance(rest.get("inference"), dict):
        hidden = ("system_prompt", "systemPrompt")
        rest["inference"] = {k: v for k, v in rest["inference"].items() if k not in hidden}
    return json.dumps(rest, sort_keys=True)


def fits(spec: Mapping[str, Any], hardware: Mapping[str, Any]) -> bool:
    """Whether a worker's hardware meets the request; what cannot be parsed is not asked for."""
    wanted = _mapping(_mapping(spec.get("resources")).get("hardware"))
    cores = _whole(wanted.get("cpu"))
    memory = parse_size(wanted.get("memory"))
    return (
        (cores is None or _cores(hardware) >= cores)
        and (memory is None or _memory(hardware) >= memory)
        and _gpus_fit(_mapping(wanted.get("gpu")), _gpus(hardware))
    )


def strength(hardware: Mapping[str, Any]) -> tuple[bool, int, int, int]:
    """Sort key of a worker: has a GPU, total VRAM, RAM, cores."""
    gpus = _gpus(hardware)
    return bool(gpus), sum(map(_vram, gpus)), _memory(hardware), _cores(hardware)


def parse_size(value: object) -> int | None:
    """Bytes of ``16Gi`` and the like, all powers of 1024; decimals and other text are None."""
    match = SIZE.match(str(value).strip().upper())
    return int(match[1]) * 1024 ** " KMGT".index(match[2] or " ") if match else None


def render(value: Any, lookup: Callable[[str], Any]) -> Any:
    """Replace every reference in every string; one that is the whole string keeps its type."""
    if isinstance(value, dict):
        return {key: render(item, lookup) for key, item in value.items()}
    if isinstance(value, list):
        return [render(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return lookup(whole[1])
    return REFERENCE.sub(lambda found: str(lookup(found[1])), value)


def walk(document: Any, path: str) -> Any:
    """Value at a dotted path, list indexes being dotted integers; None when there is none."""
    for key in path.split("."):
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and key.isdigit() and int(key) < len(document):
            document = document[int(key)]
        else:
            return None
    return document


def deep_merge(base: Any, over: Any) -> Any:
    """Mappings merge, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    shared = {key: deep_merge(base[key], over[key]) for key in base.keys() & over.keys()}
    return {**base, **over, **shared}


def _gpus_fit(wanted: Mapping[str, Any], gpus: list[Mapping[str, Any]]) -> bool:
    count = _whole(wanted.get("count")) or 0
    kind = str(wanted.get("type") or "").strip().lower()
    vram = parse_size(wanted.get("memory"))
    names = [str(gpu.get("name") or gpu.get("type") or "").lower() for gpu in gpus]
    if len(gpus) < count:
        return False
    if kind not in {"", "any", "auto", "*"} and not any(kind in name for name in names):
        return False
    return vram is None or sum(_vram(gpu) >= vram for gpu in gpus) >= (count or 1)


def _gpus(hardware: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    listed = _mapping(hardware.get("gpu")).get("gpus") or hardware.get("gpus") or []
    return [gpu for gpu in listed if isinstance(gpu, dict)]


def _vram(gpu: Mapping[str, Any]) -> int:
    found = (walk(gpu, path) for path in VRAM_PATHS)
    return next((parse_size(value) or 0 for value in found if value), 0)


def _cores(hardware: Mapping[str, Any]) -> int:
    return _whole(_mapping(hardware.get("cpu")).get("logical_cores")) or 0


def _memory(hardware: Mapping[str, Any]) -> int:
    return _whole(_mapping(hardware.get("memory")).get("total_bytes")) or 0


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
