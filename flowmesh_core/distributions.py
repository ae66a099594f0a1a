"""What installers left: versions of distributions, what they require, where the core came from."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
    version,
)
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flowmesh_core import __version__
from flowmesh_core.errors import PluginError

__all__ = ["code_version", "core_requirement", "installed_version", "unmet_requirements"]

_CORE = "flowmesh-core"


@functools.cache
def installed_version(name: str) -> str:
    """Return the version of a distribution, or of the one that a package is imported from.

    Empty when none is installed.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        found = packages_distributions().get(name)
        return version(found[0]) if found else ""


def code_version(target: str) -> str:
    """Return what tells the code of ``package.module:Name`` from any other.

    Returns:
        The version of its distribution, else the digest of its single file; empty when there is
        neither.
    """
    module = target.partition(":")[0]
    if known := installed_version(module.partition(".")[0]):
        return known
    file = getattr(sys.modules.get(module), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def core_requirement() -> list[str]:
    """Return what an installer must be given for a core that goes with this one.

    The folder or wheel that this one came from, as long as it is there; else a version of the
    same minor.
    """
    told = json.loads(distribution(_CORE).read_text("direct_url.json") or "{}")
    path = Path(unquote(urlsplit(told.get("url", "")).path))
    if urlsplit(told.get("url", "")).scheme == "file" and path.exists():
        editable = told.get("dir_info", {}).get("editable")
        return ["--editable", str(path)] if editable else [str(path)]
    return [f"{_CORE}~={__version__.partition('+')[0]}"]


def unmet_requirements(name: str) -> tuple[str, ...]:
    """Return what a distribution requires, extras aside, and what is installed instead.

    Raises:
        PluginError: That cannot be told; it says what could not be looked at.
    """
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - rarely

    try:
        required = [Requirement(text) for text in distribution(name).requires or ()]
    except PackageNotFoundError:
        raise PluginError(f"cannot be told: the metadata of {name} cannot be found") from None
    except InvalidRequirement as exc:
        told = " ".join(str(exc).split())
        raise PluginError(f"cannot be told: the metadata of {name}: {told}") from None
    here = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    found = {each: installed_version(each.name) for each in here}
    return tuple(
        f"requires {each}, {version or 'nothing'} is installed"
        for each, version in found.items()
        if not version or not each.specifier.contains(version, prereleases=True)
    )
