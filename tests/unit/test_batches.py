"""The laws of running together, over places that take groups and places that do not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmesh_core.batches import Batch, Lobby
from flowmesh_core.config import load_settings
from flowmesh_core.errors import CrashError, ExecutionError, FlowmeshError
from flowmesh_core.executor import Capability, ExecutorInfo, Outcome, RunContext
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Job, Place, PlaceContext
from flowmesh_core.task_log import TaskLog

PLAIN = ExecutorInfo(name="x", task_types={"x"}, target="m:C", group_key=["model"])
SHRINKS = attrs.evolve(PLAIN, name="y", capabilities=[Capability.SHRINK, Capability.GROUP])


class OneByOne(Place):
    """Answers with the member's own text, or as the text says; notes what it ran."""

    def __init__(self, root: Path) -> None:
        context = PlaceContext(settings=load_settings({}), load_class=lambda _: None, folder=root)  # type: ignore[arg-type, return-value]
        super().__init__(context)
        self.ran: list[str] = []
        self.groups: list[list[str]] = []

    async def run(self, job: Job) -> Outcome:
        text: str = job.spec["text"]
        self.ran.append(job.ctx.task_id)
        await asyncio.sleep(0)
        if text.startswith("slow"):
            await asyncio.sleep(0.01)
        if text.startswith("raise"):
            raise ExecutionError(f"no {text}")
        if text.startswith("fail"):
            return Outcome(error=ExecutionError(f"no {text}"))
        if text.startswith("big") and job.ctx.batch_scale == 1.0:
            raise CrashError("memory ran out", oom=True)
        if text.startswith("once") and self.ran.count(job.ctx.task_id) + self._equal(job) == 1:
            raise ExecutionError("only the first time")
        (job.ctx.folder / "made").write_text(job.ctx.task_id)
        return Outcome(result={"text": text})

    def _equal(self, job: Job) -> int:
        return sum(1 for task_id in self.ran if task_id != job.ctx.task_id)

    async def close(self) -> None: ...


class AtOnce(OneByOne):
    """Runs the members of a group side by side."""

    def run_group(self, jobs: Sequence[Job]) -> list[asyncio.Task[Outcome]]:
        self.groups.append([job.ctx.task_id for job in jobs])
        return [asyncio.ensure_future(self.run(job)) for job in jobs]


def make_job(root: Path, task_id: str, text: str, info: ExecutorInfo = PLAIN) -> Job:
    folder = root / task_id
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    log = TaskLog(folder, mask=lambda: SecretMask({}), publish=lambda *_: None, max_bytes=1 << 20)
    ctx = RunContext(
        task_id=task_id,
        task_type="x",
        spec={},
        raw_spec={},
        folder=folder,
        clock=time.monotonic,
    )
    return Job(info=info, spec={"text": text}, ctx=ctx, log=log)


async def run_batch(
    place: OneByOne,
    jobs: Mapping[str, Job],
    *,
    keys: Mapping[str, str],
    work: Mapping[str, str | None],
    absent: int = 0,
) -> dict[str, Outcome | BaseException]:
    """Submit every member to one batch; return each answer, or what was raised for it."""
    batch = Batch()
    seats = batch.seats(len(jobs) + absent)

    async def submit(task_id: str) -> Outcome | BaseException:
        seats.use()
        try:
            return await batch.submit(place, jobs[task_id], group=keys[task_id], work=work[task_id])
        except FlowmeshError as exc:
            return exc
        finally:
            jobs[task_id].log.close()

    running = [asyncio.ensure_future(submit(task_id)) for task_id in jobs]
    await asyncio.sleep(0)
    for _ in range(absent):
        seats.give_up()
    answers = await asyncio.wait_for(asyncio.gather(*running), 20)
    return dict(zip(jobs, answers, strict=True))


TEXTS = st.sampled_from(["a", "b", "slow-a", "fail", "raise", "big"])
MEMBERS = st.lists(
    st.tuples(TEXTS, st.sampled_from(["k1", "k2"]), st.booleans()), min_size=1, max_size=7
)


