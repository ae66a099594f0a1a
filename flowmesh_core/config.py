"""Every environment variable, read here and nowhere else.

``Settings`` lists them with parser and default; ``docs/configuration.md`` describes each. A value
that cannot be read is an error that names the variable, the value and what was expected.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import attrs

from flowmesh_core.errors import ConfigError
from flowmesh_core.quantities import parse_duration_s, parse_size_bytes

if TYPE_CHECKING:  # pydantic would cost `flowmesh plugins list` its start time
    from pydantic import BaseModel

__all__ = [
    "Settings",
    "child_environment",
    "load_plugin_settings",
    "load_settings",
    "plugin_variables",
    "read_environment",
]

ModelT = TypeVar("ModelT", bound="BaseModel")
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_WORKER_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY")
# What every child keeps.
_CHILD_NAMES = frozenset(
    [
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "TOKENIZERS_PARALLELISM"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    ]
)
_CHILD_PREFIXES = (
    *("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "HIP_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("OPENBLAS_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "TRITON_"),
)
_PYTHON_NAMES = frozenset(["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"])


class _UnreadableError(Exception):
    """Carries what was expected, to be put beside the variable's name and value."""


def _text(raw: str) -> str:
    return raw


def _flag(raw: str) -> bool:
    word = raw.strip().lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise _UnreadableError("one of 1, true, yes, on, 0, false, no, off")


def _cleanup_flag(raw: str) -> bool:
    """Any text but a negative one means yes: that is how the earlier worker reads it."""
    return raw.strip().lower() not in _FALSE


def _number(*, above: float = -math.inf, least: float = -math.inf) -> Callable[[str], float]:
    bound = f" above {above:g}" if above > -math.inf else ""
    bound += f" of at least {least:g}" if least > -math.inf else ""

    def parse(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and value > above and value >= least:
            return value
        raise _UnreadableError(f"a number{bound}")

    return parse


def _duration_s(raw: str) -> float:
    try:
        return parse_duration_s(raw)
    except ValueError as exc:
        raise _UnreadableError(str(exc)) from None


def _size_bytes(raw: str) -> int:
    try:
        return parse_size_bytes(raw)
    except ValueError as exc:
        raise _UnreadableError(str(exc)) from None


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f"a whole number of at least {least}" if most is None else f"{least} to {most}"

    def parse(raw: str) -> int:
        try:
            value = int(raw)
        except ValueError:
            raise _UnreadableError(expected) from None
        if value < least or (most is not None and value > most):
            raise _UnreadableError(expected)
        return value

    return parse


def _milliseconds(raw: str) -> float:
    """Read milliseconds as seconds."""
    return _number(least=0)(raw) / 1000


def _names(raw: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in raw.split(",") if part.strip()))


def _folders(raw: str) -> tuple[Path, ...]:
    paths = tuple(_folder(part) for part in raw.split(os.pathsep) if part)
    if all(path.is_absolute() for path in paths):
        return paths
    raise _UnreadableError(f"absolute folders separated by {os.pathsep!r}")


def _folder(raw: str) -> Path:
    try:
        return Path(raw).expanduser()
    except RuntimeError:
        raise _UnreadableError("a folder; ~ must name a user of this machine") from None


def _plain_name(raw: str) -> str:
    if _WORKER_ID.match(raw):
        return raw
    raise _UnreadableError("a plain name: letters, digits, '-', '_', '.', not starting with '.'")


def _redis_url(raw: str) -> str:
    if _scheme(raw) in ("redis", "rediss", "unix"):
        return raw
    raise _UnreadableError("a redis://, rediss:// or unix:// URL")


def _http_url(raw: str) -> str:
    if _scheme(raw) in ("http", "https") and urlsplit(raw).hostname:
        return raw.rstrip("/")
    raise _UnreadableError("an http:// or https:// URL")


def _scheme(raw: str) -> str:
    """Return the URL's scheme, empty when it cannot be split or its port is no port."""
    try:
        parts = urlsplit(raw)
        return parts.scheme if parts.port != 0 else ""
    except ValueError:
        return ""


def _without_login(url: str) -> str:
    """Return the URL with what stands before its last ``@`` hidden."""
    return f"***{url[url.rindex('@') :]}" if "@" in url else url


