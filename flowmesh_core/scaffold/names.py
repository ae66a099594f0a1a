"""The names of a new distribution."""

from __future__ import annotations

import re

import attrs

from flowmesh_core import __version__
from flowmesh_core.errors import ConfigError
from flowmesh_core.importing import is_importable

__all__ = ["Names", "core_bounds", "parse_names"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)+\Z")
_TASK_TYPE = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)+\Z")
_LONGEST = 40  # what is written from a name stays within the lines of the formatter
_OURS = "flowmesh-"


@attrs.frozen(kw_only=True)
class Names:
    """What a distribution called ``acme-tts`` calls its parts.

    Attributes:
        name: The distribution, ``acme-tts``.
        package: What is imported, ``acme_tts``.
        executor: ``acme.tts``: the first word of the name is the vendor.
        task_type: What documents say.
        cls: What its classes begin with, ``AcmeTts``.
    """

    name: str
    package: str
    executor: str
    task_type: str
    cls: str


def parse_names(name: str, task_type: str = "") -> Names:
    """Check the name of a distribution and derive the others from it.

    Args:
        name: ``vendor-what``; the vendor stands first, or behind ``flowmesh-``.
        task_type: The executor's name by default.

    Raises:
        ConfigError: A name cannot be used; all faults in one sentence.
    """
    problems = _find_faults(name)
    if task_type and not _TASK_TYPE.match(task_type):
        problems.append(
            f"task type must be vendor.what in lower case, such as acme.tts, got {task_type!r}; "
            "the core's own, without a vendor, have specs that all their executors share"
        )
    if problems:
        raise ConfigError("; ".join(problems))
    own = name.removeprefix(_OURS)
    executor = own.replace("-", ".", 1)
    return Names(
        name=name,
        package=name.replace("-", "_"),
        executor=executor,
        task_type=task_type or executor,
        cls="".join(word.capitalize() for word in own.split("-")),
    )


def _find_faults(name: str) -> list[str]:
    if not _NAME.match(name.removeprefix(_OURS)) or len(name) > _LONGEST:
        return [
            "name must be vendor-what, such as acme-tts: two words or more of lower-case letters "
            f"and digits with dashes between, at most {_LONGEST} characters, got {name!r}"
        ]
    package = name.replace("-", "_")
    if is_importable(package):
        return [f"a package {package} is installed already; choose another name than {name!r}"]
    return []


def core_bounds() -> str:
    """Return the bounds that a plugin gives this core: its minor version."""
    major, minor = map(int, __version__.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"
