"""Reads the head of a GGUF file: what is in it, before llama.cpp maps gigabytes.

Source: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from flowmesh_core import InputError

__all__ = ["find_gguf", "read_metadata"]

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def find_gguf(path: Path, what: str) -> Path:
    """Return the GGUF file at ``path``: the file itself, or the only one of a folder.

    Args:
        path: File or folder.
        what: Names the thing in messages, such as ``checkpoint.load``.

    Raises:
        InputError: There is none, or more than one.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"{what}: {path} must be a .gguf file or hold exactly one, got {names}")
    return found[0]


def read_metadata(path: Path, what: str) -> dict[str, str | int | float | bool]:
    """Return the file's keys and values, without arrays.

    Raises:
        InputError: It is no GGUF file, or breaks off.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Head(data).read()
    except (OSError, ValueError, struct.error) as exc:
        raise InputError(f"{what}: {path} must be a whole GGUF file: {exc}") from exc


class _Head:
    """A cursor over the head; ``ValueError`` or ``struct.error`` where it makes no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> dict[str, str | int | float | bool]:
        magic, version = self._data[:4], self._take("xxxxI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        self._take("Q")  # tensors
        pairs = {}
        for _ in range(int(self._take("Q"))):
            key, value = self._string(), self._value(int(self._take("I")))
            if value is not None:
                pairs[key] = value
        return pairs

    def _take(self, code: str) -> int | float | bool:
        layout = f"<{code}"
        value: int | float | bool = struct.unpack_from(layout, self._data, self._at)[0]
        self._at += struct.calcsize(layout)
        return value

    def _string(self) -> str:
        start = self._skip_string()
        return self._data[start : self._at].decode()

    def _skip_string(self) -> int:
        length = int(self._take("Q"))
        start = self._at
        self._at += length
        if self._at > len(self._data):
            raise ValueError("it breaks off")
        return start

    def _value(self, kind: int) -> str | int | float | bool | None:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            self._skip_array()
            return None
        return self._take(_code(kind))

    def _skip_array(self) -> None:
        kind, length = int(self._take("I")), int(self._take("Q"))
        if kind == _STRING:
            for _ in range(length):
                self._skip_string()
        else:
            self._at += length * struct.calcsize(f"<{_code(kind)}")


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"it holds a value of unknown type {kind}")
    return _SCALARS[kind]
