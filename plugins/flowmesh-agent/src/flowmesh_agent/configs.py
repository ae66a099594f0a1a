"""Named agents: ``<name>.yaml`` in the operator's folders, or one that comes with the plugin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from flowmesh_agent.spec import AgentBlock
from flowmesh_core import ConfigError, InputError

__all__ = ["MAX_BYTES", "SHIPPED", "list_agents", "read_agent"]

SHIPPED = Path(__file__).with_name("agents")
MAX_BYTES = 2**18
MAX_DEPTH = 64


def list_agents(folders: Sequence[Path]) -> list[str]:
    """Return the names of all agents that there are."""
    return sorted({path.stem for folder in (*folders, SHIPPED) for path in folder.glob("*.yaml")})


def read_agent(name: str, folders: Sequence[Path]) -> AgentBlock:
    """Read an agent from the first folder that has it.

    ``${env.NAME}`` in keys and headers stands for a variable ``FLOWMESH_AGENT_...``.

    Args:
        name: A plain name, as ``AgentSpec.config_name`` is.
        folders: The operator's; those of the plugin come last.

    Raises:
        InputError: None has it.
        ConfigError: The file is no agent.
    """
    for folder in (*folders, SHIPPED):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return _read(path)
    raise InputError(
        f"spec.configName: this worker has no agent {name!r}; it has"
        f" {', '.join(list_agents(folders))} (FLOWMESH_AGENT_CONFIGS)"
    )


def _read(path: Path) -> AgentBlock:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"agent {path} must not be larger than {MAX_BYTES} bytes")
        _check_shape(data, path)
        environ = os.environ  # noqa: TID251 - the operator's file names variables of its own
        return AgentBlock.model_validate(yaml.safe_load(data) or {}, context={"environ": environ})
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"agent {path} cannot be read: {exc}") from exc
    except ValidationError as exc:
        raise ConfigError(f"agent {path}: {'; '.join(_problems(exc))}") from None


def _check_shape(data: bytes, path: Path) -> None:
    """Refuse what would stand for more than memory or the stack holds."""
    depth = 0
    for event in yaml.parse(data, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"agent {path} must not use aliases (*name)")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"agent {path} must not nest deeper than {MAX_DEPTH} levels")


def _problems(error: ValidationError) -> Iterable[str]:
    for item in error.errors(include_url=False, include_input=False):
        where = ".".join(map(str, item["loc"]))
        yield f"{where} {item['msg']}".strip()
