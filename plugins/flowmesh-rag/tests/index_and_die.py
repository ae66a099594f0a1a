"""Index a folder with a model made of hashes, and die within: ``index_and_die.py ROOT BATCHES``."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmesh_rag.embedder import Embedder
from flowmesh_rag.indexing import IndexExecutor
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.spec import IndexSpec

from flowmesh_core import FileRef, Inputs, RunContext


class HashEmbedder(Embedder):
    """Counts the words of a text by their hash; ``before`` is called before each batch."""

    model = "hashes"
    dimensions = 64

    def __init__(self, before: Callable[[int], None] = lambda _batch: None) -> None:
        self.texts: list[str] = []
        self.batches: list[int] = []
        self._before = before

    def _embed(self, texts: Sequence[str], **_options: Any) -> Any:
        import numpy as np

        self._before(len(self.batches))
        self.texts += texts
        self.batches.append(len(texts))
        vectors = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[zlib.crc32(word.encode()) % 64] += 1
        return vectors


class HashIndex(IndexExecutor):
    """The executor with that model."""

    def __init__(self, embedder: HashEmbedder | None = None) -> None:
        super().__init__()
        self.embedder = embedder or HashEmbedder()

    def open_embedder(self, ctx: RunContext) -> Embedder:
        return self.embedder


def _die(batch: int) -> None:
    if batch == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    raw = {
        "taskType": "rag_index",
        "store": {"type": sys.argv[3], "collection": "notes"},
        "files": {"paths": ["x"]},
        "chunk": {"size": 60, "overlap": 0},
        "batch_size": 4,
    }
    names = sorted(path.name for path in (root / "docs").iterdir())
    context = RunContext(
        task_id="t",
        task_type="rag_index",
        spec=IndexSpec.model_validate(raw),
        raw_spec=raw,
        folder=root,
        clock=time.monotonic,
        settings=RagSettings.model_validate({"FLOWMESH_RAG_DIR": root / "stores"}),
        inputs=Inputs(files=tuple(FileRef(path=root / "docs" / n, name=n) for n in names)),
    )
    executor = HashIndex(HashEmbedder(_die))
    executor.load(context)
    executor.run(context)
