"""Our own executors, and those that others break here, keep what the kit checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flowmesh_core.echo import EchoExecutor
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.testing import ExecutorSuite
from flowmesh_core.testing.subject import Subject
from flowmesh_core.testing.watching import STATE

SOUND = Path(__file__).parent / "broken" / "sound.py"
DOCS = Path(__file__).parents[2] / "docs"


class TestEcho(ExecutorSuite):
    executor = "echo"
    refused: ClassVar[Any] = [{"timeoutSec": 0}]


class TestEchoAsAClass(ExecutorSuite):
    executor = EchoExecutor
    info = ExecutorInfo(name="acme.echo", task_types="acme.echo", target="flowmesh_core.echo:Echo")

    @staticmethod
    def spec(folder: Path) -> dict[str, Any]:
        (folder / "text").write_text("from a file")
        return {"text": (folder / "text").read_text()}


class TestSound(ExecutorSuite):
    executor = "sound"
    plugin_files: ClassVar[Any] = [SOUND]
    long_spec: ClassVar[Any] = {"steps": 10**6, "data": {"type": "list", "items": ["a"]}}
    refused: ClassVar[Any] = [
        {"voice": {"pitsh": 1}},
        {"data": {"type": "list", "items": ["bad"]}},
    ]


class TestSoundInline(TestSound):
    executor = "sound.inline"


class TestSoundTogether(TestSound):
    executor = "sound.together"
    grace_s = 2.0


class TestSoundPooled(TestSound):
    executor = "sound.pooled"


class TestSoundSplitting(TestSound):
    executor = "sound.splits"


class TestSoundFlat(TestSound):
    executor = "sound.flat"
    spec: ClassVar[Any] = {"data": {"type": "list", "items": ["hello", "world " * 300]}}


class TestSoundKeeping(TestSound):
    executor = "sound.keeps"


class TestSoundDrawing(TestSound):
    executor = "sound.draws"


class TestSoundChorus(ExecutorSuite):
    executor = "sound.chorus"
    plugin_files: ClassVar[Any] = [SOUND]
    long_spec: ClassVar[Any] = {"text": "la", "steps": 10**6}
    refused: ClassVar[Any] = [{"text": "bad"}]
    variants: ClassVar[Any] = [{"text": "world"}]
    grace_s = 2.0


class TestSoundService(TestSound):
    executor = "sound.serves"


class TestSoundWithVariants(TestSound):
    executor = "sound"
    variants: ClassVar[Any] = [{"data": {"type": "list", "items": ["other", "words"]}}]


def test_a_class_that_is_no_executor_is_told_by_the_first_check(tmp_path: Path) -> None:
    class TestNone(ExecutorSuite):
        executor: ClassVar[Any] = Path
        info = TestEchoAsAClass.info

    subject = Subject(TestNone, tmp_path)
    assert subject.problem == "flowmesh_core.echo:Echo must be a subclass of flowmesh_core.Executor"
    with pytest.raises(pytest.fail.Exception, match=re.escape(subject.problem)):
        TestNone().test_it_is_installed(subject)


def test_every_part_of_the_state_is_on_the_page() -> None:
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^\| may_change \|.*: (.*) \|$", page, re.MULTILINE)
    assert re.findall(r"`([a-z_. ]+)`", told) == list(STATE)


def test_every_check_has_its_row_on_the_page() -> None:
    collected = [vars(base) for base in reversed(ExecutorSuite.__mro__)]
    checks = [
        check for body in collected for name, check in body.items() if name.startswith("test_")
    ]
    clauses = [mark.args[0] for check in checks for mark in check.pytestmark]
    page = (DOCS / "conformance.md").read_text(encoding="utf-8")
    assert clauses == re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert all(check.__doc__ for check in checks)