@pytest.mark.parametrize("kind", [OneByOne, AtOnce])
@given(members=MEMBERS, absent=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_every_member_gets_its_own_answer_exactly_once(
    kind: type[OneByOne],
    members: list[tuple[str, str, bool]],
    absent: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("batch")
    place = kind(root)
    texts = {f"t{n}": text for n, (text, _, _) in enumerate(members)}
    jobs = {task_id: make_job(root, task_id, text) for task_id, text in texts.items()}
    keys = {f"t{n}": key for n, (_, key, _) in enumerate(members)}
    work = {
        f"t{n}": text if deterministic else None
        for n, (text, _, deterministic) in enumerate(members)
    }
    answers = asyncio.run(run_batch(place, jobs, keys=keys, work=work, absent=absent))
    for task_id, answer in answers.items():
        text = texts[task_id]
        if isinstance(answer, Outcome) and answer.ok:
            assert answer.result == {"text": text}
            assert (root / task_id / "made").exists()
        elif text == "big":
            assert isinstance(answer, CrashError)
        else:
            error = answer.error if isinstance(answer, Outcome) else answer
            assert str(error) == f"no {text}"
    for task_ids in place.groups:
        assert len({keys[task_id] for task_id in task_ids}) == 1
    assert len(place.ran) == len(set(place.ran)), "nobody's work was done twice"
    distinct = {
        (keys[task_id], work[task_id] or task_id)
        for task_id in texts
        if texts[task_id] in ("a", "b", "slow-a")
    }
    done = [task_id for task_id in place.ran if texts[task_id] in ("a", "b", "slow-a")]
    assert len(done) == len(distinct), "equal deterministic work of one group is done once"


def run_texts(
    place: OneByOne, root: Path, *texts: str, info: ExecutorInfo = PLAIN, work: str | None = None
) -> tuple[dict[str, Job], dict[str, Any]]:
    jobs = {f"t{n}": make_job(root, f"t{n}", text, info) for n, text in enumerate(texts)}
    keys, works = dict.fromkeys(jobs, "k"), dict.fromkeys(jobs, work)
    return jobs, asyncio.run(run_batch(place, jobs, keys=keys, work=works))


def test_an_equal_whose_work_failed_does_it_for_itself(tmp_path: Path) -> None:
    place = AtOnce(tmp_path)
    _, answers = run_texts(place, tmp_path, "once", "once", work="same")
    assert isinstance(answers["t0"], ExecutionError)
    assert answers["t1"].result == {"text": "once"}
    assert place.ran == ["t0", "t1"]


def test_files_of_equal_work_are_copied_but_not_logs_and_metrics(tmp_path: Path) -> None:
    place = AtOnce(tmp_path)
    for name in ("logs", "t0"):
        (tmp_path / "t0" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "t0" / "logs" / "task.log").write_text("mine")
    (tmp_path / "t0" / "metrics.jsonl").write_text("mine")
    run_texts(place, tmp_path, "a", "a", work="same")
    assert (tmp_path / "t1" / "made").read_text() == "t0"
    assert not (tmp_path / "t1" / "logs" / "task.log").exists()
    assert not (tmp_path / "t1" / "metrics.jsonl").exists()


def test_those_that_ran_out_of_memory_run_once_more_with_half_the_batch(tmp_path: Path) -> None:
    place = AtOnce(tmp_path)
    jobs, answers = run_texts(place, tmp_path, "a", "big", "big2", info=SHRINKS)
    assert all(answer.ok for answer in answers.values())
    assert [job.ctx.batch_scale for job in jobs.values()] == [1.0, 0.5, 0.5]
    assert place.groups == [["t0", "t1", "t2"], ["t1", "t2"]]
    assert "half the batch" in (tmp_path / "t1" / "logs" / "task.log").read_text()


def test_nobody_waits_long_for_a_member_that_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmesh_core.batches._PATIENCE_S", 0.05)
    place = AtOnce(tmp_path)
    jobs = {name: make_job(tmp_path, name, "a") for name in ("early", "late")}

    async def main() -> list[Outcome]:
        batch = Batch()
        seats = batch.seats(2)

        async def submit(name: str, delay_s: float) -> Outcome:
            await asyncio.sleep(delay_s)
            seats.use()
            return await batch.submit(place, jobs[name], group="k", work=None)

        both = asyncio.gather(submit("early", 0), submit("late", 0.3))
        return list(await asyncio.wait_for(both, 10))

    assert [answer.ok for answer in asyncio.run(main())] == [True, True]
    assert place.ran == ["early", "late"]
    for job in jobs.values():
        job.log.close()


def test_a_member_that_is_given_up_is_cancelled_and_its_neighbours_go_on(tmp_path: Path) -> None:
    place = AtOnce(tmp_path)
    jobs = {name: make_job(tmp_path, name, "slow-a") for name in ("a", "b")}

    async def main() -> list[Any]:
        batch = Batch()
        seats = batch.seats(2)
        running = []
        for job in jobs.values():
            seats.use()
            running.append(asyncio.ensure_future(batch.submit(place, job, group="k", work=None)))
        while not place.groups:
            await asyncio.sleep(0)
        running[0].cancel()
        return await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 10)

    first, second = asyncio.run(main())
    assert isinstance(first, asyncio.CancelledError)
    assert second.ok
    assert not (tmp_path / "a" / "made").exists()
    for job in jobs.values():
        job.log.close()


def test_guests_of_one_key_are_taken_along_while_there_is_room() -> None:
    async def main() -> None:
        lobby = Lobby(most=5)
        host = lobby.enter("k", 1)
        large, small, other = lobby.enter("k", 4), lobby.enter("k", 1), lobby.enter("z", 1)
        gone = lobby.enter("k", 1)
        lobby.leave(gone)
        assert lobby.take_along(host) == [large]
        assert lobby.take_along(small) == []
        lobby.leave(other)
        lobby.leave(other)

    asyncio.run(main())
