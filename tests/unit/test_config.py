"""Settings: every variable with its default, a good value and a bad one, and its documentation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from pydantic import BaseModel, Field, SecretStr, model_validator

from flowmesh_core.config import (
    Settings,
    child_environment,
    load_plugin_settings,
    load_settings,
    read_environment,
)
from flowmesh_core.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
NUMBER = "a whole number of at least"
FLAG = "one of 1, true, yes, on, 0, false, no, off"
URLS = "a redis://, rediss:// or unix:// URL"
NAME = "a plain name: letters, digits, '-', '_', '.', not starting with '.'"
LEVELS = "DEBUG, INFO, WARNING, ERROR or CRITICAL"
RANKS = "TYPE=EXECUTOR[,EXECUTOR...] separated by ';'"
HTTP = "an http:// or https:// URL"

# variable, field, default, {raw: value}, {bad raw: expectation}
TABLE: list[tuple[str, str, Any, dict[str, Any], dict[str, str]]] = [
    ("REDIS_URL", "redis_url", "redis://localhost:6379/0",
     {"rediss://h:1/2": "rediss://h:1/2", "unix:///run/r.sock": "unix:///run/r.sock"},
     {"localhost:6379": URLS, "http://h": URLS, "redis://[x": URLS, "redis://h:x": URLS}),
    ("TASK_TOPIC", "task_topic", "tasks", {"other": "other"}, {}),
    ("FLOWMESH_TRANSPORT", "transport", "redis_pubsub", {"local": "local"}, {}),
    ("WORKER_ID", "worker_id", ..., {"gpu-1.rack_2": "gpu-1.rack_2", "a" * 128: "a" * 128},
     {"../x": NAME, ".x": NAME, "a b": NAME, "a" * 129: NAME, "é": NAME, "a\n": NAME}),
    ("WORKER_TAGS", "worker_tags", (), {"a, b,,a ,c": ("a", "b", "c"), " , ": ()}, {}),
    ("HEARTBEAT_INTERVAL_SEC", "heartbeat_interval_s", 30.0, {"5": 5.0, "0.5": 0.5},
     dict.fromkeys(["0", "-1", "often", "nan", "inf"], "a number above 0")),
    ("WORKER_COST_PER_HOUR", "cost_per_hour", 1.0, {"0": 0.0, "2.5": 2.5},
     dict.fromkeys(["-0.1", "free", "nan"], "a number of at least 0")),
    ("WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC", "network_bandwidth_bytes_per_s", None,
     {"1e9": 1e9}, dict.fromkeys(["0", "fast"], "a number above 0")),
    ("METRICS_PORT", "metrics_port", None, {"2112": 2112, "0": 0},
     dict.fromkeys(["-1", "65536", "x", "1.5", "1" * 5000], "0 to 65535")),
    ("CUDA_VISIBLE_DEVICES", "visible_devices", None, {"0,2": "0,2", "": ""}, {}),
    ("RESULTS_DIR", "results_dir", Path("results_workers"),
     {"/data/x": Path("/data/x"), "~/x": Path.home() / "x", "x": Path("x")},
     {"~no-such-user/x": "a folder; ~ must name a user of this machine"}),
    ("FLOWMESH_ALLOWED_DIRS", "allowed_dirs", (),
     {"/a:/b": (Path("/a"), Path("/b")), "~:": (Path.home(),)},
     {"a:/b": "absolute folders separated by ':'",
      "~no-such-user": "a folder; ~ must name a user of this machine"}),
    ("HF_HUB_OFFLINE", "hub_offline", False, {"1": True}, {"maybe": FLAG}),
    ("FLOWMESH_TRUST_REMOTE_CODE", "trust_remote_code", False, {"yes": True}, {"2": FLAG}),
    ("FLOWMESH_FSYNC", "fsync", False, {"On": True, " TRUE ": True, "off": False, "No": False},
     {"sometimes": FLAG}),
    ("LOG_LEVEL", "log_level", "INFO", {"debug": "DEBUG", " Error ": "ERROR"},
     {"loud": LEVELS, "10": LEVELS}),
    ("FLOWMESH_LOG_MAX_BYTES", "log_max_bytes", 5_242_880, {"1024": 1024, "1_000_000": 10**6},
     {"1023": f"{NUMBER} 1024", "5MB": f"{NUMBER} 1024"}),
    ("FLOWMESH_LOG_BACKUPS", "log_backups", 5, {"0": 0}, {"-1": f"{NUMBER} 0"}),
    ("FLOWMESH_GC_OLDER_THAN", "gc_older_than_s", None, {"7d": 604_800.0, "90s": 90.0},
     dict.fromkeys(("7", "-1d"), "a number with its unit, such as 90s, 30m, 12h, 7d or 2w")),
    ("FLOWMESH_GC_MAX_SIZE", "gc_max_bytes", None, {"1KiB": 1024, "5": 5},
     {"big": "a size, such as 500MiB, 50GiB, 2T or a number of bytes"}),
    ("MAX_CONCURRENT_TASKS", "max_concurrent_tasks", 1, {"8": 8}, {"0": f"{NUMBER} 1"}),
    ("TASK_TIMEOUT", "task_timeout_s", None, {"60": 60.0},
     dict.fromkeys(["0", "inf"], "a number above 0")),
    ("FLOWMESH_DRAIN_TIMEOUT_S", "drain_timeout_s", 30.0, {"0": 0.0},
     {"-1": "a number of at least 0"}),
    ("FLOWMESH_CANCEL_GRACE_S", "cancel_grace_s", 5.0, {"0": 0.0},
     dict.fromkeys(["-1", "soon"], "a number of at least 0")),
    ("FLOWMESH_GROUP_WINDOW_MS", "group_window_s", 0.0, {"50": 0.05, "0": 0.0},
     dict.fromkeys(["-1", "soon"], "a number of at least 0")),
    ("FLOWMESH_GROUP_MAX", "group_max", 32, {"1": 1}, {"0": f"{NUMBER} 1"}),
    ("FLOWMESH_WARM_MAX", "warm_max", 4, {"0": 0, "9": 9},
     dict.fromkeys(["-1", "1.5"], f"{NUMBER} 0")),
    ("FLOWMESH_WARM_IDLE_S", "warm_idle_s", 600.0, {"0": 0.0, "1.5": 1.5},
     dict.fromkeys(["-1", "x"], "a number of at least 0")),
    ("FLOWMESH_TASK_LOG_MAX_BYTES", "task_log_max_bytes", 1 << 30, {"1024": 1024},
     {"1023": f"{NUMBER} 1024"}),
    ("FLOWMESH_PREFER", "executor_preferences", {},
     {"inference=vllm, llamacpp; sft = trl;": {"inference": ("vllm", "llamacpp"),
                                               "sft": ("trl",)}, ";": {}},
     dict.fromkeys(["vllm", "inference=", "=vllm", "a=b;c"], RANKS)),
    ("ORCHESTRATOR_BASE_URL", "orchestrator_base_url", None,
     {"https://h:8000/": "https://h:8000", "http://h/x": "http://h/x"},
     dict.fromkeys(["host:8000", "http://", "ftp://h", "http://[x", "http://h:x"], HTTP)),
    ("ORCHESTRATOR_TOKEN", "orchestrator_token", None, {"s3cret": "s3cret"}, {}),
    ("FLOWMESH_ENV_ALLOW", "env_allow", (), {"A,B": ("A", "B")}, {}),
    ("FLOWMESH_HTTP_ALLOW", "http_allow", (), {"a.b,*.c.d": ("a.b", "*.c.d")}, {}),
    ("FLOWMESH_UPLOAD_OPTIONAL", "upload_optional", False, {"1": True, "off": False},
     {"maybe": FLAG}),
    ("FLOWMESH_DELIVERY_RETRIES", "delivery_retries", 5, {"0": 0}, {"many": f"{NUMBER} 0"}),
    ("FLOWMESH_CACHE_DIR", "cache_dir", None, {"/data/c": Path("/data/c")},
     {"~no-such-user": "a folder; ~ must name a user of this machine"}),
    ("FLOWMESH_CACHE_MAX_BYTES", "cache_max_bytes", 20 << 30, {"1": 1}, {"0": f"{NUMBER} 1"}),
    ("FLOWMESH_RESULT_CACHE", "result_cache", None, {"/data/r": Path("/data/r")},
     {"~no-such-user": "a folder; ~ must name a user of this machine"}),
    ("FLOWMESH_RESULT_CACHE_MAX_BYTES", "result_cache_max_bytes", 1 << 30, {"1": 1},
     {"0": f"{NUMBER} 1"}),
    ("FLOWMESH_ONLY_PLUGINS", "only_plugins", (), {"a": ("a",)}, {}),
    ("FLOWMESH_DISABLE_PLUGINS", "disable_plugins", (), {"a,b": ("a", "b")}, {}),
    ("FLOWMESH_STRICT_PLUGINS", "strict_plugins", False, {"1": True}, {"": "", "ja": FLAG}),
    ("FLOWMESH_PLUGIN_TIMEOUT_S", "plugin_timeout_s", 10.0, {"0": 0.0, "2.5": 2.5},
     dict.fromkeys(["-1", "soon"], "a number of at least 0")),
    ("FLOWMESH_TRACE_HOOKS", "trace_hooks", False, {"1": True}, {"ja": FLAG}),
    ("FLOWMESH_ENVS", "envs_dir", None,
     {"/data/e": Path("/data/e"), "~/e": Path.home() / "e"},
     {"~no-such-user": "a folder; ~ must name a user of this machine"}),
    ("MODEL_ARCHIVE_USE_PIGZ", "archive_use_pigz", False, {"1": True}, {"auto": FLAG}),
    ("MODEL_ARCHIVE_COMPRESSION_LEVEL", "archive_level", None, {"0": 0, "9": 9},
     {"10": "0 to 9", "-1": "0 to 9"}),
    ("MODEL_ARCHIVE_PIGZ_THREADS", "archive_pigz_threads", None, {"4": 4}, {"0": f"{NUMBER} 1"}),
    ("MODEL_ARCHIVE_PIGZ_BIN", "archive_pigz_bin", "pigz", {"/bin/pigz": "/bin/pigz"}, {}),
    ("MODEL_ARCHIVE_TAR_BIN", "archive_tar_bin", "tar", {"/bin/tar": "/bin/tar"}, {}),
    ("MODEL_CLEANUP_AFTER_UPLOAD", "cleanup_after_upload", False,
     {"1": True, "please": True, "off": False, "0": False}, {}),
]  # fmt: skip
ROWS = {row[0]: row for row in TABLE}
FIELDS = {field.metadata["variable"]: field for field in attrs.fields(Settings)}


# Variables.


def test_every_variable_is_in_the_table() -> None:
    assert list(ROWS) == list(FIELDS)
    assert [row[1] for row in TABLE] == [field.name for field in FIELDS.values()]


@pytest.mark.parametrize("variable", ROWS)
def test_variable_that_is_not_set_or_empty_has_its_default(variable: str) -> None:
    _, field, default, _, _ = ROWS[variable]
    unset = getattr(load_settings({}), field)
    if default is ...:
        assert re.fullmatch("[0-9a-f]{16}", unset)
        assert unset != getattr(load_settings({}), field)
        return
    assert unset == default
    if variable != "CUDA_VISIBLE_DEVICES":
        assert getattr(load_settings({variable: ""}), field) == default


@pytest.mark.parametrize(
    ("variable", "raw"), [(name, raw) for name, row in ROWS.items() for raw in row[3]]
)
def test_good_value_is_read(variable: str, raw: str) -> None:
    _, field, _, good, _ = ROWS[variable]
    settings = load_settings({variable: raw})
    assert getattr(settings, field) == good[raw]
    assert type(getattr(settings, field)) is type(good[raw])
    others = attrs.evolve(load_settings({}), **{field: good[raw]})
    if field != "worker_id":
        others = attrs.evolve(others, worker_id=settings.worker_id)
    assert settings == others, "no other setting changed"


@pytest.mark.parametrize(
    ("variable", "raw"),
    [(name, raw) for name, row in ROWS.items() for raw in row[4] if raw],
    ids=lambda text: ascii(text)[:40],
)
def test_bad_value_is_an_error_with_variable_value_and_expectation(variable: str, raw: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable} must be ") as caught:
        load_settings({variable: raw})
    assert str(caught.value) == f"{variable} must be {ROWS[variable][4][raw]}, got {raw!r}"


def test_every_problem_is_in_one_error() -> None:
    environ = {"LOG_LEVEL": "loud", "METRICS_PORT": "x", "WORKER_ID": "..", "TASK_TOPIC": "t"}
    with pytest.raises(ConfigError, match="; ") as caught:
        load_settings(environ)
    assert str(caught.value).split("; ") == [
        f"WORKER_ID must be {NAME}, got '..'",
        "METRICS_PORT must be 0 to 65535, got 'x'",
        f"LOG_LEVEL must be {LEVELS}, got 'loud'",
    ]


def test_override_wins_and_its_variable_is_not_even_read() -> None:
    settings = load_settings({"LOG_LEVEL": "loud", "TASK_TOPIC": "t"}, log_level="DEBUG")
    assert (settings.log_level, settings.task_topic) == ("DEBUG", "t")
    with pytest.raises(TypeError, match="no_such"):
        load_settings({}, no_such=1)


def test_foreign_variables_are_ignored() -> None:
    worker = {"WORKER_ID": "w"}
    assert load_settings({**worker, "PATH": "/bin", "FLOWMESH_X": "1"}) == load_settings(worker)


def test_process_environment_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_TOPIC", "from-the-process")
    assert load_settings().task_topic == "from-the-process"
    assert read_environment() is os.environ


@pytest.mark.parametrize(("interval", "ttl"), [("1", 120), ("30", 120), ("30.5", 122), ("60", 240)])
def test_heartbeat_key_outlives_four_beats_and_two_minutes(interval: str, ttl: int) -> None:
    assert load_settings({"HEARTBEAT_INTERVAL_SEC": interval}).heartbeat_ttl_s == ttl


def test_secrets_are_never_shown() -> None:
    settings = load_settings(
        {
            "ORCHESTRATOR_TOKEN": "tok3n",
            "REDIS_URL": "redis://me:pa55@word@host:1/0",
            "ORCHESTRATOR_BASE_URL": "https://me:pa55@host",
        }
    )
    assert settings.orchestrator_token == "tok3n"
    assert settings.redis_url == "redis://me:pa55@word@host:1/0"
    shown = repr(settings)
    assert "tok3n" not in shown
    assert "pa55" not in shown
    assert "word" not in shown
    assert "redis_url='***@host:1/0'" in shown
    with pytest.raises(ConfigError, match=r"REDIS_URL must be .*, got '\*\*\*@host'$"):
        load_settings({"REDIS_URL": "http://:pa55@host", "ORCHESTRATOR_TOKEN": "tok3n"})


# Settings of plugins.


class Threads(BaseModel):
    threads: int = 2
    model_dir: Path = Path("models")
    mode: str = Field(default="fast", alias="max-mode")
    hub_token: SecretStr | None = Field(default=None, alias="HF_TOKEN")
    cache: str | None = Field(default=None, validation_alias="ACME_CACHE")


class Strict(BaseModel):
    api_key: int = 0
    token: str = ""
    url: str
    least: int = Field(default=1, ge=1)
    most: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Strict:
        if self.most < self.least:
            raise ValueError("least must not be above most")
        return self


def test_plugin_settings_have_defaults_without_variables() -> None:
    assert load_plugin_settings(Threads, plugin="llamacpp", environ={}) == Threads()


def test_plugin_fields_are_read_from_their_variables() -> None:
    environ = {
        "FLOWMESH_ACME_TTS_THREADS": "8",
        "FLOWMESH_ACME_TTS_MODEL_DIR": "/m",
        "FLOWMESH_ACME_TTS_MODE": "slow",
        "HF_TOKEN": "h",
        "ACME_CACHE": "/c",
        "FLOWMESH_OTHER_THREADS": "9",
    }
    found = load_plugin_settings(Threads, plugin="acme-tts", environ=environ)
    assert (found.threads, found.model_dir, found.mode) == (8, Path("/m"), "slow")
    assert found.hub_token is not None
    assert (found.hub_token.get_secret_value(), found.cache) == ("h", "/c")


def test_field_with_an_alias_in_capitals_is_not_read_from_a_flowmesh_variable() -> None:
    environ = {"FLOWMESH_X_HUB_TOKEN": "no", "FLOWMESH_X_CACHE": "no"}
    assert load_plugin_settings(Threads, plugin="x", environ=environ) == Threads()


def test_empty_plugin_variable_counts_as_not_set() -> None:
    assert (
        load_plugin_settings(Threads, plugin="x", environ={"FLOWMESH_X_THREADS": ""}).threads == 2
    )


def test_plugin_settings_come_from_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWMESH_X_THREADS", "7")
    assert load_plugin_settings(Threads, plugin="x").threads == 7


def test_wrong_plugin_values_are_named_by_variable_all_at_once() -> None:
    environ = {"FLOWMESH_X_THREADS": "many", "HF_TOKEN": "h", "FLOWMESH_X_MODEL_DIR": "m"}
    with pytest.raises(ConfigError, match=r"^FLOWMESH_X_THREADS must be a valid integer.*'many'$"):
        load_plugin_settings(Threads, plugin="x", environ=environ)
    environ = {"FLOWMESH_X_LEAST": "0", "FLOWMESH_X_MOST": "x"}
    with pytest.raises(ConfigError, match="; ") as caught:
        load_plugin_settings(Strict, plugin="x", environ=environ)
    first, second, third = str(caught.value).split("; ")
    assert first == "FLOWMESH_X_URL is required"
    assert second == "FLOWMESH_X_LEAST must be greater than or equal to 1, got '0'"
    assert third.startswith("FLOWMESH_X_MOST must be a valid integer")


def test_rule_about_several_plugin_fields_names_the_plugin() -> None:
    environ = {"FLOWMESH_X_LEAST": "3", "FLOWMESH_X_URL": "u"}
    with pytest.raises(ConfigError, match=r"^settings of plugin x: least must not be above most$"):
        load_plugin_settings(Strict, plugin="x", environ=environ)


def test_secrets_of_plugins_are_never_shown() -> None:
    environ = {"FLOWMESH_X_API_KEY": "pa55", "FLOWMESH_X_TOKEN": "pa56", "FLOWMESH_X_MOST": "x"}
    with pytest.raises(ConfigError, match=r"FLOWMESH_X_API_KEY must be .*, got \*\*\*") as caught:
        load_plugin_settings(Strict, plugin="x", environ=environ)
    assert "FLOWMESH_X_URL is required" in str(caught.value)
    assert "pa5" not in str(caught.value)


# Documentation.


def documented() -> dict[str, list[str]]:
    """Return the cells of every row of the tables, by variable."""
    rows = re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|(.*)\|$", DOCS.read_text("utf-8"), re.MULTILINE)
    names = [name for name, _ in rows]
    assert len(names) == len(set(names)), "a variable has two rows"
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def default_text(default: Any) -> str:
    if default is ...:
        return "16 random hex characters"
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default in ((), {}):
        return "\N{EN DASH}"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


@pytest.mark.parametrize("variable", FIELDS)
def test_variable_is_documented_with_its_default(variable: str) -> None:
    assert variable in documented(), f"{variable} has no row in docs/configuration.md"
    kind, default, meaning = documented()[variable]
    assert kind
    assert default == default_text(ROWS[variable][2])
    assert meaning or kind == "program"


def test_no_row_describes_a_variable_that_nothing_reads() -> None:
    assert set(documented()) == set(FIELDS)


def test_rule_for_variables_of_plugins_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    assert "`FLOWMESH_<PLUGIN>_<FIELD>`" in text
    assert "`FLOWMESH_LLAMACPP_THREADS`" in text


# The environment of a child.


def test_a_child_keeps_what_programs_need_and_no_secret() -> None:
    environ = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_HOME": "/cuda",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": "/hub",
        "HF_TOKEN": "secret",
        "ORCHESTRATOR_TOKEN": "secret",
        "REDIS_URL": "redis://:secret@h",
        "DATABASE_PASSWORD": "secret",
        "ACME_HOME": "/acme",
    }
    kept = child_environment(plugin="x", environ=environ)
    assert kept == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_HOME": "/cuda",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": "/hub",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_a_child_keeps_what_its_executor_declares_and_its_own_settings() -> None:
    environ = {
        "HF_TOKEN": "declared",
        "ACME_MODE": "fast",
        "ACME_TOKEN": "not by its whole name",
        "FLOWMESH_ACME_TTS_TOKEN": "mine",
        "FLOWMESH_OTHER_TOKEN": "not mine",
    }
    variables = ("HF_TOKEN", "ACME_*")
    kept = child_environment(plugin="acme.tts", variables=variables, environ=environ)
    assert kept.keys() & environ.keys() == {"HF_TOKEN", "ACME_MODE", "FLOWMESH_ACME_TTS_TOKEN"}


def test_a_child_gets_what_its_executor_sets_unless_the_operator_has_set_it() -> None:
    variables = ("ACME_TELLS=0", "ACME_URL=http://a/?b=c")
    kept = child_environment(plugin="x", variables=variables, environ={"ACME_TELLS": "1"})
    assert (kept["ACME_TELLS"], kept["ACME_URL"]) == ("1", "http://a/?b=c")


def test_a_child_sees_the_devices_that_it_was_given_and_no_others() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    kept = child_environment(plugin="x", devices=("1", "3"), environ=environ)
    assert kept["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_a_child_with_another_python_does_not_see_this_ones_packages() -> None:
    environ = {"PYTHONPATH": "/here", "VIRTUAL_ENV": "/venv", "PATH": "/bin"}
    assert child_environment(plugin="x", environ=environ).keys() >= environ.keys()
    assert not child_environment(plugin="x", foreign=True, environ=environ).keys() & {
        "PYTHONPATH",
        "VIRTUAL_ENV",
    }