def _show_url(url: str | None) -> str:
    return repr(url and _without_login(url))


def _log_level(raw: str) -> str:
    level = raw.strip().upper()
    if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        return level
    raise _UnreadableError("DEBUG, INFO, WARNING, ERROR or CRITICAL")


def _preferences(raw: str) -> Mapping[str, tuple[str, ...]]:
    """Read ``inference=vllm,llamacpp;sft=trl`` as ranks per task type."""
    ranks: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (piece.strip() for piece in raw.split(";"))):
        task_type, equals, executors = part.partition("=")
        if not equals or not task_type.strip() or not _names(executors):
            raise _UnreadableError("TYPE=EXECUTOR[,EXECUTOR...] separated by ';'")
        ranks[task_type.strip()] = _names(executors)
    return ranks


def _var(
    name: str,
    parse: Callable[[str], Any],
    default: Any = None,
    *,
    factory: Any = None,
    show: Any = True,
) -> Any:
    metadata = {"variable": name, "parse": parse}
    if factory is not None:
        return attrs.field(factory=factory, metadata=metadata, repr=show)
    return attrs.field(default=default, metadata=metadata, repr=show)


def _default_results_dir() -> Path:
    return Path("results_workers")


def _random_worker_id() -> str:
    return secrets.token_hex(8)


