from __future__ import annotations

import itertools
import json
import logging
import sys
import sysconfig
import textwrap
import threading
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stevedore.extension import ExtensionManager

import flowmesh_core
from flowmesh_core.config import Settings
from flowmesh_core.distributions import unmet_requirements
from flowmesh_core.echo import EchoExecutor
from flowmesh_core.errors import (
    ExecutorUnavailableError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownTaskTypeError,
)
from flowmesh_core.executor import ExecutorInfo
from flowmesh_core.importing import import_target, is_importable
from flowmesh_core.plugins import (
    PluginReport,
    Plugins,
    PluginState,
    core_requirement,
    extensions,
    load_driver,
    load_plugins,
    plugin_names,
)
from flowmesh_core.registry import ExecutorRegistry

HEAD = """
from flowmesh_core.executor import Executor, ExecutorInfo
from flowmesh_core.hookspecs import hookimpl

def info(name="acme.tts", **fields):
    return ExecutorInfo(**{"name": name, "task_types": ["tts"], "target": "m:C", **fields})

"""
REGISTER = """
@hookimpl
def flowmesh_register_executors():
    return [info({})]
"""


class Site:
    """A folder on the path into which a test installs distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, module: str, source: str) -> None:
        path = self.folder / (module.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))

    def install(
        self,
        distribution: str,
        points: Mapping[str, str],
        *,
        group: str = "flowmesh",
        version: str = "1.2",
    ) -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def plugin(self, name: str, source: str = REGISTER.format(""), *, by: str = "") -> None:
        """Install one plugin in a distribution of its own."""
        module = f"{(by or name).replace('-', '_')}_plugin"
        self.write(module, HEAD + source)
        self.install(by or f"dist-{name}", {name: module})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    # Drivers are looked up once per process and group; a test installs more of them.
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    yield Site(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def load(*names: str, **settings: Any) -> tuple[Plugins, dict[str, PluginReport]]:
    """Load the named plugins alone, whatever else is installed where the tests run."""
    files = settings.pop("files", ())
    plugins = load_plugins(Settings(only_plugins=names, **settings), files=files)
    wanted = [report for report in plugins.reports if report.name in names]
    return plugins, {f"{report.distribution}:{report.name}": report for report in wanted}


def only(reports: Mapping[str, PluginReport]) -> PluginReport:
    (report,) = reports.values()
    return report


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]


# Discovery.


def test_a_plugin_is_reported_with_all_that_it_declares(site: Site) -> None:
    site.plugin(
        "acme",
        """
import flowmesh_core

@hookimpl
def flowmesh_register_executors():
    return [info(), info("acme.asr", task_types=["asr"], target="acme_engine:Asr")]

@hookimpl
def flowmesh_heartbeat_fields():
    return {"acme": 1}
""",
    )
    plugins, reports = load("acme")
    report = reports["dist-acme:acme"]
    assert (report.state, report.reason, report.version) == (PluginState.LOADED, "", "1.2")
    assert [info.name for info in report.executors] == ["acme.tts", "acme.asr"]
    assert report.hooks == ("flowmesh_heartbeat_fields", "flowmesh_register_executors")
    assert report.import_s > 0
    assert [info.name for info in plugins.executors] == ["acme.asr", "acme.tts"]
    row = report.to_dict()
    assert json.loads(json.dumps(row)) == row
    assert row["executors"][0]["task_types"] == ["tts"]


def test_the_executor_itself_is_not_imported_before_its_first_task(site: Site) -> None:
    site.plugin(
        "acme",
        """
@hookimpl
def flowmesh_register_executors():
    return [info(target="acme_engine:Tts")]
