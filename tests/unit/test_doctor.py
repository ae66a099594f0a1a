"""What the doctor makes of what its child processes saw; those are in ``test_plugins_cli.py``."""

from __future__ import annotations

from typing import Any

import pytest

from flowmesh_core.doctor import Diagnosis, Finding, Verdict, _Examiner
from flowmesh_core.executor import ExecutorInfo


@pytest.mark.parametrize(
    ("gpus", "answer", "capabilities", "verdict", "told"),
    [
        (0, {}, ["gpu"], "warning", "none here, and it needs one"),
        (0, {"torch": "2", "torch_gpus": 0}, ["cpu", "gpu"], "ok", "none here; it runs on the CPU"),
        (2, {}, ["gpu"], "ok", "sees 2 of 2"),
        (2, {"torch": "2", "torch_gpus": 1}, ["gpu"], "ok", "sees 1 of 2"),
        (
            2,
            {"torch": "2.13+cpu", "torch_gpus": 0},
            ["cpu", "gpu"],
            "failed",
            "torch 2.13+cpu sees none of 2; install a build for them",
        ),
    ],
)
def test_gpus_are_judged_by_what_the_worker_and_the_engine_see(
    gpus: int, answer: dict[str, Any], capabilities: list[str], verdict: str, told: str
) -> None:
    info = ExecutorInfo(name="a", task_types={"a"}, target="m:C", capabilities=capabilities)
    examiner = _Examiner({}, (), gpus, None, 1.0)
    finding = examiner._examine_gpus(info, answer)
    assert (finding.check, finding.verdict.value, finding.told) == ("gpu", verdict, told)


def test_a_diagnosis_of_another_environment_comes_through_as_data() -> None:
    finding = Finding(check="load", verdict=Verdict.FAILED, told="no", traceback="File x")
    row = {"name": "acme", "environment": "", "executors": [{"name": "acme.tts"}]}
    diagnosis = Diagnosis(row=row, findings=[finding])
    again = Diagnosis.from_dict(diagnosis.to_dict(), environment="blue")
    assert again == Diagnosis(row={**row, "environment": "blue"}, findings=[finding])
    assert not again.ok
    assert again.answers_to(["acme.tts"])
    assert again.answers_to(["acme"])
    assert again.answers_to([])
    assert not again.answers_to(["other"])
