"""Downloads into a folder, and finds what earlier tasks left; the one door for reading the network.

A file appears under its name only when it is whole. What was cut off is resumed when the server
can tell that the file is still the same one; what was fetched before is taken from the cache when
the server says that it has not changed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import attrs

from flowmesh_core.artifacts.download_cache import CachedFile, DownloadCache
from flowmesh_core.artifacts.network import NetworkPolicy, build_client, mask_url
from flowmesh_core.artifacts.unpack import UnpackLimits, archive_kind, unpack
from flowmesh_core.contract import check_task_id
from flowmesh_core.errors import InputError

if TYPE_CHECKING:  # loaded when the first task needs the network
    import httpx

__all__ = ["Fetcher"]

_TRY_AGAIN = frozenset({408, 429})
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)\Z")
_FILE_NAME = re.compile(r"[^.\x00-\x1f/\\][^\x00-\x1f/\\]{0,199}\Z")


class _CutError(Exception):
    """This try failed in a way that another may mend."""


@attrs.frozen(kw_only=True)
class Fetcher:
    """Downloads, unpacks, and finds results of earlier tasks. May be used by several threads.

    Attributes:
        policy: Which hosts may be asked, and who gets the token.
        results_dir: Where task folders lie.
        cache: Keeps what was fetched for tasks to come; None keeps nothing.
        attempts: How often a download is tried before it fails.
        sleep: Waits between tries; in seconds.
    """

    policy: NetworkPolicy
    results_dir: Path
    cache: DownloadCache | None = None
    attempts: int = 5
    limits: UnpackLimits = attrs.field(factory=UnpackLimits)
    sleep: Callable[[float], None] = time.sleep

    @property
    def orchestrator_url(self) -> str | None:
        """Base URL of the orchestrator, if there is one."""
        return self.policy.orchestrator_url

    def locate_task(self, task_id: str) -> Path | None:
        """Find the folder of an earlier task's results on this machine.

        Raises:
            ContractError: The id is no plain name.
        """
        folder = self.results_dir / check_task_id(task_id)
        return folder if folder.is_dir() else None

    def is_archive(self, path: Path) -> bool:
        """Tell from a file's content whether ``unpack`` would take it."""
        return bool(archive_kind(path))

    def unpack(self, archive: Path, folder: Path, archive_format: str = "auto") -> Path:
        """Unpack into a new folder and return it.

        Raises:
            ArchiveError: It is not safe, not whole, or no archive of that format.
        """
        return unpack(archive, folder, archive_format, limits=self.limits)

    def download(
        self,
        url: str,
        folder: Path,
        *,
        filename: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        max_bytes: int | None = None,
        sha256: str | None = None,
    ) -> Path:
        """Bring a file into a folder.

        Args:
            url: http or https.
            folder: Created when missing; a file of the same name is replaced.
            filename: Only its last part counts; else the URL's, else ``download``.
            headers: What the document adds; the orchestrator's token is added for its origin.
            timeout_s: For connecting and for each read, not in total.
            max_bytes: A larger file is refused.
            sha256: In hex; another file is refused.

        Raises:
            ArtifactError: The policy refuses the URL or one that it is redirected to.
            InputError: It cannot be had; retriable unless the server refused for good.
        """
        self.policy.check(url)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / _file_name(filename, url)
        part = folder / f".{secrets.token_hex(8)}.part"
        try:
            with build_client(self.policy, timeout_s=timeout_s) as client:
                download = _Download(
                    client=client,
                    url=url,
                    headers=self.policy.headers_for(url, headers),
                    part=part,
                    max_bytes=max_bytes,
                    known=self.cache.find(url) if self.cache else None,
                )
                self._persist(download)
            self._verify(download, sha256)
            part.replace(target)
        except OSError as exc:
            raise InputError(f"{mask_url(url)} cannot be written to {folder}: {exc}") from exc
        finally:
            part.unlink(missing_ok=True)
        return target

    def _verify(self, download: _Download, sha256: str | None) -> None:
        found = download.digest.hexdigest()
        if sha256 and found != sha256.lower():
            raise InputError(
                f"{mask_url(download.url)} must have the SHA-256 {sha256}, got {found}"
            )
        if self.cache and not download.unchanged:
            self.cache.keep(download.url, download.validator, download.part, found)

    def _persist(self, download: _Download) -> None:
        for tried in range(1, self.attempts + 1):
            try:
                download.advance()
            except _CutError as exc:
                if tried == self.attempts:
                    raise InputError(
                        f"{mask_url(download.url)} could not be downloaded in {tried} tries,"
                        f" last: {exc}",
                        retriable=True,
                    ) from exc
                self.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (tried - 1)))
            else:
                return