""",
    )
    site.write("acme_engine", HEAD + "class Tts(Executor):\n    def run(self, ctx): return {}\n")
    plugins, _ = load("acme")
    registry = ExecutorRegistry(plugins.executors)
    info = registry.resolve("tts", {})
    assert "acme_engine" not in sys.modules
    assert registry.load_class(info).__name__ == "Tts"
    assert registry.load_class(info) is sys.modules["acme_engine"].Tts


def test_the_cores_own_echo_is_an_ordinary_plugin() -> None:
    plugins, reports = load("echo")
    report = reports["flowmesh-core:echo"]
    assert report.state is PluginState.LOADED
    assert report.version == flowmesh_core.__version__
    registry = ExecutorRegistry(plugins.executors)
    assert registry.load_class(registry.resolve("echo", {})) is EchoExecutor


BOMB = "raise AssertionError('imported')"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"disable_plugins": ("acme",)}, "named in FLOWMESH_DISABLE_PLUGINS"),
        ({"only_plugins": ("other",)}, "not named in FLOWMESH_ONLY_PLUGINS"),
        (
            {"only_plugins": ("acme",), "disable_plugins": ("acme",)},
            "named in FLOWMESH_DISABLE_PLUGINS",
        ),
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_block_lists_act_before_import(
    site: Site,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
    twice: bool,
) -> None:
    site.plugin("acme", BOMB)
    if twice:
        site.plugin("acme", BOMB, by="acme-fork")
    plugins = load_plugins(Settings(strict_plugins=True, **{"only_plugins": ("x",), **settings}))
    rows = [report for report in plugins.reports if report.name == "acme"]
    assert {(row.state, row.reason) for row in rows} == {(PluginState.DISABLED, reason)}
    assert len(rows) == 1 + twice
    assert "acme_plugin" not in sys.modules
    assert errors(caplog) == []


@pytest.mark.parametrize("engine", ["no_such_engine", "acme"])
def test_a_missing_package_is_told_from_a_broken_plugin(site: Site, engine: str) -> None:
    site.plugin("acme", f"import {engine}")
    report = only(load("acme")[1])
    assert report.state is PluginState.MISSING
    assert report.reason == f"needs the package {engine}, not installed here"


@pytest.mark.parametrize("target", ["acme_gone", "acme_gone.plugin", "acme_there.gone"])
def test_an_entry_point_to_a_module_that_is_not_there_is_broken(site: Site, target: str) -> None:
    site.write("acme_there.__init__", "")
    site.install("acme-tts", {"acme": target})
    report = only(load("acme")[1])
    assert report.state is PluginState.BROKEN
    assert "No module named 'acme_" in report.reason


RETURNS = "@hookimpl\ndef flowmesh_register_executors():\n    return "
FIRST = "@hookimpl\ndef flowmesh_after_task():\n    raise AssertionError('it was refused')\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('on import')", "RuntimeError: on import"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt('by itself')", "KeyboardInterrupt: by itself"),
        ("import pytest\npytest.skip('no', allow_module_level=True)", "Skipped: no"),
        (RETURNS + "exec('raise KeyboardInterrupt')", "KeyboardInterrupt: "),
        ("def f(:", "SyntaxError: "),
        ("import json.nothing", "json.nothing"),
        ("from json import nothing", "ImportError: cannot import name 'nothing'"),
        ("@hookimpl\ndef flowmesh_unknown():\n    pass", "unknown hook 'flowmesh_unknown'"),
        (FIRST + "@hookimpl\ndef flowmesh_before_task(nonsense):\n    pass", "'nonsense'"),
        (RETURNS + "None", "must return a list of ExecutorInfo, got NoneType"),
        (RETURNS + "'info'", "must return a list of ExecutorInfo, got str"),
        (RETURNS + "info()", "must return a list of ExecutorInfo, got ExecutorInfo"),
        (RETURNS + "[info(), {'name': 'x'}]", "must return a list of ExecutorInfo, got dict"),
        (RETURNS + "[info(target='nocolon')]", "target must be 'package.module:Name'"),
        (RETURNS + "1 / 0", "ZeroDivisionError: division by zero"),
        (RETURNS + "[info(api_version='2.0')]", "for executor API 2.0, this flowmesh-core has 1."),
    ],
)
def test_a_broken_plugin_is_left_out_and_says_why_in_one_line(
    site: Site, caplog: pytest.LogCaptureFixture, source: str, reason: str
) -> None:
    site.plugin("acme", source)
    site.plugin("good")
    plugins, reports = load("acme", "good", "echo")
    broken = reports["dist-acme:acme"]
    assert broken.state in (PluginState.BROKEN, PluginState.MISSING)
    assert reason in broken.reason
    assert (broken.executors, broken.hooks) == ((), ())
    assert [info.name for info in plugins.executors] == ["acme.tts", "echo"]
    (line,) = errors(caplog)
    who = f"dist-acme 1.2, entry point acme_plugin, flowmesh-core {flowmesh_core.__version__}"
    assert line.startswith(f"plugin acme ({who}) is {broken.state.value}: ")
    assert reason in line
    assert line.endswith("; run: flowmesh plugins doctor acme")
    plugins.observe("flowmesh_after_task", task_id="", task_type="", outcome=None, runtime_s=0)
    assert len(errors(caplog)) == 1, "a refused plugin's other hooks are still called"


def test_a_refused_api_version_names_distribution_wanted_and_present(site: Site) -> None:
    site.plugin("acme", RETURNS + "[info(api_version='7.1')]")
    assert only(load("acme")[1]).reason == (
        "dist-acme 1.2 wrote executor 'acme.tts' for executor API 7.1, this flowmesh-core has "
        "1.0; install versions that match"
    )


def test_a_later_minor_api_version_is_accepted(site: Site) -> None:
    site.plugin("acme", RETURNS + "[info(api_version='1.9')]")
    assert only(load("acme")[1]).state is PluginState.LOADED


def test_the_traceback_of_a_broken_plugin_is_kept_at_debug(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site.plugin("acme", "raise RuntimeError('on import')")
    load("acme")
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.levelno == logging.DEBUG
    assert "acme_plugin.py" in caplog.text


def test_the_report_keeps_the_traceback_without_the_steps_that_led_there(site: Site) -> None:
    site.plugin(
        "acme",
        "def buy():\n    raise RuntimeError('sold out')\ntry:\n    buy()\n"
        "except RuntimeError as exc:\n    raise ImportError('no acme') from exc\n",
    )
    report = only(load("acme")[1])
    lines = report.traceback.splitlines()
    assert [line for line in lines if "acme_plugin.py" in line] != []
    assert {line.split('"')[1] for line in lines if "  File " in line} == {
        str(site.folder / "acme_plugin.py")
    }
    assert "RuntimeError: sold out" in lines
    assert lines[-1] == "ImportError: no acme"
    assert report.to_dict()["traceback"] == report.traceback


def test_what_we_refuse_ourselves_has_a_reason_and_no_traceback(site: Site) -> None:
    site.plugin("acme", RETURNS + "[info(api_version='7.1')]")
    assert only(load("acme")[1]).traceback == ""


# Plugins that do not come back. They wait for what a test gives them, so that no clock decides.


WAITING = """
import threading
start, went_on = threading.Event(), threading.Event()
"""


@pytest.mark.parametrize(
    "source",
    [
        WAITING + "start.wait(60)\n" + REGISTER.format("") + "went_on.set()\n",
        WAITING + "@hookimpl\ndef flowmesh_register_executors():\n    start.wait(60)\n"
        "    went_on.set()\n    return [info()]\n",
    ],
    ids=["import", "hook"],
)
def test_a_plugin_that_hangs_is_left_out_and_says_where(
    site: Site, caplog: pytest.LogCaptureFixture, source: str
) -> None:
    site.plugin("acme", source)
    site.plugin("good")
    plugins, reports = load("acme", "good", plugin_timeout_s=0.2)
    slow = reports["dist-acme:acme"]
    assert slow.state is PluginState.SLOW
    assert slow.reason.startswith("did not load within 0.2 s (FLOWMESH_PLUGIN_TIMEOUT_S)")
    assert str(site.folder / "acme_plugin.py") in slow.traceback
    assert "start.wait(60)" in slow.traceback
    assert [info.name for info in plugins.executors] == ["acme.tts"], "that of the good one"
    (line,) = errors(caplog)
    assert "plugin acme (dist-acme 1.2" in line
    assert "is slow: did not load within" in line
    # What comes too late changes nothing.
    sys.modules["acme_plugin"].start.set()
    assert sys.modules["acme_plugin"].went_on.wait(20)
    assert plugins.manager.get_plugin("acme") is None
    assert [report.state for report in reports.values()] == [PluginState.SLOW, PluginState.LOADED]


def test_no_limit_means_that_a_plugin_is_loaded_on_the_calling_thread(site: Site) -> None:
    site.plugin(
        "acme", "import threading\nthread = threading.current_thread()\n" + REGISTER.format("")
    )
    load("acme", plugin_timeout_s=0.0)
    assert sys.modules["acme_plugin"].thread is threading.current_thread()
    del sys.modules["acme_plugin"]
    load("acme", plugin_timeout_s=20.0)
    assert sys.modules["acme_plugin"].thread is not threading.current_thread()


def test_without_a_limit_an_interrupt_during_an_import_is_the_users(site: Site) -> None:
    site.plugin("acme", "raise KeyboardInterrupt('by hand')")
    with pytest.raises(KeyboardInterrupt, match="by hand"):
        load("acme", plugin_timeout_s=0.0)


def test_a_plugin_that_takes_its_time_is_loaded_with_a_warning(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.plugin("acme")
    monkeypatch.setattr("flowmesh_core.plugins._SLOW_S", 0.0)
    assert only(load("acme")[1]).state is PluginState.LOADED
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("plugin acme (dist-acme 1.2) took ")
    assert line.endswith("run: flowmesh plugins doctor acme")


def test_the_registration_names_distribution_entry_point_and_what_to_do(site: Site) -> None:
    site.plugin("acme", "raise RuntimeError('on import')")
    site.plugin("good")
    _, reports = load("acme", "good")
    assert reports["dist-acme:acme"].to_wire() == {
        "name": "acme",
        "distribution": "dist-acme",
        "version": "1.2",
        "entry_point": "acme_plugin",
        "environment": "",
        "state": "broken",
        "reason": "RuntimeError: on import",
        "hint": "run: flowmesh plugins doctor acme",
    }
    assert reports["dist-good:good"].to_wire()["hint"] == ""


# What is installed.


def test_the_names_of_plugins_are_told_without_importing_any(site: Site) -> None:
    site.plugin("acme", BOMB)
    site.plugin("acme", BOMB, by="acme-fork")
    assert [name for name in plugin_names() if name == "acme"] == ["acme"]
    assert "acme_plugin" not in sys.modules


def test_unmet_requirements_name_what_is_wanted_and_what_is_there(site: Site) -> None:
    site.install("wants", {})
    metadata = site.folder / "wants-1.2.dist-info" / "METADATA"
    with metadata.open("a") as file:
        file.write("Requires-Dist: attrs>=1\nRequires-Dist: pluggy>=77\nRequires-Dist: gone-x\n")
        file.write("Requires-Dist: gone-y; extra == 'engine'\n")
        file.write("Requires-Dist: gone-z; python_version < '3'\n")
    assert unmet_requirements("wants") == (
        f"requires pluggy>=77, {version('pluggy')} is installed",
        "requires gone-x, nothing is installed",
    )
    assert unmet_requirements("flowmesh-core") == ()


def test_requirements_that_cannot_be_told_say_what_could_not_be_read(site: Site) -> None:
    with pytest.raises(PluginError, match=r"^cannot be told: the metadata of gone cannot be found"):
        unmet_requirements("gone")
    site.install("wants", {})
    with (site.folder / "wants-1.2.dist-info" / "METADATA").open("a") as file:
        file.write("Requires-Dist: pluggy wrong>>1\n")
    with pytest.raises(PluginError, match=r"^cannot be told: the metadata of wants: .*wrong"):
        unmet_requirements("wants")


def test_strict_raises_for_the_first_refused_plugin(site: Site) -> None:
    site.plugin("acme", "raise RuntimeError('on import')")
    with pytest.raises(PluginLoadError, match=r"plugin acme .* is broken: RuntimeError: on import"):
        load("acme", strict_plugins=True)


def test_strict_accepts_what_is_whole(site: Site) -> None:
    site.plugin("acme")
    assert only(load("acme", strict_plugins=True)[1]).state is PluginState.LOADED


# Conflicts.


def test_two_distributions_of_one_plugin_name_are_both_refused_before_import(site: Site) -> None:
    site.plugin("acme", BOMB)
    site.plugin("acme", BOMB, by="acme-fork")
    _, reports = load("acme")
    assert sorted(reports) == ["acme-fork:acme", "dist-acme:acme"]
    for report in reports.values():
        assert report.state is PluginState.CONFLICT
        assert "is claimed by acme-fork, dist-acme; uninstall all but one" in report.reason
    assert not {"acme_plugin", "acme_fork_plugin"} & set(sys.modules)


def test_two_distributions_of_one_executor_name_are_both_refused(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.plugin("a")
    site.plugin("b", RETURNS + "[info(), info('b.other')]\n" + FIRST)
    site.plugin("c", REGISTER.format("'c.own'"))
    plugins, reports = load("a", "b", "c")
    for name in ("a", "b"):
        report = reports[f"dist-{name}:{name}"]
        assert report.state is PluginState.CONFLICT
        assert "'acme.tts' is claimed by dist-a and dist-b; disable one" in report.reason
    assert [info.name for info in plugins.executors] == ["c.own"]
    plugins.observe("flowmesh_after_task", task_id="", task_type="", outcome=None, runtime_s=0)
    assert len(errors(caplog)) == 2
    with pytest.raises(PluginConflictError, match="is claimed by dist-a and dist-b"):
        load("a", "b", strict_plugins=True)


def test_disabling_one_of_two_claimants_settles_it(site: Site) -> None:
    site.plugin("a")
    site.plugin("b")
    plugins, reports = load("a", "b", disable_plugins=("b",))
    assert reports["dist-a:a"].state is PluginState.LOADED
    assert [info.name for info in plugins.executors] == ["acme.tts"]


@pytest.mark.parametrize("name", ["echo", "acme"])
def test_nobody_takes_the_cores_echo_away(site: Site, name: str) -> None:
    site.plugin(name, REGISTER.format("'echo', task_types=['echo'], target='evil:Echo'"), by="evil")
    plugins, reports = load("echo", "acme")
    assert reports[f"evil:{name}"].state is PluginState.CONFLICT
    assert reports["flowmesh-core:echo"].state is PluginState.LOADED
    assert [info.target for info in plugins.executors] == ["flowmesh_core.echo:EchoExecutor"]


def test_one_module_under_two_names_is_refused_the_second_time(site: Site) -> None:
    site.write("acme_plugin", HEAD + REGISTER.format(""))
    site.install("acme-tts", {"one": "acme_plugin", "two": "acme_plugin"})
    plugins, reports = load("one", "two")
    assert reports["acme-tts:one"].state is PluginState.LOADED
    assert reports["acme-tts:two"].state is PluginState.BROKEN
    assert [info.name for info in plugins.executors] == ["acme.tts"]
    assert len(plugins.manager.hook.flowmesh_register_executors.get_hookimpls()) == 1


# One file.


SINGLE = (
    HEAD
    + """
