"""Types of single fields that the specs share: addresses, names, keys and texts."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

__all__ = [
    "Collection",
    "Count",
    "Fields",
    "Secret",
    "Text",
    "Texts",
    "TimeoutS",
    "Url",
    "check_text",
]

# What a URL's path, a folder's name and a Qdrant collection all can be.
_COLLECTION = re.compile(r'[^<>:"/\\|?*#%\x00-\x20\x7f.][^<>:"/\\|?*#%\x00-\x1f\x7f]*')
_VISIBLE = re.compile(r"[!-~]+")
_NO_URL = "must be an http:// or https:// URL of visible ASCII characters"
_SHELL_NAME = re.compile(r"\$\{([A-Za-z_]\w*)\}")


def _check_url(value: str) -> str:
    """Accept the base address of a service; messages never show what may be a password."""
    try:
        parts = urlsplit(value)
        reachable = bool(parts.hostname) and parts.port != 0 and _VISIBLE.fullmatch(value)
    except ValueError:
        raise ValueError(_NO_URL) from None
    if parts.scheme not in ("http", "https") or not reachable:
        raise ValueError(_NO_URL)
    if "@" in parts.netloc:
        raise ValueError("must not hold a user or a password; put the key into api_key")
    if parts.query or parts.fragment:
        raise ValueError("must end with its path, without ? and #")
    return value


def _check_collection(value: str) -> str:
    if not _COLLECTION.fullmatch(value) or len(value.encode()) > 200:
        raise ValueError(
            "must be a name of at most 200 bytes that does not begin with a dot or a blank,"
            ' without any of <>:"/\\|?*#%'
        )
    return value


def _check_secret(value: object) -> object:
    """Refuse what no key can be; pydantic's own messages would show the value."""
    if not isinstance(value, (str, SecretStr)):
        raise ValueError("must be a string; put it into quotes")  # noqa: TRY004 - pydantic's way
    text = value if isinstance(value, str) else value.get_secret_value()
    if match := _SHELL_NAME.fullmatch(text):
        raise ValueError(
            f"must be spelled ${{env.{match[1]}}} to mean the worker's variable {match[1]}"
        )
    if not _VISIBLE.fullmatch(text):
        raise ValueError("must be visible ASCII characters without blanks or a line end")
    return value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def check_text(value: str) -> str:
    """Refuse what has no visible character."""
    if not value.strip():
        raise ValueError("must not be blank")
    return value


def _check_fields(value: object) -> object:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    if not (isinstance(value, bool) or names):
        raise ValueError("must be true, false or a list of field names")
    return value


Url = Annotated[str, AfterValidator(_check_url)]
Collection = Annotated[str, AfterValidator(_check_collection)]
Secret = Annotated[SecretStr, BeforeValidator(_check_secret, json_schema_input_type=str)]
Text = Annotated[str, AfterValidator(check_text)]
Texts = Annotated[list[Text], BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])]
Fields = Annotated[
    bool | list[str], BeforeValidator(_check_fields, json_schema_input_type=bool | list[str])
]
TimeoutS = Annotated[float, Field(gt=0, le=3600)]
Count = Annotated[int, Field(ge=1)]
