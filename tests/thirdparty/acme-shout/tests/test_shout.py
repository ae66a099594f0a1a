import pytest
from flowmesh_core.testing import run_task

from acme_shout.spec import EXAMPLE


def test_the_volume_says_how_many_marks_follow() -> None:
    run = run_task("acme.shout", EXAMPLE)
    assert [item["output"] for item in run.result["items"]] == ["HELLO!!", "WORLD!!"]
    assert run.result["together"] == 1


def test_what_was_shouted_is_in_a_file_too() -> None:
    run = run_task("acme.shout", EXAMPLE)
    assert [file.path for file in run.outcome.artifacts] == ["shouts.txt"]
    assert (run.folder / "shouts.txt").read_text("utf-8") == "HELLO!!\nWORLD!!\n"


def test_the_operator_chooses_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_SHOUT_MARK", "?")
    run = run_task("acme.shout", EXAMPLE)
    assert run.result["items"][0]["output"] == "HELLO??"