@hookimpl
def flowmesh_register_executors():
    return [info(target=f"{__name__}:Tts")]

class Tts(Executor):
    def run(self, ctx):
        return {}
"""
)


def test_a_single_file_is_a_plugin_and_its_class_can_be_imported(site: Site) -> None:
    site.write("my-tts", SINGLE)
    path = site.folder / "my-tts.py"
    plugins, reports = load("my-tts", files=[path])
    assert reports[f"{path}:my-tts"].state is PluginState.LOADED
    registry = ExecutorRegistry(plugins.executors)
    assert registry.load_class(registry.resolve("tts", {})).__name__ == "Tts"
    again, _ = load("my-tts", files=[path])
    assert len(again.executors) == 1


@pytest.mark.parametrize("name", ["gone.py", "plugin.txt"])
def test_a_file_that_is_no_plugin_file_is_named(site: Site, name: str) -> None:
    (site.folder / "plugin.txt").write_text("")
    stem = name.split(".", maxsplit=1)[0]
    with pytest.raises(PluginLoadError, match=rf"plugin file .*{name} must be an existing .py"):
        load(stem, files=[site.folder / name])


def test_a_broken_file_stops_the_start_since_somebody_asked_for_it(site: Site) -> None:
    site.write("mine", "1 / 0")
    with pytest.raises(PluginLoadError, match=r"plugin mine .* is broken: ZeroDivisionError"):
        load("mine", files=[site.folder / "mine.py"])
    assert "flowmesh_plugin_mine" not in sys.modules


def test_a_file_named_like_an_installed_plugin_is_a_conflict(site: Site) -> None:
    site.write("echo", SINGLE)
    with pytest.raises(
        PluginConflictError, match=r"'echo' is claimed by .*echo\.py, flowmesh-core"
    ):
        load("echo", files=[site.folder / "echo.py"])


# Other environments.


@pytest.fixture
def environment(tmp_path: Path) -> Callable[[str], Site]:
    """Make an environment that sees the core, and into which a test installs distributions."""

    def make(name: str) -> Site:
        folder = tmp_path / "envs" / name
        venv.create(folder, symlinks=True, with_pip=False)
        (packages,) = folder.glob("lib/python*/site-packages")
        core = Path(flowmesh_core.__file__).parents[1]
        (packages / "seen.pth").write_text(f"{core}\n{sysconfig.get_path('purelib')}\n")
        return Site(packages)

    return make


ENGINE = REGISTER.format("needs=['acme_engine', 'acme_gone'], install='get acme'")


def test_plugins_of_environments_come_after_local_ones_and_serve_like_them(
    site: Site, environment: Callable[[str], Site], tmp_path: Path
) -> None:
    site.plugin("z-here")
    there = environment("blue")
    there.plugin("a-there", REGISTER.format("'there', needs=['acme_engine'], places=['inline']"))
    there.write("acme_engine", "")
    plugins, reports = load("z-here", "a-there", "echo", envs_dir=tmp_path / "envs")
    assert list(reports) == ["flowmesh-core:echo", "dist-z-here:z-here", "dist-a-there:a-there"]
    row = reports["dist-a-there:a-there"]
    assert (row.state, row.version, row.environment) == (PluginState.LOADED, "1.2", "blue")
    assert row.hooks == ()
    assert [r.environment for r in reports.values()] == ["", "", "blue"]
    assert plugins.pythons == {"blue": tmp_path / "envs" / "blue" / "bin" / "python"}
    assert "a_there_plugin" not in sys.modules
    registry = plugins.build_registry(Settings(), gpu_count=0)
    info = registry.resolve("tts", {}, executor="there")
    assert (info.environment, info.missing, info.places) == ("blue", (), ("process",))
    assert registry.pythons == plugins.pythons
    with pytest.raises(
        PluginLoadError, match="executor 'there' lives in environment blue and cannot be imported"
    ):
        registry.load_class(info)


def test_what_an_environment_lacks_is_told_with_its_name(
    site: Site, environment: Callable[[str], Site], tmp_path: Path
) -> None:
    site.write("acme_gone", "")  # here, where it does not help
    there = environment("blue")
    there.plugin("acme", ENGINE)
    there.write("acme_engine", "")
    plugins, _ = load("acme", envs_dir=tmp_path / "envs")
    with pytest.raises(
        ExecutorUnavailableError,
        match=r"needs the package acme_gone, not installed in environment blue; "
        "run there: get acme$",
    ) as caught:
        plugins.build_registry(Settings(), gpu_count=0).resolve("tts", {})
    assert (caught.value.needs, caught.value.install) == (("acme_gone",), "get acme")


def test_a_plugin_in_two_environments_is_a_conflict_that_names_both(
    site: Site, environment: Callable[[str], Site], tmp_path: Path
) -> None:
    for name in ("blue", "red"):
        environment(name).plugin("acme")
    plugins, _ = load("acme", envs_dir=tmp_path / "envs")
    rows = [row for row in plugins.reports if row.name == "acme"]
    assert [(row.environment, row.state.value) for row in rows] == [
        ("blue", "conflict"),
        ("red", "conflict"),
    ]
    owners = "dist-acme in environment blue, dist-acme in environment red"
    assert f"'acme' is claimed by {owners}; uninstall all but one" in rows[0].reason
    assert plugins.executors == ()


@pytest.mark.parametrize(
    ("here_has_it", "there_has_it", "served_from", "row_there"),
    [
        (False, True, "blue", "loaded"),
        (True, True, "", "disabled"),
        (True, False, "", "disabled"),
        (False, False, "", "disabled"),
    ],
)
def test_a_plugin_that_is_here_without_its_engine_is_served_from_the_environment_that_has_it(
    here_has_it: bool,
    there_has_it: bool,
    served_from: str,
    row_there: str,
    site: Site,
    environment: Callable[[str], Site],
    tmp_path: Path,
) -> None:
    there = environment("blue")
    for place, has_it in ((site, here_has_it), (there, there_has_it)):
        place.plugin("acme", REGISTER.format("'acme', needs=['acme_heavy']"))
        if has_it:
            place.write("acme_heavy", "")
    plugins, _ = load("acme", envs_dir=tmp_path / "envs")
    rows = [row for row in plugins.reports if row.name == "acme"]
    assert [(row.environment, row.state.value) for row in rows] == [
        ("", "loaded"),
        ("blue", row_there),
    ]
    assert [info.environment for info in plugins.executors] == [served_from]


def test_an_executor_name_here_and_there_is_a_conflict_that_names_both(
    site: Site, environment: Callable[[str], Site], tmp_path: Path
) -> None:
    site.plugin("a")
    there = environment("blue")
    there.plugin("b")
    there.plugin("c", REGISTER.format("'echo'"))
    plugins, reports = load("a", "b", "c", "echo", envs_dir=tmp_path / "envs")
    states = {row.name: row.state.value for row in reports.values()}
    assert states == {"a": "conflict", "b": "conflict", "c": "conflict", "echo": "loaded"}
    both = "dist-a and dist-b in environment blue; disable one of them"
    assert f"'acme.tts' is claimed by {both}" in reports["dist-b:b"].reason
    assert [info.name for info in plugins.executors] == ["echo"]
    settled, _ = load("a", "b", disable_plugins=("a",), envs_dir=tmp_path / "envs")
    assert [(info.name, info.environment) for info in settled.executors] == [("acme.tts", "blue")]


def test_an_environment_that_cannot_be_used_is_one_row_and_stops_nothing(
    site: Site, environment: Callable[[str], Site], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment("blue").plugin("acme")
    venv.create(tmp_path / "envs" / "bare", symlinks=True, with_pip=False)
    python = tmp_path / "envs" / "odd" / "bin" / "python"
    python.parent.mkdir(parents=True)
    row = {"distribution": "d", "name": "x"}
    answer = {"core": "1", "api": "1.0", "python": "3", "plugins": [row], "paths": []}
    python.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    python.chmod(0o755)
    plugins, _ = load("acme", envs_dir=tmp_path / "envs")
    rows = [row for row in plugins.reports if row.environment]
    assert [
        (row.name, row.state.value) for row in rows if row.state is not PluginState.DISABLED
    ] == [
        ("bare", "broken"),
        ("acme", "loaded"),
        ("odd", "broken"),
    ]
    remedy = "repair it, or run: flowmesh env remove"
    assert errors(caplog) == [
        "environment bare: its Python ended with exit code 1: ModuleNotFoundError: "
        f"No module named 'flowmesh_core'; {remedy} bare",
        f"environment odd: cannot read its plugins: KeyError('version'); {remedy} odd",
    ]
    assert [info.name for info in plugins.executors] == ["acme.tts"]
    with pytest.raises(PluginLoadError, match="environment bare: its Python ended"):
        load("acme", envs_dir=tmp_path / "envs", strict_plugins=True)


def test_a_plugin_that_is_broken_in_its_environment_says_why(
    site: Site,
    environment: Callable[[str], Site],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    there = environment("blue")
    there.plugin("acme", "1 / 0")
    there.plugin("good")
    plugins, _ = load("acme", "good", envs_dir=tmp_path / "envs")
    core = f"flowmesh-core {flowmesh_core.__version__}"
    assert errors(caplog) == [
        f"plugin acme (dist-acme 1.2, entry point acme_plugin, {core}, environment blue) is "
        "broken: "
        "ZeroDivisionError: division by zero; run: flowmesh plugins doctor acme"
    ]
    assert [info.name for info in plugins.executors] == ["acme.tts"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, ["flowmesh-core~=1.2"]),
        ({"url": "file:///no/such/core.whl"}, ["flowmesh-core~=1.2"]),
        ({"url": "https://host/core.whl"}, ["flowmesh-core~=1.2"]),
        ({"url": "file://{site}/a%20b", "dir_info": {}}, ["{site}/a b"]),
        (
            {"url": "file://{site}/a%20b", "dir_info": {"editable": True}},
            ["--editable", "{site}/a b"],
        ),
    ],
    ids=["index", "gone", "web", "folder", "editable"],
)
def test_a_core_for_an_environment_comes_from_where_this_one_came(
    site: Site, told: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("flowmesh-core", {})
    monkeypatch.setattr("flowmesh_core.distributions.__version__", "1.2+local")
    (site.folder / "a b").mkdir()
    if told:
        path = site.folder / "flowmesh_core-1.2.dist-info" / "direct_url.json"
        path.write_text(json.dumps(told).replace("{site}", str(site.folder)))
    assert core_requirement() == [text.replace("{site}", str(site.folder)) for text in expected]


# Importing.


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("acme_gone:X", "ModuleNotFoundError: No module named 'acme_gone'"),
        ("acme_fine:Gone", "AttributeError"),
        ("acme_raises:X", "RuntimeError: boom"),
        ("acme_exits:X", "SystemExit: 3"),
    ],
)
def test_a_target_that_cannot_be_imported_is_an_error_and_never_the_end(
    site: Site, target: str, reason: str
) -> None:
    site.write("acme_fine", "x = 1")
    site.write("acme_raises", "raise RuntimeError('boom')")
    site.write("acme_exits", "import sys; sys.exit(3)")
    with pytest.raises(PluginLoadError, match=rf"cannot import {target}: {reason}"):
        import_target(target)


def test_a_target_that_is_no_executor_is_refused(site: Site) -> None:
    site.write("acme_engine", "class Tts:\n    pass\n\nthing = Tts()\n")
    registry = ExecutorRegistry()
    for name in ("Tts", "thing"):
        info = executor("a", target=f"acme_engine:{name}")
        with pytest.raises(PluginLoadError, match=r"must be a subclass of flowmesh_core\.Executor"):
            registry.load_class(info)


def test_whether_a_package_is_there_is_told_without_importing_it(site: Site) -> None:
    site.write("acme_engine", BOMB)
    (site.folder / "vllm_like").mkdir()
    (site.folder / "vllm_like" / "weights.bin").write_bytes(b"")
    assert is_importable("acme_engine")
    assert is_importable("sys")
    assert not is_importable("vllm_like"), "a bare folder of that name does not count"
    assert not is_importable("acme_gone")
    assert not is_importable("acme_gone.sub")
    (site.folder / "acme_pack" / "deep").mkdir(parents=True)
    for module in ("__init__", "deep/__init__", "deep/leaf"):
        (site.folder / "acme_pack" / f"{module}.py").write_text(BOMB)
    assert is_importable("acme_pack.deep")
    assert is_importable("acme_pack.deep.leaf")
    assert not is_importable("acme_pack.deep.gone")
    assert not is_importable("acme_pack.deep.leaf.more")
    assert not is_importable("acme_engine.sub"), "a module has nothing below it"
    assert not {"acme_engine", "acme_pack", "acme_pack.deep"} & sys.modules.keys()


# Drivers and extensions.


def test_a_driver_is_found_by_name(site: Site) -> None:
    site.write("acme_bus", "class Bus:\n    pass\n")
    site.install("acme-bus", {"acme": "acme_bus:Bus"}, group="flowmesh.transports")
    assert load_driver("flowmesh.transports", "acme") is sys.modules["acme_bus"].Bus
    assert load_driver("flowmesh.stores", "local").__name__ == "LocalStore"


def test_an_unknown_driver_lists_the_known_ones() -> None:
    with pytest.raises(
        PluginError, match=r"flowmesh\.stores has no driver 's4'; known are .*http.*local"
    ):
        load_driver("flowmesh.stores", "s4")
    with pytest.raises(PluginError, match="known are none"):
        load_driver("flowmesh.nothing", "x")


def test_a_driver_that_cannot_be_loaded_or_comes_twice_is_named(site: Site) -> None:
    site.write("acme_bus", "raise RuntimeError('boom')")
    site.install("acme-bus", {"acme": "acme_bus:Bus"}, group="flowmesh.transports")
    site.write("acme_two", "class A:\n    pass\n\nclass B:\n    pass\n")
    for name in ("A", "B"):
        site.install(f"two-{name}", {"two": f"acme_two:{name}"}, group="flowmesh.places")
    with pytest.raises(PluginLoadError, match=r"driver 'acme' cannot be loaded: boom"):
        load_driver("flowmesh.transports", "acme")
    with pytest.raises(PluginConflictError, match=r"flowmesh\.places has several drivers 'two'"):
        load_driver("flowmesh.places", "two")


def test_extensions_come_with_a_report_for_each_and_no_bad_one_spoils_the_rest(
    site: Site,
) -> None:
    site.write("acme_tools", "def search():\n    return 42\n")
    site.write("acme_exits", "raise SystemExit(1)")
    points = {
        "search": "acme_tools:search",
        "gone": "acme_gone:x",
        "exits": "acme_exits:x",
        "twice": "acme_tools:search",
    }
    site.install("acme-tools", points, group="acme.tools")
    site.install("more", {"twice": "acme_tools:search"}, group="acme.tools")
    loaded, reports = extensions("acme.tools")
    assert {name: tool() for name, tool in loaded.items()} == {"search": 42}
    assert [(row.name, row.state.value) for row in reports] == [
        *(("exits", "broken"), ("gone", "broken"), ("search", "loaded")),
        *(("twice", "conflict"), ("twice", "conflict")),
    ]
    assert reports[1].reason == "ModuleNotFoundError: No module named 'acme_gone'"


# Hooks.


OBSERVERS = """
seen = []