@attrs.frozen(kw_only=True)
class Settings:
    """All settings of a worker; a field's metadata names its variable."""

    # Names and channels.
    redis_url: str = _var("REDIS_URL", _redis_url, "redis://localhost:6379/0", show=_show_url)
    task_topic: str = _var("TASK_TOPIC", _text, "tasks")
    transport: str = _var("FLOWMESH_TRANSPORT", _text, "redis_pubsub")
    worker_id: str = _var("WORKER_ID", _plain_name, factory=_random_worker_id)
    worker_tags: tuple[str, ...] = _var("WORKER_TAGS", _names, ())
    # Beat, cost, network.
    heartbeat_interval_s: float = _var("HEARTBEAT_INTERVAL_SEC", _number(above=0), 30.0)
    cost_per_hour: float = _var("WORKER_COST_PER_HOUR", _number(least=0), 1.0)
    network_bandwidth_bytes_per_s: float | None = _var(
        "WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC", _number(above=0)
    )
    metrics_port: int | None = _var("METRICS_PORT", _whole(0, 65535))
    visible_devices: str | None = _var("CUDA_VISIBLE_DEVICES", _text)
    # Results and logs.
    results_dir: Path = _var(  # noqa: RUF009 - it makes a field
        "RESULTS_DIR", _folder, factory=_default_results_dir
    )
    allowed_dirs: tuple[Path, ...] = _var("FLOWMESH_ALLOWED_DIRS", _folders, ())
    hub_offline: bool = _var("HF_HUB_OFFLINE", _flag, False)
    trust_remote_code: bool = _var("FLOWMESH_TRUST_REMOTE_CODE", _flag, False)
    fsync: bool = _var("FLOWMESH_FSYNC", _flag, False)
    log_level: str = _var("LOG_LEVEL", _log_level, "INFO")
    log_max_bytes: int = _var("FLOWMESH_LOG_MAX_BYTES", _whole(1024), 5_242_880)
    log_backups: int = _var("FLOWMESH_LOG_BACKUPS", _whole(0), 5)
    gc_older_than_s: float | None = _var("FLOWMESH_GC_OLDER_THAN", _duration_s)
    gc_max_bytes: int | None = _var("FLOWMESH_GC_MAX_SIZE", _size_bytes)
    # Work.
    max_concurrent_tasks: int = _var("MAX_CONCURRENT_TASKS", _whole(1), 1)
    task_timeout_s: float | None = _var("TASK_TIMEOUT", _number(above=0))
    drain_timeout_s: float = _var("FLOWMESH_DRAIN_TIMEOUT_S", _number(least=0), 30.0)
    cancel_grace_s: float = _var("FLOWMESH_CANCEL_GRACE_S", _number(least=0), 5.0)
    group_window_s: float = _var("FLOWMESH_GROUP_WINDOW_MS", _milliseconds, 0.0)
    group_max: int = _var("FLOWMESH_GROUP_MAX", _whole(1), 32)
    warm_max: int = _var("FLOWMESH_WARM_MAX", _whole(0), 4)
    warm_idle_s: float = _var("FLOWMESH_WARM_IDLE_S", _number(least=0), 600.0)
    task_log_max_bytes: int = _var("FLOWMESH_TASK_LOG_MAX_BYTES", _whole(1024), 1 << 30)
    executor_preferences: Mapping[str, tuple[str, ...]] = _var(
        "FLOWMESH_PREFER", _preferences, factory=dict
    )
    # Orchestrator, secrets, network policy.
    orchestrator_base_url: str | None = _var("ORCHESTRATOR_BASE_URL", _http_url, show=_show_url)
    orchestrator_token: str | None = _var("ORCHESTRATOR_TOKEN", _text, show=False)
    env_allow: tuple[str, ...] = _var("FLOWMESH_ENV_ALLOW", _names, ())
    http_allow: tuple[str, ...] = _var("FLOWMESH_HTTP_ALLOW", _names, ())
    upload_optional: bool = _var("FLOWMESH_UPLOAD_OPTIONAL", _flag, False)
    delivery_retries: int = _var("FLOWMESH_DELIVERY_RETRIES", _whole(0), 5)
    # Downloads.
    cache_dir: Path | None = _var("FLOWMESH_CACHE_DIR", _folder)  # noqa: RUF009 - it makes a field
    cache_max_bytes: int = _var("FLOWMESH_CACHE_MAX_BYTES", _whole(1), 20 << 30)
    # Results of deterministic tasks.
    result_cache: Path | None = _var("FLOWMESH_RESULT_CACHE", _folder)  # noqa: RUF009 - as above
    result_cache_max_bytes: int = _var("FLOWMESH_RESULT_CACHE_MAX_BYTES", _whole(1), 1 << 30)
    # Plugins.
    only_plugins: tuple[str, ...] = _var("FLOWMESH_ONLY_PLUGINS", _names, ())
    disable_plugins: tuple[str, ...] = _var("FLOWMESH_DISABLE_PLUGINS", _names, ())
    strict_plugins: bool = _var("FLOWMESH_STRICT_PLUGINS", _flag, False)
    plugin_timeout_s: float = _var("FLOWMESH_PLUGIN_TIMEOUT_S", _number(least=0), 10.0)
    trace_hooks: bool = _var("FLOWMESH_TRACE_HOOKS", _flag, False)
    envs_dir: Path | None = _var("FLOWMESH_ENVS", _folder)  # noqa: RUF009 - it makes a field
    # Archives of models.
    archive_use_pigz: bool = _var("MODEL_ARCHIVE_USE_PIGZ", _flag, False)
    archive_level: int | None = _var("MODEL_ARCHIVE_COMPRESSION_LEVEL", _whole(0, 9))
    archive_pigz_threads: int | None = _var("MODEL_ARCHIVE_PIGZ_THREADS", _whole(1))
    archive_pigz_bin: str = _var("MODEL_ARCHIVE_PIGZ_BIN", _text, "pigz")
    archive_tar_bin: str = _var("MODEL_ARCHIVE_TAR_BIN", _text, "tar")
    cleanup_after_upload: bool = _var("MODEL_CLEANUP_AFTER_UPLOAD", _cleanup_flag, False)

    @property
    def heartbeat_ttl_s(self) -> int:
        """Seconds for which the heartbeat key outlives the last beat."""
        return int(max(4 * self.heartbeat_interval_s, 120))


def read_environment() -> Mapping[str, str]:
    """Return the process environment; the only reader of it."""
    return os.environ


