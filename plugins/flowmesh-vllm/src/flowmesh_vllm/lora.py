"""Adapters at run time: what vLLM can apply, their scale, and the numbers that it knows them by."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core import AdapterRef, InputError
from flowmesh_vllm.weights import read_adapter, weight_file

__all__ = ["AdapterId", "AdapterIds", "check_adapter", "prepare"]

# Source: MaxLoRARanks in vllm/config/lora.py.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# vLLM refuses most of these; others it would leave out without a word.
_NOT_AT_RUN_TIME = (
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora"),
    *("arrow_config", "kasa_config"),
)
# Ways to start a training that leave the base model as it was; all others change it as well.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_CHUNK_BYTES = 1 << 20


@attrs.frozen(kw_only=True)
class AdapterId:
    """What vLLM knows an adapter by; equal for equal content, wherever it lies.

    Attributes:
        number: From 1.
        name: Keys of vLLM's cache of prompts hold it.
    """

    number: int
    name: str


class AdapterIds:
    """Numbers adapters for the life of one engine. Any thread may ask."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def identify(self, adapter: AdapterRef) -> AdapterId:
        """Return the id of an adapter with its scale; reads its files when they are new.

        Raises:
            InputError: A file is missing.
        """
        try:
            digest = _digest(adapter)
        except OSError as exc:
            raise InputError(f"adapter {adapter.name} cannot be read: {exc}") from exc
        with self._lock:
            number = self._numbers.setdefault(digest, len(self._numbers) + 1)
        return AdapterId(number=number, name=f"lora-{digest[:16]}")


def check_adapter(adapter: AdapterRef, *, max_rank: int) -> None:
    """Refuse what vLLM cannot apply to a request, before it sees it.

    Args:
        adapter: A PEFT folder.
        max_rank: ``model.vllm.max_lora_rank`` of the engine.

    Raises:
        InputError: Naming the adapter, every field at fault, and what to do.
    """
    config = read_adapter(adapter)
    weight_file(adapter)
    beyond = list(_beyond_vllm(config))
    problems = list(_number_problems(config, adapter.scale)) or list(
        _rank_problems(config, max_rank)
    )
    if beyond:
        problems.append(f"vLLM cannot apply {', '.join(beyond)} at run time; give it apply: merge")
    if problems:
        raise InputError(f"adapter {adapter.name}: {'; '.join(problems)}")


def prepare(adapter: AdapterRef, folder: Path) -> Path:
    """Return the folder to hand to vLLM, which knows no scale beside the adapter's own alpha.

    Args:
        adapter: One that ``check_adapter`` let pass.
        folder: Of the attempt; a scaled adapter goes to ``.adapters`` in it, as links to its files.
    """
    if adapter.scale == 1:
        return adapter.path
    config = read_adapter(adapter)
    # Linear with rsLoRA too: alpha / sqrt(r) in place of alpha / r.
    config["lora_alpha"] *= adapter.scale
    alphas = config.get("alpha_pattern") or {}
    config["alpha_pattern"] = {key: alpha * adapter.scale for key, alpha in alphas.items()}
    target = folder / ".adapters" / adapter.name
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    file = weight_file(adapter)
    link = target / file.name
    link.unlink(missing_ok=True)
    link.symlink_to(file.absolute())
    return target


def _beyond_vllm(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name in _NOT_AT_RUN_TIME if config.get(name))
    if config.get("bias", "none") not in (None, "none"):
        yield f"bias {config['bias']!r}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        yield f"init_lora_weights {start!r}"


def _number_problems(config: Mapping[str, Any], scale: float) -> Iterator[str]:
    numbers = {
        "scale": scale,
        "lora_alpha": config.get("lora_alpha"),
        **_entries(config, "alpha_pattern"),
    }
    for name, value in numbers.items():
        if not _is_number(value):
            yield f"{name} must be a finite number, got {value!r}"
    for name, value in {"r": config.get("r"), **_entries(config, "rank_pattern")}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name} must be a whole number above 0, got {value!r}"
    if "target_modules" not in config:
        yield "target_modules is required"


def _rank_problems(config: Mapping[str, Any], max_rank: int) -> Iterator[str]:
    rank = max(config["r"], *_entries(config, "rank_pattern").values(), 0)
    if rank <= max_rank:
        return
    enough = next((allowed for allowed in _RANKS if allowed >= rank), None)
    remedy = f"raise model.vllm.max_lora_rank to {enough}" if enough else "give it apply: merge"
    yield f"r is {rank}, and the engine takes {max_rank} at most; {remedy}"


def _entries(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the entries of a pattern by a name for messages."""
    found = config.get(field) or {}
    if not isinstance(found, Mapping):
        return {field: found}
    return {f"{field}[{key!r}]": value for key, value in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _digest(adapter: AdapterRef) -> str:
    files = (weight_file(adapter), adapter.path / "adapter_config.json")
    parts = [file.name + _file_digest(*_state(file)) for file in files]
    return hashlib.sha256("\n".join([*parts, float(adapter.scale).hex()]).encode()).hexdigest()


def _state(file: Path) -> tuple[Path, int, int, int, int]:
    """Return what changes with a file's content, short of reading it."""
    stat = file.stat()
    return file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=1024)  # every task brings its own copy: bounded
def _file_digest(file: Path, *_state: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