@hookimpl
def flowmesh_before_task(task_type, task_id):
    seen.append((task_id, task_type))

@hookimpl
def flowmesh_heartbeat_fields():
    return {"good": len(seen)}

@hookimpl
def flowmesh_register_model_sources():
    return {"vault": "vault_source:resolve"}
"""
RAISES = """
@hookimpl
def flowmesh_before_task():
    raise {0}

@hookimpl
def flowmesh_heartbeat_fields():
    raise {0}

@hookimpl
def flowmesh_register_model_sources():
    raise {0}
"""


@pytest.mark.parametrize("error", ["RuntimeError('boom')", "SystemExit(1)"])
def test_observers_that_raise_are_logged_by_name_and_spoil_no_other(
    site: Site, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    for name in ("a-bad", "z-bad"):
        site.plugin(name, RAISES.format(error))
    site.plugin("good", OBSERVERS)
    site.write("vault_source", "def resolve(source, *, offline):\n    return (offline, source)\n")
    plugins, _ = load("a-bad", "good", "z-bad")
    plugins.observe("flowmesh_before_task", task_id="t1", task_type="tts", metadata={})
    assert sys.modules["good_plugin"].seen == [("t1", "tts")]
    assert plugins.heartbeat_fields() == {"good": 1}
    sources = plugins.model_sources()
    assert list(sources) == ["vault"]
    assert "vault_source" not in sys.modules
    answer: Any = sources["vault"]({"id": 1}, offline=True)
    assert answer == (True, {"id": 1})
    for name in ("a-bad", "z-bad"):
        lines = [line for line in errors(caplog) if line.startswith(f"plugin {name}: ")]
        assert len(lines) == 3
        assert sum("flowmesh_before_task" in line for line in lines) == 1
    assert error.partition("(")[0] in caplog.text


def test_a_heartbeat_answer_that_is_no_mapping_is_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.plugin("acme", "@hookimpl\ndef flowmesh_heartbeat_fields():\n    return 5\n")
    plugins, _ = load("acme")
    assert plugins.heartbeat_fields() == {}
    assert errors(caplog) == ["plugin acme: flowmesh_heartbeat_fields raised"]


# Resolving.


def executor(name: str, *task_types: str, **fields: Any) -> ExecutorInfo:
    base: dict[str, Any] = {"task_types": task_types or ("tts",), "target": "m:C"}
    return ExecutorInfo(**{"name": name, **base, **fields})


def names_of(registry: ExecutorRegistry) -> list[str]:
    return [info.name for info in registry.infos]


def test_an_unknown_task_type_names_the_known_ones() -> None:
    registry = ExecutorRegistry([executor("a", "tts"), executor("b", "sft", "dpo")])
    assert registry.task_types == ("dpo", "sft", "tts")
    with pytest.raises(
        UnknownTaskTypeError, match="task type 'TTS' is not known here; known are dpo, sft, tts"
    ):
        registry.resolve("TTS", {})
    with pytest.raises(UnknownTaskTypeError, match="known are none"):
        ExecutorRegistry().resolve("tts", {})


def test_register_from_code_serves_like_an_installed_plugin() -> None:
    registry = ExecutorRegistry([executor("a")])
    registry.register(executor("mine", "song"), EchoExecutor)
    assert registry.load_class(registry.resolve("song", {})) is EchoExecutor
    assert names_of(registry) == ["a", "mine"]
    with pytest.raises(PluginConflictError, match="executor name 'a' is already registered"):
        registry.register(executor("a"))


def test_enforce_cpu_leaves_out_what_cannot_do_without_a_gpu() -> None:
    infos = [executor("gpu", capabilities=["gpu"]), executor("both", capabilities=["cpu", "gpu"])]
    registry = ExecutorRegistry(infos, gpu_count=2, preferences={"tts": ["gpu"]})
    assert registry.resolve("tts", {}).name == "gpu"
    assert registry.resolve("tts", {}, enforce_cpu=True).name == "both"
    alone = ExecutorRegistry(infos[:1], gpu_count=2)
    with pytest.raises(
        ExecutorUnavailableError, match="executor 'gpu' needs a GPU, and enforce_cpu is set"
    ):
        alone.resolve("tts", {}, enforce_cpu=True)


def test_a_gpu_executor_is_not_for_a_machine_without() -> None:
    registry = ExecutorRegistry([executor("gpu", capabilities=["gpu"])])
    with pytest.raises(ExecutorUnavailableError, match=r"'tts': executor 'gpu' needs a GPU$"):
        registry.resolve("tts", {})


def test_a_missing_package_comes_with_the_command_that_installs_it() -> None:
    info = executor("vox", needs=["json", "no_vox", "no_torch"], install="pip install 'vox[gpu]'")
    with pytest.raises(
        ExecutorUnavailableError,
        match=r"task type 'tts': executor 'vox' needs the package no_vox, no_torch, not installed "
        r"here; run: pip install 'vox\[gpu\]'$",
    ) as caught:
        ExecutorRegistry([info]).resolve("tts", {})
    assert caught.value.needs == ("no_vox", "no_torch")
    assert caught.value.install == "pip install 'vox[gpu]'"


def test_what_is_not_installed_gives_way_to_what_is() -> None:
    infos = [executor("best", needs=["no_vox"], priority=9), executor("plain")]
    assert ExecutorRegistry(infos).resolve("tts", {}).name == "plain"


def test_every_executor_says_why_it_cannot() -> None:
    infos = [
        executor("a", capabilities=["gpu"]),
        executor("b", needs=["no_vox"]),
        executor("c", model_formats=["gguf"]),
    ]
    spec = {"model": {"source": {"type": "hub", "identifier": "org/model"}}}
    with pytest.raises(
        ExecutorUnavailableError,
        match=r"'a' needs a GPU; executor 'b' needs the package no_vox, not installed here; "
        r"executor 'c' loads gguf models, and spec\.model\.source is hf",
    ):
        ExecutorRegistry(infos).resolve("tts", spec)


@pytest.mark.parametrize(
    ("source", "chosen"),
    [
        ({"type": "hub", "identifier": "org/model"}, "transformers"),
        ({"type": "hub", "identifier": "org/model", "file": "q4.gguf"}, "llama"),
        ({"type": "file", "path": "/models/q4.gguf"}, "llama"),
        (None, "llama"),
        ("not an object", "llama"),
    ],
)
def test_the_format_of_the_model_decides_between_engines(source: Any, chosen: str) -> None:
    infos = [
        executor("llama", model_formats=["gguf"]),
        executor("transformers", model_formats=["hf"]),
    ]
    spec = {"model": {"source": source}}
    assert ExecutorRegistry(infos).resolve("tts", spec).name == chosen


def test_the_document_may_ask_for_an_executor_by_name() -> None:
    registry = ExecutorRegistry([executor("a"), executor("b"), executor("c", "sft")])
    assert registry.resolve("tts", {}, executor="b").name == "b"
    with pytest.raises(
        ExecutorUnavailableError, match=r"executor 'a' is not 'c', which spec\.executor asks for"
    ):
        registry.resolve("tts", {}, executor="c")


INFOS = [
    executor("cpu-a"),
    executor("cpu-b"),
    executor("strong", priority=5),
    executor("gpu", capabilities=["cpu", "gpu"]),
    executor("absent", needs=["no_such_engine"], priority=99),
]


@given(
    order=st.permutations(INFOS),
    preferred=st.lists(st.sampled_from(["cpu-a", "cpu-b", "absent", "stranger"]), unique=True),
    gpu_count=st.integers(0, 1),
)
def test_rank_follows_configuration_and_declarations_and_never_the_order_of_installation(
    order: list[ExecutorInfo], preferred: list[str], gpu_count: int
) -> None:
    preferences = {"tts": preferred}
    registry = ExecutorRegistry(order, preferences=preferences, gpu_count=gpu_count)
    usable = [name for name in preferred if name in ("cpu-a", "cpu-b")]
    expected = usable[0] if usable else "gpu" if gpu_count else "strong"
    assert registry.resolve("tts", {}).name == expected


def test_every_order_of_registration_ranks_alike() -> None:
    ranks = set()

    def note(task_type: str, spec: Any, candidates: Sequence[ExecutorInfo]) -> None:
        ranks.add(tuple(info.name for info in candidates))

    for order in itertools.permutations(INFOS[:4]):
        registry = ExecutorRegistry(gpu_count=1, choose=note)
        for info in order:
            registry.register(info)
        registry.resolve("tts", {})
    assert ranks == {("gpu", "strong", "cpu-a", "cpu-b")}


def test_preferences_hold_for_their_task_type_alone() -> None:
    infos = [executor("a", "tts", "asr"), executor("b", "tts", "asr")]
    registry = ExecutorRegistry(infos, preferences={"asr": ("b",)})
    assert [registry.resolve(kind, {}).name for kind in ("tts", "asr")] == ["a", "b"]


CHOOSES = """
@hookimpl
def flowmesh_choose_executor(spec, candidates):
    return spec.get("wish")
"""


@pytest.fixture
def choosing(site: Site) -> Callable[[Any], ExecutorInfo]:
    site.plugin("acme", CHOOSES)
    plugins, _ = load("acme")
    registry = ExecutorRegistry(
        [executor("a"), executor("b"), executor("gpu", capabilities=["gpu"])],
        choose=plugins.manager.hook.flowmesh_choose_executor,
    )
    return lambda wish: registry.resolve("tts", {"wish": wish})


def test_a_hook_may_choose_among_the_candidates(
    choosing: Callable[[Any], ExecutorInfo],
) -> None:
    assert choosing("b").name == "b"
    assert choosing(None).name == "a"


@pytest.mark.parametrize("stranger", ["gpu", "nobody", 5])
def test_a_hook_that_chooses_a_stranger_fails_the_task(
    choosing: Callable[[Any], ExecutorInfo], stranger: Any
) -> None:
    with pytest.raises(
        PluginError, match=rf"flowmesh_choose_executor answered {stranger!r}, expected one of a, b"
    ):
        choosing(stranger)
