"""Keeps downloads by their SHA-256, within a bound, for tasks that ask for the same URL again.

``<folder>/<sha256>`` is a file, ``<folder>/urls/<sha256 of the URL>`` says which one a URL gave and
by what mark its server knows it. Several workers may share a folder: what appears, appears whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import attrs

from flowmesh_core.bounded_folder import BoundedFolder

__all__ = ["CachedFile", "DownloadCache"]

_BLOCK_BYTES = 1 << 20


@attrs.frozen(kw_only=True)
class CachedFile:
    """A file that a URL gave before.

    Attributes:
        validator: The server's mark of it, an entity tag or a date.
    """

    path: Path
    validator: str
    size_bytes: int

    @property
    def condition(self) -> Mapping[str, str]:
        """The header that asks for the file unless it is still this one."""
        name = "If-None-Match" if self.validator.startswith('"') else "If-Modified-Since"
        return {name: self.validator}

    def copy_to(self, target: Path) -> hashlib._Hash | None:
        """Copy it; return the digest of the copy, or None when it is not what it should be.

        A damaged file is removed.
        """
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as source, target.open("wb") as copy:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    copy.write(block)
        except FileNotFoundError:  # another worker needed the room
            return None
        if digest.hexdigest() != self.path.name:
            self.path.unlink(missing_ok=True)
            return None
        os.utime(self.path)  # used now, and so the last to go
        return digest


@attrs.frozen(kw_only=True)
class DownloadCache:
    """A folder of downloads.

    Attributes:
        folder: Made when it is needed.
        max_bytes: What all files together may have; the longest unused go first.
    """

    folder: Path
    max_bytes: int
    _bounded: BoundedFolder = attrs.field(
        init=False,
        default=attrs.Factory(
            lambda self: BoundedFolder(self.folder, self.max_bytes), takes_self=True
        ),
    )

    def find(self, url: str) -> CachedFile | None:
        """Return what an earlier download of the URL left."""
        try:
            entry = json.loads(self._entry(url).read_bytes())
            path = self.folder / entry["sha256"]
            return CachedFile(
                path=path, validator=entry["validator"], size_bytes=path.stat().st_size
            )
        except FileNotFoundError:
            self._entry(url).unlink(missing_ok=True)
        except (OSError, ValueError, LookupError, TypeError):
            pass  # whatever is wrong with it: the file is fetched again
        return None

    def keep(self, url: str, validator: str, file: Path, sha256: str) -> None:
        """Keep a download, unless its server gave no mark or it is too large.

        A cache that cannot be written is no reason to fail.
        """
        if not validator or file.stat().st_size > self.max_bytes:
            return
        with contextlib.suppress(OSError):
            target = self.folder / sha256
            if target.exists():
                os.utime(target)
            else:
                with self._bounded.appearing(target) as part:
                    _link_or_copy(file, part)
            with self._bounded.appearing(self._entry(url)) as part:
                part.write_text(json.dumps({"validator": validator, "sha256": sha256}))
            self._bounded.make_room()

    def _entry(self, url: str) -> Path:
        # Only the hash: a URL may carry a signature.
        return self.folder / "urls" / hashlib.sha256(url.encode(errors="replace")).hexdigest()


def _link_or_copy(file: Path, target: Path) -> None:
    """Share the file's blocks: whoever changes it later is found out by its digest."""
    try:
        target.hardlink_to(file)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)
