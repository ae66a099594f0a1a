"""The tutorial is followed block by block: files are written, commands run, answers compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pages import DOCS, FENCE, blocks, text_of

PAGE = DOCS / "tutorial.md"
# Language, title and content, in the order of the page; an answer follows its command.
BLOCKS = FENCE.findall(text_of(PAGE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader of the page works."""
    return tmp_path_factory.mktemp("tutorial")


def answers(expected: str, said: str) -> bool:
    """Return whether a command said what the page shows, where dots stand for anything."""
    return bool(re.fullmatch(".*".join(map(re.escape, expected.split("..."))), said, re.DOTALL))


@pytest.mark.parametrize(
    ("block", "after"),
    list(pairwise([*BLOCKS, ("end", "", "")])),
    ids=lambda block: block[1] or block[2].partition("\n")[0],
)
def test_a_block_does_what_the_page_says(
    folder: Path, block: tuple[str, str, str], after: tuple[str, str, str]
) -> None:
    language, title, text = block
    if title:
        (folder / title).write_text(text)
        return
    if language == "text":
        return  # compared when its command ran
    assert (language, after[0]) == ("bash", "text"), "a command is followed by its answer"
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=folder,
        env={**os.environ, "PATH": commands},
        capture_output=True,
        text=True,
        timeout=180,
    )
    # A refusal stands on standard error; whatever else does is not shown.
    said = done.stdout if done.returncode == 0 else done.stderr
    assert answers(after[2].strip(), said.strip()), done.stdout + done.stderr
    assert done.returncode == (2 if after[2].startswith("error: ") else 0)


@pytest.mark.parametrize(
    ("expected", "said", "same"),
    [
        ("a\n...\nb", "a\n1\n2\nb", True),
        ("a", "ab", False),
        ("a...", "ba", False),
        ("a.", "ab", False),
    ],
)
def test_an_answer_is_compared_from_end_to_end(expected: str, said: str, same: bool) -> None:
    assert answers(expected, said) is same


def test_the_executor_has_sixty_lines_at_most() -> None:
    first, whole = (text for title, text in blocks(PAGE, "python") if title == "keywords.py")
    assert len(first.splitlines()) < 30 < len(whole.splitlines()) <= 60
