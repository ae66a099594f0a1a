"""flowmesh: a plugin framework for ML workers.

The names below are the public API; each is loaded on first use, so that importing the package
stays cheap and never loads an ML library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, as type checkers and readers see them
    from flowmesh_core.answers import Answer as Answer
    from flowmesh_core.answers import build_item as build_item
    from flowmesh_core.answers import build_messages as build_messages
    from flowmesh_core.answers import build_result as build_result
    from flowmesh_core.answers import build_text as build_text
    from flowmesh_core.answers import build_vector_item as build_vector_item
    from flowmesh_core.answers import derive_seed as derive_seed
    from flowmesh_core.answers import normalize as normalize
    from flowmesh_core.artifacts.network import NetworkPolicy as NetworkPolicy
    from flowmesh_core.artifacts.network import build_client as build_client
    from flowmesh_core.artifacts.network import client_hooks as client_hooks
    from flowmesh_core.config import Settings as Settings
    from flowmesh_core.config import load_settings as load_settings
    from flowmesh_core.contract import CONTRACT_VERSION as CONTRACT_VERSION
    from flowmesh_core.contract import Destination as Destination
    from flowmesh_core.contract import Envelope as Envelope
    from flowmesh_core.contract import Task as Task
    from flowmesh_core.contract import parse_envelope as parse_envelope
    from flowmesh_core.contract import parse_message as parse_message
    from flowmesh_core.contract import parse_task as parse_task
    from flowmesh_core.errors import ArtifactError as ArtifactError
    from flowmesh_core.errors import CancelledError as CancelledError
    from flowmesh_core.errors import ConfigError as ConfigError
    from flowmesh_core.errors import ContractError as ContractError
    from flowmesh_core.errors import CrashError as CrashError
    from flowmesh_core.errors import DeadlineError as DeadlineError
    from flowmesh_core.errors import ExecutionError as ExecutionError
    from flowmesh_core.errors import ExecutorUnavailableError as ExecutorUnavailableError
    from flowmesh_core.errors import FlowmeshError as FlowmeshError
    from flowmesh_core.errors import InputError as InputError
    from flowmesh_core.errors import PluginError as PluginError
    from flowmesh_core.errors import ResourceError as ResourceError
    from flowmesh_core.errors import TransportError as TransportError
    from flowmesh_core.errors import UnknownTaskTypeError as UnknownTaskTypeError
    from flowmesh_core.errors import UploadError as UploadError
    from flowmesh_core.events import LogChunk as LogChunk
    from flowmesh_core.events import TaskEvent as TaskEvent
    from flowmesh_core.events import WorkerEvent as WorkerEvent
    from flowmesh_core.executor import API_VERSION as API_VERSION
    from flowmesh_core.executor import Artifact as Artifact
    from flowmesh_core.executor import Capability as Capability
    from flowmesh_core.executor import Executor as Executor
    from flowmesh_core.executor import ExecutorInfo as ExecutorInfo
    from flowmesh_core.executor import Outcome as Outcome
    from flowmesh_core.executor import RunContext as RunContext
    from flowmesh_core.hookspecs import hookimpl as hookimpl
    from flowmesh_core.inputs import AdapterRef as AdapterRef
    from flowmesh_core.inputs import FileRef as FileRef
    from flowmesh_core.inputs import Inputs as Inputs
    from flowmesh_core.inputs import ModelRef as ModelRef
    from flowmesh_core.inputs import Row as Row
    from flowmesh_core.inputs import RowSource as RowSource
    from flowmesh_core.masking import SecretMask as SecretMask
    from flowmesh_core.places.memory import available_memory_bytes as available_memory_bytes
    from flowmesh_core.plugins import PluginReport as PluginReport
    from flowmesh_core.plugins import extensions as extensions
    from flowmesh_core.plugins import load_driver as load_driver
    from flowmesh_core.plugins import load_plugins as load_plugins
    from flowmesh_core.registry import ExecutorRegistry as ExecutorRegistry
    from flowmesh_core.serving import ServeSettings as ServeSettings
    from flowmesh_core.serving import ask_status as ask_status
    from flowmesh_core.serving import check_host as check_host
    from flowmesh_core.serving import find_address as find_address
    from flowmesh_core.serving import hold_port as hold_port
    from flowmesh_core.serving import serve_result as serve_result
    from flowmesh_core.serving import served_model as served_model
    from flowmesh_core.serving import wait_until_answering as wait_until_answering
    from flowmesh_core.specs import Choice as Choice
    from flowmesh_core.specs import EmbeddingResult as EmbeddingResult
    from flowmesh_core.specs import EmbeddingSpec as EmbeddingSpec
    from flowmesh_core.specs import FilesBlock as FilesBlock
    from flowmesh_core.specs import InferenceItem as InferenceItem
    from flowmesh_core.specs import InferenceParams as InferenceParams
    from flowmesh_core.specs import InferenceResult as InferenceResult
    from flowmesh_core.specs import InferenceSpec as InferenceSpec
    from flowmesh_core.specs import Model as Model
    from flowmesh_core.specs import ServeParams as ServeParams
    from flowmesh_core.specs import ServeResult as ServeResult
    from flowmesh_core.specs import ServeSpec as ServeSpec
    from flowmesh_core.specs import TaskSpec as TaskSpec
    from flowmesh_core.specs import Usage as Usage
    from flowmesh_core.specs import refuse_fields as refuse_fields
    from flowmesh_core.telemetry.probes import GpuReader as GpuReader
    from flowmesh_core.validation import CommaSeparated as CommaSeparated
    from flowmesh_core.validation import StrictBlock as StrictBlock
    from flowmesh_core.worker import Worker as Worker

__version__ = "0.1.0"

_EXPORTS = {
    # Write an executor.
    "executor": (
        *("API_VERSION", "Artifact", "Capability", "Executor", "ExecutorInfo"),
        *("Outcome", "RunContext"),
    ),
    "hookspecs": ("hookimpl",),
    "inputs": ("AdapterRef", "FileRef", "Inputs", "ModelRef", "Row", "RowSource"),
    # Specs and results shared by engines.
    "specs": (
        *("Choice", "EmbeddingResult", "EmbeddingSpec", "FilesBlock", "InferenceItem"),
        *("InferenceParams", "InferenceResult", "InferenceSpec", "Model", "ServeParams"),
        *("ServeResult", "ServeSpec", "TaskSpec", "Usage", "refuse_fields"),
    ),
    # What engines of inference write alike.
    "answers": (
        *("Answer", "build_item", "build_messages", "build_result", "build_text"),
        *("build_vector_item", "derive_seed", "normalize"),
    ),
    # What engines of serve do alike.
    "serving": (
        *("ServeSettings", "ask_status", "check_host", "find_address", "hold_port"),
        *("serve_result", "served_model", "wait_until_answering"),
    ),
    # The task contract.
    "contract": (
        *("CONTRACT_VERSION", "Destination", "Envelope", "Task"),
        *("parse_envelope", "parse_message", "parse_task"),
    ),
    "events": ("LogChunk", "TaskEvent", "WorkerEvent"),
    "validation": ("CommaSeparated", "StrictBlock"),
    # The machine and the network around it.
    "places.memory": ("available_memory_bytes",),
    "telemetry.probes": ("GpuReader",),
    "artifacts.network": ("NetworkPolicy", "build_client", "client_hooks"),
    "masking": ("SecretMask",),
    # Errors.
    "errors": (
        *("ArtifactError", "CancelledError", "ConfigError", "ContractError", "CrashError"),
        *("DeadlineError", "ExecutionError", "ExecutorUnavailableError", "FlowmeshError"),
        *("InputError", "PluginError", "ResourceError", "TransportError"),
        *("UnknownTaskTypeError", "UploadError"),
    ),
    # Run a worker.
    "config": ("Settings", "load_settings"),
    "plugins": ("PluginReport", "extensions", "load_driver", "load_plugins"),
    "registry": ("ExecutorRegistry",),
    "worker": ("Worker",),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [*_HOME]  # noqa: PLE0604 - every entry is a string literal of _EXPORTS


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
