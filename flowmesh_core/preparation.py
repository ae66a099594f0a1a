"""From a task to what its place is given: secrets put in, spec checked, inputs gathered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.artifacts.fetch import Fetcher
from flowmesh_core.config import (
    Settings,
    load_plugin_settings,
    plugin_variables,
    read_environment,
)
from flowmesh_core.contract import Task
from flowmesh_core.errors import PluginError
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target
from flowmesh_core.inputs import Inputs, hub_cache_folder, resolve_inputs
from flowmesh_core.masking import SecretMask
from flowmesh_core.places.base import Place, PlaceContext
from flowmesh_core.plugins import Plugins, load_driver
from flowmesh_core.registry import ExecutorRegistry
from flowmesh_core.templates import render_env
from flowmesh_core.validation import as_model, validate_model
from flowmesh_core.wire import encode_json

__all__ = ["Preparation"]


class Preparation:
    """Prepares tasks for their places, which it makes when they are first needed.

    Args:
        settings: The operator's allow-lists.
        plugins: For model sources.
        registry: Knows in which places an executor may run.
        fetcher: Downloads and unpacks.
        places: What places are told about the worker.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        registry: ExecutorRegistry,
        fetcher: Fetcher,
        *,
        places: PlaceContext,
    ) -> None:
        self._settings = settings
        self._plugins = plugins
        self._registry = registry
        self._fetcher = fetcher
        self._place_context = places
        self._places: dict[str, Place] = {}
        self._models: dict[str, Any] = {}
        self._plugin_settings: dict[str, Any] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}

    def put_secrets_in(self, task: Task) -> tuple[Mapping[str, Any], SecretMask]:
        """Return the spec with the variables that it names, and what hides them again.

        Raises:
            ContractError: A variable is not set, or the operator does not allow it.
        """
        if b"${" not in encode_json(task.spec):  # most documents name none; this look is cheap
            return task.spec, SecretMask({})
        spec: Any
        spec, secrets = render_env(task.spec, self._settings.env_allow, read_environment())
        return spec, SecretMask(secrets)

    def check_spec(self, info: ExecutorInfo, task: Task, spec: Mapping[str, Any]) -> Any:
        """Return what the executor's model makes of a spec, before anything is loaded.

        The model of another environment is not at hand: its spec stays plain data.
        """
        if not info.spec or info.environment:
            return spec
        if info.name not in self._models:
            self._models[info.name] = as_model(import_target(info.spec), info.spec)
        where = f"task {task.task_id}"
        return validate_model(self._models[info.name], spec, where=where, prefix="spec")

    async def gather(
        self, info: ExecutorInfo, task: Task, spec: Mapping[str, Any], folder: Path
    ) -> Inputs:
        """Bring what the executor wants of a task's inputs; cannot be stopped on its way."""
        if not (info.inputs or info.models):
            return Inputs()
        environ = read_environment()
        return await asyncio.to_thread(
            resolve_inputs,
            attrs.evolve(task, spec=spec),
            info.inputs,
            models=info.models,
            fetcher=self._fetcher,
            folder=folder,
            sources=self._plugins.model_sources(),
            trust_remote_code=self._settings.trust_remote_code,
            default_identifier=environ.get(info.default_model) if info.default_model else None,
            hub_cache=hub_cache_folder(environ),
            offline=self._settings.hub_offline,
        )

    def settings_for(self, info: ExecutorInfo) -> Any:
        """Return the executor's own settings; None for one of another environment."""
        if info.environment:  # its model is read where it can be imported
            return None
        if info.settings and info.name not in self._plugin_settings:
            model = import_target(info.settings)
            self._plugin_settings[info.name] = load_plugin_settings(model, plugin=info.name)
            self._aliases[info.name] = plugin_variables(model, plugin=info.name)
        return self._plugin_settings.get(info.name)

    def variables_for(self, info: ExecutorInfo) -> tuple[str, ...]:
        """Return the environment variables that the executor's process keeps."""
        self.settings_for(info)
        return (*info.variables, *self._aliases.get(info.name, ()))

    def find_place(self, info: ExecutorInfo) -> tuple[str, Place]:
        """Return the first of the executor's places that is installed, with its name.

        Raises:
            PluginError: None is.
        """
        problems = []
        for name in self._registry.places(info):
            if name in self._places:
                return name, self._places[name]
            try:
                driver = load_driver("flowmesh.places", name)
            except PluginError as exc:
                problems.append(str(exc))
                continue
            place: Place = driver(self._place_context)
            return name, self._places.setdefault(name, place)
        raise PluginError(f"executor {info.name!r} can run in none of its places: {problems}")

    async def close(self) -> None:
        """Unload every engine."""
        for place in self._places.values():
            await place.close()