def _file_name(filename: str | None, url: str) -> str:
    for text in (filename or "", unquote(urlsplit(url).path)):
        name = text.rpartition("/")[2]
        if _FILE_NAME.match(name) and len(name.encode(errors="replace")) <= 200:
            return name
    return "download"


@attrs.define(kw_only=True)
class _Download:
    """One file on its way, over as many tries as it takes.

    Attributes:
        part: Holds what has come so far.
        known: What an earlier download of this URL left, or None.
        validator: The server's mark of this very content, or empty; without one a new try
            begins at the start.
        digest: Of what has come so far.
        unchanged: The server said so, and the cached file was taken.
    """

    client: httpx.Client
    url: str
    headers: Mapping[str, str]
    part: Path
    max_bytes: int | None
    known: CachedFile | None = None
    validator: str = ""
    digest: hashlib._Hash = attrs.field(factory=hashlib.sha256)
    unchanged: bool = False

    def advance(self) -> None:
        """Fetch what is missing.

        Raises:
            _CutError: It broke off, and another try may mend it.
            InputError: The server refuses, or the file is too large.
        """
        import httpx  # noqa: PLC0415 - see the import block

        have = self.part.stat().st_size if self.validator and self.part.exists() else 0
        wanted = {**self.headers, "Accept-Encoding": "identity"}
        if have:
            wanted |= {"Range": f"bytes={have}-", "If-Range": self.validator}
        elif self.known:
            wanted |= self.known.condition
        try:
            with self.client.stream("GET", self.url, headers=wanted) as response:
                if response.status_code == 304 and self.known:
                    return self._reuse(self.known)
                self._refuse(response)
                self._take(response, have)
        except httpx.TransportError as exc:
            raise _CutError(f"{type(exc).__name__}: {exc}") from exc
        except (httpx.InvalidURL, httpx.HTTPError) as exc:
            raise InputError(f"{mask_url(self.url)}: {type(exc).__name__}: {exc}") from exc

    def _reuse(self, known: CachedFile) -> None:
        self._check_size(known.size_bytes)
        self.known = None  # whatever goes wrong, the next try asks for the file itself
        digest = known.copy_to(self.part)
        if digest is None:
            raise _CutError("the cached file was damaged or removed")
        self.digest, self.unchanged = digest, True

    def _refuse(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 416:  # the file is no longer what it was
            self.validator = ""
        if status >= 500 or status in _TRY_AGAIN or status == 416:
            raise _CutError(f"HTTP {status}")
        if status not in (200, 206):
            hint = "; check its headers, or ORCHESTRATOR_TOKEN" if status in (401, 403) else ""
            raise InputError(f"{mask_url(self.url)} was refused: HTTP {status}{hint}")

    def _take(self, response: httpx.Response, have: int) -> None:
        start, total = _extent(response)
        if start not in (0, have):
            self.validator = ""
            raise _CutError(f"asked for the rest from byte {have}, got it from {start}")
        # Another encoding than the one asked for must be undone, and says nothing of the length.
        plain = response.headers.get("content-encoding", "identity") == "identity"
        if start == 0:
            self.validator = _validator(response) if plain else ""
        self._check_size(total or 0)
        if start == 0:
            self.digest = hashlib.sha256()
        written = start
        with self.part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for chunk in response.iter_raw() if plain else response.iter_bytes():
                written += file.write(chunk)
                self.digest.update(chunk)
                self._check_size(written)
        if plain and total is not None and written != total:
            raise _CutError(f"expected {total} bytes, got {written}")

    def _check_size(self, size_bytes: int) -> None:
        if self.max_bytes is not None and size_bytes > self.max_bytes:
            raise InputError(
                f"{mask_url(self.url)} must have at most {self.max_bytes} bytes, got {size_bytes}"
            )


def _extent(response: httpx.Response) -> tuple[int, int | None]:
    """Return where the body starts and how long the whole file is, if the server says it."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
        return (int(found[1]), int(found[2])) if found else (-1, None)
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdecimal() else None


def _validator(response: httpx.Response) -> str:
    """Return what If-Range may carry. Source: RFC 9110, 13.1.5; weak tags are not allowed."""
    tag: str = response.headers.get("etag", "")
    if tag and not tag.startswith("W/"):
        return tag
    return str(response.headers.get("last-modified", ""))
