"""What every driver of ``flowmesh.stores`` must do; its author subclasses ``StoreSuite``.

Each check is one clause of ``docs/conformance.md``. What the author's ``Remote`` cannot do is
skipped, with what to give.
"""

from __future__ import annotations

import abc
import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from flowmesh_core.artifacts.parcel import Parcel, Receipt
from flowmesh_core.config import load_settings
from flowmesh_core.contract import Destination
from flowmesh_core.errors import ArchiveError, UploadError
from flowmesh_core.stores.base import Store
from flowmesh_core.testing.verdicts import (
    attempt,
    clause,
    drive,
    find_left,
    listening,
    refuse,
    skip,
)

__all__ = ["Remote", "StoreSuite"]

T = TypeVar("T")
_NAMES = (
    *("Zoë 漢字 🎉.bin", "e\u0301.bin", "a b.bin", "a%20b.bin", "a+b&c=d.bin"),
    *("50%.bin", "a?b#c.bin", "-x.tar.gz", "quote'd.bin"),
)
_LARGE = bytes(range(256)) * 40_000
_SMALL = b"a small file\n" * 100
_SECRET = "kit-s3cret-of-a-header"  # noqa: S105 - it is to be looked for
_RESULT = {"ok": True, "text": "Zoë 漢字 🎉", "items": [{"index": 0, "score": 0.25}], "none": None}