def child_environment(
    *,
    plugin: str,
    variables: Sequence[str] = (),
    devices: Sequence[str] = (),
    foreign: bool = False,
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of a child process that runs an executor.

    It gets what programs and numeric libraries need, what the executor declares and its own
    settings; never the worker's secrets, unless the executor declares them by their whole name.

    Args:
        plugin: Name of the executor, whose settings begin with ``FLOWMESH_<PLUGIN>_``.
        variables: Names that it declares; ``NAME_*`` stands for all that begin so, ``NAME=value``
            gives one a value unless it has one.
        devices: GPUs that it may see, for ``CUDA_VISIBLE_DEVICES``.
        foreign: It has another Python: what points to this one's packages is left out.
        environ: To be chosen from; this process's by default.
    """
    defaults = dict(name.split("=", 1) for name in variables if "=" in name)
    source = {**defaults, **(read_environment() if environ is None else environ)}
    exact = {*_CHILD_NAMES, *variables, *defaults} | (set() if foreign else _PYTHON_NAMES)
    begins = (*_CHILD_PREFIXES, *(name[:-1] for name in variables if name.endswith("*")))
    own = f"FLOWMESH_{_owner(plugin)}_"
    kept = {
        name: value
        for name, value in source.items()
        if name in exact
        or name.startswith(own)
        or (name.startswith(begins) and not _SECRET.search(name))
    }
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return kept | visible


def load_settings(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Build the settings from the environment; overrides are field names and win.

    Raises:
        ConfigError: Naming every variable that cannot be read.
    """
    source = read_environment() if environ is None else environ
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in attrs.fields(Settings):
        name = field.metadata["variable"]
        raw = source.get(name)
        # An empty CUDA_VISIBLE_DEVICES hides every GPU; elsewhere empty means unset.
        if field.name in overrides or raw is None or (not raw and name != "CUDA_VISIBLE_DEVICES"):
            continue
        try:
            values[field.name] = field.metadata["parse"](raw)
        except _UnreadableError as exc:
            problems.append(f"{name} must be {exc}, got {_shown(name, raw)}")
    if problems:
        raise ConfigError("; ".join(problems))
    return Settings(**{"envs_dir": _default_envs_dir(source), **values, **overrides})


def _default_envs_dir(environ: Mapping[str, str]) -> Path | None:
    """Return where a user's environments lie; None for a process without a home."""
    data = Path(environ.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():  # the specification has such a value ignored
        if not environ.get("HOME"):
            return None
        data = Path(environ["HOME"], ".local", "share")
    return data / "flowmesh" / "envs"


def _shown(variable: str, raw: str) -> str:
    if _SECRET.search(variable):
        return "***"
    return repr(_without_login(raw) if "URL" in variable else raw)


def load_plugin_settings(
    model: type[ModelT], *, plugin: str, environ: Mapping[str, str] | None = None
) -> ModelT:
    """Fill a plugin's own settings model from the environment.

    A field ``threads`` of plugin ``llamacpp`` is read from ``FLOWMESH_LLAMACPP_THREADS``; a field
    with an alias in capitals is read from the variable of that name. Empty means unset.

    Raises:
        ConfigError: Naming every variable that cannot be read.
    """
    from pydantic import ValidationError  # noqa: PLC0415 - see the import block

    source = read_environment() if environ is None else environ
    variables = {_key_of(model, f): _variable_of(model, f, plugin) for f in model.model_fields}
    found = {key: source[name] for key, name in variables.items() if source.get(name)}
    try:
        return model.model_validate(found)
    except ValidationError as exc:
        problems = [
            _describe(dict(item), plugin, variables, source)
            for item in exc.errors(include_url=False)
        ]
        raise ConfigError("; ".join(problems)) from None


def plugin_variables(model: type[BaseModel], *, plugin: str) -> tuple[str, ...]:
    """Return the variables from which ``load_plugin_settings`` fills a model."""
    return tuple(_variable_of(model, field, plugin) for field in model.model_fields)


def _describe(
    item: Mapping[str, Any],
    plugin: str,
    variables: Mapping[str, str],
    source: Mapping[str, str],
) -> str:
    variable = variables.get(str(item["loc"][0])) if item["loc"] else None
    text = item["msg"].replace("Input should be", "must be", 1).removeprefix("Value error, ")
    if variable is None:  # a rule about several fields
        return f"settings of plugin {plugin}: {text}"
    if item["type"] == "missing":
        return f"{variable} is required"
    return f"{variable} {text}, got {_shown(variable, source.get(variable, ''))}"


def _key_of(model: type[BaseModel], field: str) -> str:
    """Return the name under which the model takes the field."""
    alias = model.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else field


def _variable_of(model: type[BaseModel], field: str, plugin: str) -> str:
    key = _key_of(model, field)
    if key != field and key.isupper():
        return key
    return f"FLOWMESH_{_owner(plugin)}_{field.upper()}"


def _owner(plugin: str) -> str:
    return re.sub(r"\W", "_", plugin).upper()
