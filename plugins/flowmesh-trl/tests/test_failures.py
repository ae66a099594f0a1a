from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from flowmesh_trl.failures import explain

from flowmesh_core import CancelledError, ContractError, CrashError, ExecutionError, FlowmeshError


@pytest.fixture
def lines() -> list[str]:
    """What went to the task's log."""
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".launch").mkdir()
    (tmp_path / "logs").mkdir()
    return tmp_path


def tell(
    folder: Path,
    exits: Mapping[int, int],
    errors: Mapping[int, tuple[float, FlowmeshError]],
    lines: list[str] | None = None,
) -> FlowmeshError:
    """Explain exit codes of ranks, and errors with their times."""
    if exits:
        (folder / ".launch/failures.json").write_text(json.dumps(exits))
    for rank, (at, error) in errors.items():
        told = json.dumps({"at": at, "error": error.to_dict()})
        (folder / f".launch/rank-{rank}.error.json").write_text(told)
    say = (lines if lines is not None else []).append
    return explain(folder, 4, agent_code=1, say=say)


LOST = ExecutionError("connection closed by peer")


def test_error_that_came_first_counts_and_not_the_lowest_rank(folder: Path) -> None:
    first = ContractError("batch_size must be 1 or more", where="task t1")
    error = tell(folder, {0: 1, 1: -15, 2: 1}, {0: (7.2, LOST), 2: (7.1, first)})
    assert isinstance(error, ContractError)
    assert str(error) == "rank 2 of 4: task t1: batch_size must be 1 or more"
    assert error.problems == ["batch_size must be 1 or more"]


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-11, "SIGSEGV"), (3, None)])
def test_rank_that_ended_without_a_word_counts_before_errors_of_its_peers(
    folder: Path, code: int, name: str | None
) -> None:
    error = tell(folder, {0: 1, 1: 1, 3: code}, {0: (7.1, LOST), 1: (7.2, LOST)})
    assert isinstance(error, CrashError)
    assert str(error).startswith("rank 3 of 4 ")
    assert error.signal == name
    assert error.retriable


@pytest.mark.parametrize("code", [-15, -6])
def test_rank_that_others_took_along_counts_last(folder: Path, code: int) -> None:
    error = tell(folder, {0: code, 1: 1}, {1: (7.1, LOST)})
    assert str(error) == "rank 1 of 4: connection closed by peer"
    (folder / ".launch/rank-1.error.json").unlink()
    (folder / ".launch/failures.json").unlink()
    alone = tell(folder, {0: code}, {})
    assert str(alone).startswith("rank 0 of 4 was ended by SIG")


def test_illegal_instruction_is_not_tried_again(folder: Path) -> None:
    assert not tell(folder, {0: -4}, {}).retriable


def test_log_of_the_rank_that_failed_is_told_unless_it_is_known(
    folder: Path, lines: list[str]
) -> None:
    (folder / "logs/rank-2.log").write_text("".join(f"line {n}\n" for n in range(100)))
    error = tell(folder, {2: -9}, {}, lines)
    assert str(error) == "rank 2 of 4 was ended by SIGKILL; the end of its log: line 99"
    (said,) = lines
    assert said.startswith("the end of logs/rank-2.log:\nline 7")
    assert said.endswith("line 99")
    (folder / "logs/rank-0.log").write_text("hidden")
    tell(folder, {0: -9}, {}, lines)
    assert lines == [said]


def test_memory_that_ran_out_is_seen_in_the_log(folder: Path) -> None:
    (folder / "logs/rank-1.log").write_text("NCCL: CUDA error: Out of memory\n")
    error = tell(folder, {1: -6}, {})
    assert error.code == "crash.out_of_memory"


def test_rank_that_never_began_is_explained_by_the_launcher_log(folder: Path) -> None:
    (folder / "logs/launcher.log").write_text("No module named flowmesh_trl.rank\n")
    error = tell(folder, {0: 1}, {})
    assert str(error).endswith(
        "exited with code 1; the end of its log: No module named flowmesh_trl.rank"
    )


def test_failed_torchrun_is_told_apart_from_ranks(folder: Path) -> None:
    (folder / "logs/launcher.log").write_text("Traceback\nOSError: no free port\n")
    error = tell(folder, {}, {})
    assert str(error) == "torchrun exited with code 1; the end of its log: OSError: no free port"


def test_cancel_is_the_job_s_and_not_one_rank_s(folder: Path) -> None:
    error = tell(folder, {}, {0: (7.1, CancelledError("cancelled at step 3"))})
    assert isinstance(error, CancelledError)
    assert str(error) == "cancelled at step 3"
