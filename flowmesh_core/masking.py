"""Keeps secrets out of results, events and logs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["SecretMask", "mask_sensitive"]

_SENSITIVE = re.compile(
    r"authorization|cookie|credential|headers$|passw|secret|token$|(api|access|private)[_-]?key",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"\$\{[^{}]*\}\Z")
_MASKED = "***"


class SecretMask:
    """Puts the name back where the value of a secret appears: ``${env.NAME}``.

    The core masks what the task's document named. An executor masks what its settings hold, in
    all that it returns, raises, logs and writes: ``SecretMask({"ACME_KEY": key}).value(result)``.
    An object is never changed, so that several threads may share one.

    Args:
        secrets: Value of each variable; empty ones are left out. Short ones are kept: whoever
            calls them secrets means it.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self._set({value: f"${{env.{name}}}" for name, value in secrets.items() if value})

    def _set(self, names: Mapping[str, str]) -> None:
        # Longest first: one secret may contain another.
        self._names = dict(sorted(names.items(), key=lambda item: -len(item[0])))
        self._pattern = re.compile("|".join(map(re.escape, self._names))) if self._names else None
        if self._names:
            # As the environment holds them: bytes that are no text stay what they were.
            self._bytes = {
                value.encode(errors="surrogateescape"): name.encode()
                for value, name in self._names.items()
            }
            self._in_bytes = re.compile(b"|".join(map(re.escape, self._bytes)))

    def joined(self, other: SecretMask) -> SecretMask:
        """Return a mask for the secrets of both."""
        if not other._names or other._names.items() <= self._names.items():
            return self
        both = SecretMask({})
        both._set(self._names | other._names)
        return both

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    def data(self, data: bytes) -> bytes:
        """Return raw bytes without secrets."""
        if self._pattern is None:
            return data
        return self._in_bytes.sub(lambda match: self._bytes[match[0]], data)

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """Return a piece of a longer text without secrets, and the end that cannot be told yet.

        Whoever puts that end in front of the next piece gets the same text, however it was cut.
        It is where a secret may have begun, so shorter than the longest, and mostly empty.
        """
        if self._pattern is None:
            return data, b""
        parts: list[bytes] = []
        done, held = 0, self._undecided(data, 0)
        match = self._in_bytes.search(data)
        while match is not None and match.start() < held:
            parts += (data[done : match.start()], self._bytes[match[0]])
            done = match.end()
            held = self._undecided(data, done) if done > held else held
            match = self._in_bytes.search(data, done)
        return b"".join((*parts, data[done:held])), data[held:]

    def _undecided(self, data: bytes, start: int) -> int:
        """Return where a secret may begin that ends after the data, else the data's length."""
        longest = max(map(len, self._bytes))
        for position in range(max(start, len(data) - longest + 1), len(data)):
            end = data[position:]
            if any(len(secret) > len(end) and secret.startswith(end) for secret in self._bytes):
                return position
        return len(data)

    def value(self, value: Any) -> Any:
        """Return JSON data without secrets; the same object when there are none to look for."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value


def mask_sensitive(value: Any) -> Any:
    """Return JSON data in which headers, keys and passwords are ``***``, told by their names.

    All that stands below such a name is masked. A reference such as ``${env.TOKEN}`` stays: it is
    a name, not a value.
    """
    return _mask(value, hide=False)


def _mask(value: Any, *, hide: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _mask(item, hide=hide or _is_secret(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_mask(item, hide=hide) for item in value]
    if not hide or value is None or isinstance(value, bool):
        return value
    return value if isinstance(value, str) and _REFERENCE.match(value) else _MASKED


def _is_secret(key: Any) -> bool:
    return isinstance(key, str) and _SENSITIVE.search(key) is not None