class Remote(abc.ABC):
    """The far side of a store, as its author describes it; an empty one for each check.

    Attributes:
        store: The driver.
        destination: Where it writes; headers are added where they must stay secret.
        settings: Fields of ``Settings`` that it needs.
        secrets: Parts of the destination that no log and no error may show.
    """

    store: type[Store]
    destination: Destination
    settings: Mapping[str, Any] = {}
    secrets: Sequence[str] = ()

    @abc.abstractmethod
    def read(self, told: Mapping[str, Any]) -> bytes | None:
        """Return what lies where the store says that a file is; None when nothing does."""

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Return the name of all that lies there, whole or not."""

    def result(self, task_id: str) -> Any:
        """Return the result that was delivered for a task, decoded."""
        raise NotImplementedError

    def cut(self) -> AbstractContextManager[None]:
        """Let nothing through, and break what is connected, until the context ends."""
        raise NotImplementedError

    def deny(self) -> AbstractContextManager[None]:
        """Refuse to take anything until the context ends, as without permission."""
        raise NotImplementedError

    def spoil(self) -> AbstractContextManager[None]:
        """Change some byte of all that arrives until the context ends."""
        raise NotImplementedError


class _Session:
    """Does with a store what a worker does."""

    def __init__(self, store: Store, remote: Remote, folder: Path) -> None:
        self.store = store
        self.remote = remote
        self.folder = folder
        self.there = remote.destination

    def place(self, name: str, task_id: str) -> tuple[Path, Path]:
        """Return where a file lies while its task runs, and where afterwards."""
        paths = [self.folder / root / task_id / name for root in ("running", "results")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        return paths[0], paths[1]

    async def send(
        self, content: bytes = _SMALL, *, name: str = "model.bin", task_id: str = "kit-1"
    ) -> Receipt:
        """Send a file, then commit its task."""
        path, final = self.place(name, task_id)
        path.write_bytes(content)
        receipt = await self.store.send(Parcel(task_id, path, final), self.there)
        if not path.exists() or path.read_bytes() != content:
            pytest.fail(f"it changed or removed the file {name} that it sent", pytrace=False)
        os.replace(path, final)  # noqa: PTH105 - final may be there from before
        return receipt

    def begin(self) -> tuple[Parcel, asyncio.Task[Receipt]]:
        """Begin to send a file of which the first half is there."""
        path, final = self.place("growing.bin", "kit-1")
        path.write_bytes(_LARGE[: len(_LARGE) // 2])
        parcel = Parcel("kit-1", path, final, growing=True)
        sending = asyncio.ensure_future(self.store.send(parcel, self.there))
        parcel.grow(path.stat().st_size)
        return parcel, sending

    def end(self, parcel: Parcel) -> None:
        """Write the other half."""
        parcel.path.write_bytes(_LARGE)
        parcel.seal(len(_LARGE), hashlib.sha256(_LARGE).hexdigest())

    async def deliver(self, result: Mapping[str, Any], task_id: str = "kit-1") -> None:
        """Hand over a result."""
        await self.store.deliver(task_id, result, self.there)

    def compare(self, receipt: Receipt, content: bytes, what: str) -> Iterator[str]:
        """Say what is wrong with what arrived."""
        found = self.remote.read(receipt.told)
        if found is None:
            yield f"{what} is not where the store says: {dict(receipt.told)}"
        elif found != content:
            yield f"{what} has {len(content)} bytes, {len(found)} other ones arrived"


class StoreSuite:
    """Subclass it as ``class TestMine(StoreSuite)`` with a fixture ``remote``.

    Attributes:
        limit_s: Longest that one check may take.
    """

    limit_s: ClassVar[float] = 60.0

    @pytest.fixture
    def remote(self) -> Remote:
        """The far side; the subclass gives it."""
        pytest.fail("give a fixture `remote` that returns a Remote", pytrace=False)

    def drive(self, remote: Remote, folder: Path, work: Callable[[_Session], Awaitable[T]]) -> T:
        """Work with a new store, which is closed twice afterwards."""
        settings = {"delivery_retries": 1, "results_dir": folder, **remote.settings}

        async def main() -> T:
            store = remote.store(load_settings({}, **settings))
            try:
                return await work(_Session(store, remote, folder))
            finally:
                await store.close()
                await store.close()

        return drive(main(), self.limit_s)

    # What arrives.

    @clause("store.whole")
    def test_a_file_arrives_as_it_is(self, remote: Remote, tmp_path: Path) -> None:
        """The result can tell where it lies, and there it is."""

        async def work(session: _Session) -> Iterator[str]:
            receipt = await session.send()
            missing = [key for key in ("url", "download_url") if not receipt.told.get(key)]
            if missing:
                return iter([f"told has no {key}: {dict(receipt.told)}" for key in missing])
            json.dumps(dict(receipt.told), allow_nan=False)
            return session.compare(receipt, _SMALL, "a small file")

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.names")
    def test_every_name_is_a_file_of_its_own(self, remote: Remote, tmp_path: Path) -> None:
        """Names of every script, with all that URLs and shells take for something else."""

        async def work(session: _Session) -> list[str]:
            sent = {name: await session.send(name.encode(), name=name) for name in _NAMES}
            pairs = [session.compare(sent[name], name.encode(), repr(name)) for name in _NAMES]
            return [fault for faults in pairs for fault in faults]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.empty")
    def test_an_empty_file_arrives(self, remote: Remote, tmp_path: Path) -> None:
        """A file of no bytes is a file."""
        refuse(self._send_one(remote, tmp_path, b"", "an empty file"))

    @clause("store.large")
    def test_ten_megabytes_arrive(self, remote: Remote, tmp_path: Path) -> None:
        """More than any buffer holds."""
        refuse(self._send_one(remote, tmp_path, _LARGE, "a file of 10 MB"))

    def _send_one(self, remote: Remote, folder: Path, content: bytes, what: str) -> list[str]:
        async def work(session: _Session) -> list[str]:
            return [*session.compare(await session.send(content), content, what)]

        return self.drive(remote, folder, work)

    @clause("store.growing")
    def test_a_file_that_grows_arrives_whole(self, remote: Remote, tmp_path: Path) -> None:
        """An archive is sent while it is still being packed."""

        async def work(session: _Session) -> list[str]:
            parcel, sending = session.begin()
            await asyncio.sleep(0.05)  # a store that can is in the middle by now
            session.end(parcel)
            receipt = await sending
            os.replace(parcel.path, parcel.final)  # noqa: PTH105 - as a worker commits
            return [*session.compare(receipt, _LARGE, "a file that grew")]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.again")
    def test_what_comes_again_replaces_what_was_there(self, remote: Remote, tmp_path: Path) -> None:
        """A task that is tried again sends its files again; its readers see the last ones."""

        async def work(session: _Session) -> list[str]:
            first = await session.send()
            before = remote.names()
            same = await session.send()
            other = await session.send(b"another attempt")
            faults = [*session.compare(other, b"another attempt", "what came last")]
            if not first.told["url"] == same.told["url"] == other.told["url"]:
                faults.append(f"the same file has two addresses: {first.told} and {other.told}")
            more = remote.names() - before
            return faults + [f"sent again, it lies there twice: {name}" for name in sorted(more)]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.tasks")
    def test_tasks_do_not_share_a_file(self, remote: Remote, tmp_path: Path) -> None:
        """Two tasks may name their files alike, and send them at once."""

        async def work(session: _Session) -> list[str]:
            tasks = ("kit-1", "kit-2")
            sent = await asyncio.gather(
                *(session.send(task.encode() * 1000, task_id=task) for task in tasks)
            )
            pairs = zip(sent, tasks, strict=True)
            found = [session.compare(r, t.encode() * 1000, f"the file of {t}") for r, t in pairs]
            return [fault for faults in found for fault in faults]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.result")
    def test_a_result_arrives_and_the_last_one_stays(self, remote: Remote, tmp_path: Path) -> None:
        """Delivered again after a failure, it replaces the first."""

        async def work(session: _Session) -> Iterator[str]:
            await session.deliver({"ok": False})
            await session.deliver({"ok": False}, "kit-2")
            await session.deliver(_RESULT)
            found = _ask(lambda: remote.result("kit-1"), "result")
            return iter([f"delivered was {_RESULT}, there is {found}"] if found != _RESULT else [])

        refuse(self.drive(remote, tmp_path, work))

    # A file is whole, or it is not there.

    @clause("store.given-up")
    def test_nothing_is_there_of_a_file_that_was_given_up(
        self, remote: Remote, tmp_path: Path
    ) -> None:
        """What cannot be packed to its end is no file; why not is the packer's to say."""

        async def work(session: _Session) -> list[str]:
            before = remote.names()
            parcel, sending = session.begin()
            await asyncio.sleep(0.05)
            parcel.give_up(ArchiveError("the kit gave it up"))
            raised = await attempt(sending)
            faults = [f"left behind: {name}" for name in sorted(remote.names() - before)]
            if isinstance(raised, Receipt) or "the kit gave it up" not in str(raised):
                faults.append(f"it must raise what the file was given up with, got {raised!r}")
            return faults

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.cancelled")
    def test_nothing_is_there_of_a_file_whose_task_was_cancelled(
        self, remote: Remote, tmp_path: Path
    ) -> None:
        """The sending ends when it is cancelled, and takes its half file with it."""

        async def work(session: _Session) -> list[str]:
            before = remote.names()
            _, sending = session.begin()
            await asyncio.sleep(0.05)
            sending.cancel()
            raised = await attempt(sending)
            faults = [f"left behind: {name}" for name in sorted(remote.names() - before)]
            if not isinstance(raised, asyncio.CancelledError):
                faults.append(f"it must let the cancel pass, got {raised!r}")
            return faults

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.verified")
    def test_what_arrived_changed_is_not_called_verified(
        self, remote: Remote, tmp_path: Path
    ) -> None:
        """Only what is ``verified`` is ever removed here, so it must have been looked at."""

        async def work(session: _Session) -> list[str]:
            with _ask(remote.spoil, "spoil"):
                answer = await attempt(session.send())
            if isinstance(answer, Receipt):
                return ["it calls verified what arrived changed"] if answer.verified else []
            return [*_judge(answer, "what arrived changed", retriable=True)]

        refuse(self.drive(remote, tmp_path, work))

    # Failures.

    @clause("store.broken")
    def test_a_broken_connection_may_be_tried_again(self, remote: Remote, tmp_path: Path) -> None:
        """The failure is retriable and leaves nothing; once it has passed, the next try works."""

        async def work(session: _Session) -> list[str]:
            await session.send(name="before.bin")
            before = remote.names()
            parcel, sending = session.begin()
            await asyncio.sleep(0.05)
            with _ask(remote.cut, "cut"):
                session.end(parcel)
                faults = [*_judge(await attempt(sending), "send, cut off", retriable=True)]
                raised = await attempt(session.deliver(_RESULT))
                faults += _judge(raised, "deliver, cut off", retriable=True)
            left = sorted(remote.names() - before)
            faults += [f"cut off, it left behind: {name}" for name in left]
            after = await attempt(session.send())
            if not isinstance(after, Receipt):
                return [*faults, f"connected again, send must succeed, got {after!r}"]
            return [*faults, *session.compare(after, _SMALL, "what was sent afterwards")]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.denied")
    def test_a_refusal_is_final(self, remote: Remote, tmp_path: Path) -> None:
        """Without permission, another try is refused as well."""

        async def work(session: _Session) -> list[str]:
            before = remote.names()
            with _ask(remote.deny, "deny"):
                faults = [*_judge(await attempt(session.send()), "send, denied", retriable=False)]
                raised = await attempt(session.deliver(_RESULT))
                faults += _judge(raised, "deliver, denied", retriable=False)
            left = sorted(remote.names() - before)
            return faults + [f"denied, it left behind: {name}" for name in left]

        refuse(self.drive(remote, tmp_path, work))

    @clause("store.secrets")
    def test_no_error_and_no_log_tells_a_secret(self, remote: Remote, tmp_path: Path) -> None:
        """Headers, and the secrets that the author names, are the far side's alone to read."""
        troubles = [trouble for trouble in ("cut", "deny") if _gives(remote, trouble)]
        if not troubles:
            skip("give Remote.cut or Remote.deny, so that there is an error")
        headers = {"Authorization": f"Bearer {_SECRET}", "X-Kit-Key": _SECRET}

        async def work(session: _Session) -> list[str]:
            session.there = session.there.model_copy(update={"headers": headers})
            texts = {"what the result tells": str(dict((await session.send()).told))}
            for trouble in troubles:
                with getattr(remote, trouble)():
                    texts[f"an error of send ({trouble})"] = str(await attempt(session.send()))
                    raised = await attempt(session.deliver(_RESULT))
                    texts[f"an error of deliver ({trouble})"] = str(raised)
            return [
                f"{where} tells a header" for where, text in texts.items() if _SECRET in text
            ] + [
                f"{where} tells the {number}. of Remote.secrets"
                for where, text in texts.items()
                for number, secret in enumerate(remote.secrets, 1)
                if secret in text and not where.startswith("what")  # an address may need it
            ]

        with listening() as lines:
            faults = self.drive(remote, tmp_path, work)
        told = "\n".join(lines)
        refuse(faults + ["the log tells a secret" for s in (_SECRET, *remote.secrets) if s in told])

    @clause("store.closed")
    def test_nothing_is_left_once_it_is_closed(self, remote: Remote, tmp_path: Path) -> None:
        """``close`` frees connections and threads, may come twice, and to a store unused."""

        async def work(session: _Session) -> None:
            await session.send()
            await session.deliver(_RESULT)

        async def nothing(_session: _Session) -> None:
            """Close a store that was never used."""

        self.drive(remote, tmp_path, nothing)
        refuse(find_left(lambda: self.drive(remote, tmp_path, work)))


def _judge(raised: Any, when: str, *, retriable: bool) -> Iterator[str]:
    wanted = f"an UploadError with retriable={retriable}"
    if not isinstance(raised, UploadError):
        yield f"{when}, must raise {wanted}, got {raised!r}"
    elif raised.retriable is not retriable:
        yield f"{when}, must raise {wanted}, got retriable={raised.retriable}: {raised}"


def _gives(remote: Remote, name: str) -> bool:
    return getattr(type(remote), name) is not getattr(Remote, name)


def _ask(question: Callable[[], T], name: str) -> T:
    """Return what the author's description gives, or leave the check out."""
    try:
        return question()
    except NotImplementedError:
        skip(f"give Remote.{name}")
