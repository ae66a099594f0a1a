"""``flowmesh plugins``: what is listed, shown, printed as a schema and found by the doctor.

Distributions are installed into a folder on the path of real processes, each with a plugin that
is wrong in one way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import flowmesh_core
from flowmesh_core.testing import wait_for

HEAD = """
from flowmesh_core import Capability, ExecutorInfo, hookimpl

def register(**fields):
    @hookimpl
    def flowmesh_register_executors():
        info = {"name": "acme.tts", "task_types": ["tts"], "target": "acme_engine:Tts"}
        return [ExecutorInfo(**{**info, **fields})]
    return flowmesh_register_executors

"""
HOOK = "flowmesh_register_executors = register({})\n"
ENGINE = """
from pydantic import BaseModel
from flowmesh_core import Executor

EXAMPLE = {"taskType": "tts", "voice": "alto"}

class Spec(BaseModel, extra="forbid"):
    taskType: str = "tts"
    voice: str
    tempo: float | None = 1.5
    words: list[str] = []

class Result(BaseModel):
    seconds: int

class Options(BaseModel):
    threads: int = 2

class Tts(Executor):
    def run(self, ctx):
        return {}

def lay_out(folder):
    (folder / "words.txt").write_text("hello")
    return {"voice": str(folder)}
"""
DECLARED = HOOK.format(
    "spec='acme_engine:Spec', settings='acme_engine:Options', result='acme_engine:Result', "
    "example='acme_engine:EXAMPLE'"
)
HANGS = "import threading\n\ndef ask():\n    threading.Event().wait()\n\nask()\n"


class Site:
    """A folder of distributions, and the command that finds them there and no environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "acme_engine.py").write_text(ENGINE)

    def install(self, distribution: str, point: str, source: str, requires: str = "") -> None:
        module = f"{distribution.replace('-', '_')}_plugin"
        (self.folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source))
        info = self.folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        head = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n"
        (info / "METADATA").write_text(head + needs)
        (info / "entry_points.txt").write_text(f"[flowmesh]\n{point} = {module}\n")

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        own = {
            "PYTHONPATH": str(self.folder),
            "FLOWMESH_ENVS": str(self.folder / "envs"),
            "FLOWMESH_ONLY_PLUGINS": "acme,echo",
        }
        return subprocess.run(
            [sys.executable, "-m", "flowmesh_core", "plugins", *arguments],
            env={**os.environ, **own, **environ},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def json(self, *arguments: str, code: int = 0, **environ: str) -> Any:
        done = self.run(*arguments, "--json", **environ)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def diagnose(self, *arguments: str, code: int = 0, **environ: str) -> dict[str, dict[str, str]]:
        """Return what the doctor found about acme, by check."""
        (diagnosis,) = self.json("doctor", "acme", *arguments, code=code, **environ)
        assert diagnosis["ok"] is (code == 0)
        return {finding["check"]: finding for finding in diagnosis["findings"]}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def failed(findings: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {name: each["told"] for name, each in findings.items() if each["verdict"] == "failed"}


# list


def test_the_list_tells_of_each_plugin_what_became_of_it(site: Site) -> None:
    site.install("acme-raises", "acme", "raise RuntimeError('no licence')")
    done = site.run("list")
    assert done.returncode == 0
    assert done.stderr == ""
    head, *rows = done.stdout.splitlines()
    columns = ["PLUGIN", "DISTRIBUTION", "VERSION", "ENVIRONMENT", "STATE", "IMPORT", "SERVES"]
    assert head.split() == columns
    (row,) = [row for row in rows if row.startswith("acme ")]
    assert row.split()[:4] == ["acme", "acme-raises", "1.2", "broken"]
    assert row.split()[4].isdecimal()
    assert row.split()[5:] == ["ms", "RuntimeError:", "no", "licence"]
    assert (
        "plugin acme (acme-raises 1.2, entry point acme_raises_plugin, flowmesh-core" in done.stdout
    )
    assert done.stdout.endswith("    RuntimeError: no licence\n"), "the traceback is shown"


def test_a_hanging_plugin_does_not_hold_the_list_up(site: Site) -> None:
    site.install("acme-hangs", "acme", HANGS)
    rows = site.json("list", FLOWMESH_PLUGIN_TIMEOUT_S="0.5")
    acme = next(row for row in rows if row["name"] == "acme")
    assert acme["state"] == "slow"
    assert "did not load within 0.5 s" in acme["reason"]
    assert "in ask" in acme["traceback"]
    assert acme["hint"] == "run: flowmesh plugins doctor acme"
    assert [row["state"] for row in rows if row["name"] == "echo"] == ["loaded"]


def test_a_plugin_that_raises_an_interrupt_is_one_broken_row(site: Site) -> None:
    site.install("acme-interrupts", "acme", "raise KeyboardInterrupt('by itself')")
    states = {row["name"]: (row["state"], row["reason"]) for row in site.json("list")}
    assert states["acme"] == ("broken", "KeyboardInterrupt: by itself")
    assert states["echo"] == ("loaded", "")


def test_ctrl_c_ends_the_list_while_a_plugin_hangs(site: Site) -> None:
    begun = site.folder / "begun"
    site.install("acme-hangs", "acme", f"open({str(begun)!r}, 'w').close()\n{HANGS}")
    # A shell that runs the tests in its background has them ignore the signal.
    code = "from signal import *; signal(SIGINT, default_int_handler)\n"
    code += "from flowmesh_core.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "plugins", "list"],
        env={**os.environ, "PYTHONPATH": str(site.folder), "FLOWMESH_ONLY_PLUGINS": "acme"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as listing:
        try:
            wait_for(begun.exists, timeout_s=60)
            listing.send_signal(signal.SIGINT)
            out, err = listing.communicate(timeout=8)  # less than the plugin has
        finally:
            listing.kill()
    assert (listing.returncode, out, err) == (130, "", "interrupted\n")


def test_hooks_are_traced_beside_the_list(site: Site) -> None:
    done = site.run("list", FLOWMESH_TRACE_HOOKS="1")
    assert "hook flowmesh_register_executors: plugin echo: ['echo'] in" in done.stderr
    assert "hook flowmesh" not in done.stdout


# show and schema


@pytest.mark.parametrize("name", ["acme", "acme.tts"])
def test_show_tells_fields_variables_and_example(site: Site, name: str) -> None:
    site.install("acme-tts", "acme", DECLARED)
    lines = [line.strip() for line in site.run("show", name).stdout.splitlines()]
    for line in (
        "distribution: acme-tts",
        "capabilities: cpu",
        "hooks: flowmesh_register_executors",
        "voice: string (required)",
        "tempo: number | null = 1.5",
        "words: array of string = []",
        "seconds: integer (required)",
        "threads: integer = 2 from FLOWMESH_ACME_TTS_THREADS",
        'example of a spec: {"taskType": "tts", "voice": "alto"}',
    ):
        assert line in lines


def test_show_tells_what_of_a_declaration_cannot_be_had(site: Site) -> None:
    site.install("acme-tts", "acme", HOOK.format("spec='acme_gone:Spec'"))
    shown = site.json("show", "acme")
    assert shown["executors"][0]["schemas"] == {}
    (problem,) = shown["executors"][0]["problems"]
    assert problem.startswith("spec: cannot import acme_gone:Spec: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("option", "properties"),
    [([], ["taskType", "voice", "tempo", "words"]), (["--result"], ["seconds"])],
)
def test_schema_prints_what_json_schema_tools_read(
    site: Site, option: list[str], properties: list[str]
) -> None:
    site.install("acme-tts", "acme", DECLARED)
    schema = json.loads(site.run("schema", "acme.tts", *option).stdout)
    assert list(schema["properties"]) == properties
    assert schema == json.loads(site.run("schema", "acme", *option, "--json").stdout)


def test_the_schema_of_settings_names_the_variables(site: Site) -> None:
    site.install("acme-tts", "acme", DECLARED)
    schema = site.json("schema", "acme", "--settings")
    assert schema["properties"]["threads"]["variable"] == "FLOWMESH_ACME_TTS_THREADS"


def test_what_has_no_schema_is_an_error_that_says_so(site: Site) -> None:
    site.install("acme-tts", "acme", HOOK.format(""))
    for name, reason in {
        "acme.tts": "executor 'acme.tts' declares no spec",
        "nothing": "plugin 'nothing' is not installed",
    }.items():
        done = site.run("schema", name)
        assert done.returncode == 2
        assert reason in done.stderr


def test_a_plugin_of_several_executors_asks_which(site: Site) -> None:
    source = "@hookimpl\ndef flowmesh_register_executors():\n    return [" + (
        "ExecutorInfo(name='a.one', task_types=['t'], target='m:C'),"
        "ExecutorInfo(name='a.two', task_types=['t'], target='m:C')]"
    )
    site.install("acme-tts", "acme", source)
    done = site.run("schema", "acme")
    assert done.returncode == 2
    assert "has several executors or none; name one of: a.one, a.two" in done.stderr


# doctor


def test_a_sound_plugin_passes_every_check(site: Site) -> None:
    site.install("acme-tts", "acme", DECLARED, requires="attrs>=1")
    found = site.diagnose()
    assert {name: each["verdict"] for name, each in found.items()} == dict.fromkeys(
        ("load", "requirements", "api version", "declaration", "needs", "engine"), "ok"
    )
    assert found["declaration"]["told"] == "spec, settings, result, example can be used"
    assert found["load"]["told"].endswith(" ms, declares acme.tts")


def test_the_doctor_examines_all_that_is_installed(site: Site) -> None:
    site.install("acme-raises", "acme", "1 / 0")
    done = site.run("doctor")
    assert done.returncode == 1
    assert "acme (acme-raises 1.2): broken\n  failed   load: ZeroDivisionError" in done.stdout
    assert "\necho (flowmesh-core " in done.stdout


@pytest.mark.parametrize(
    ("source", "state", "told"),
    [
        ("raise RuntimeError('no licence')", "broken", "RuntimeError: no licence"),
        ("raise KeyboardInterrupt('by itself')", "broken", "KeyboardInterrupt: by itself"),
        ("import os; os._exit(3)", "broken", "its process ended with exit code 3: it said nothing"),
        ("import ctypes; ctypes.string_at(0)", "broken", "its process was killed by SIGSEGV"),
        ("import acme_gone", "missing", "needs the package acme_gone, not installed here"),
        (
            HOOK.format("api_version='2.0'"),
            "broken",
            "acme-tts 1.2 wrote executor 'acme.tts' for executor API 2.0, this flowmesh-core has "
            "1.0; install versions that match",
        ),
    ],
    ids=["raises", "interrupts", "exits", "crashes", "missing", "api"],
)
def test_the_doctor_says_how_loading_fails(site: Site, source: str, state: str, told: str) -> None:
    site.install("acme-tts", "acme", source)
    (diagnosis,) = site.json("doctor", "acme", code=1)
    assert diagnosis["state"] == state
    load, requirements = diagnosis["findings"]
    assert (load["verdict"], load["told"]) == ("failed", told)
    assert requirements["verdict"] == "ok"


def test_the_doctor_says_where_a_plugin_hangs(site: Site) -> None:
    site.install("acme-hangs", "acme", HANGS)
    found = site.diagnose("--limit", "0.5", code=1)
    told = found["load"]["told"]
    assert told.startswith("hangs: it did not end within 0.5 s, at ")
    plugin = site.folder / "acme_hangs_plugin.py"
    assert f", at {plugin}:" in told
    assert f'File "{plugin}", line ' in found["load"]["traceback"]
    assert " in ask\n" in found["load"]["traceback"]
    assert "flowmesh_core" not in found["load"]["traceback"]


def test_two_plugins_of_one_name_name_each_other(site: Site) -> None:
    for name in ("acme-one", "acme-two"):
        site.install(name, "acme", HOOK.format(""))
    diagnoses = site.json("doctor", "acme", code=1)
    for diagnosis in diagnoses:
        assert "is claimed by acme-one, acme-two" in diagnosis["findings"][0]["told"]
    assert len(diagnoses) == 2


def test_two_executors_of_one_name_name_each_other(site: Site) -> None:
    site.install("acme-one", "acme", HOOK.format(""))
    site.install("acme-two", "other", HOOK.format(""))
    found = site.diagnose(code=1, FLOWMESH_ONLY_PLUGINS="acme,other")
    assert failed(found) == {
        "name": "executor name 'acme.tts' is claimed by acme-one and acme-two; disable one of "
        "them (FLOWMESH_DISABLE_PLUGINS)"
    }


def test_a_plugin_that_is_blocked_is_not_touched(site: Site) -> None:
    site.install("acme-hangs", "acme", HANGS)
    named = site.diagnose(FLOWMESH_DISABLE_PLUGINS="acme")["load"]
    assert (named["verdict"], named["told"]) == ("skipped", "named in FLOWMESH_DISABLE_PLUGINS")
    left_out = site.diagnose(FLOWMESH_ONLY_PLUGINS="echo")["load"]
    assert left_out["verdict"] == "skipped"
    assert left_out["told"] == "not named in FLOWMESH_ONLY_PLUGINS"


@pytest.mark.parametrize(
    ("fields", "check", "told"),
    [
        ("needs=['acme_gone'], install='get acme'", "needs", "lacks acme_gone; run: get acme"),
        ("target='acme_engine:Gone'", "engine", "cannot import acme_engine:Gone: AttributeError"),
        ("target='acme_engine:Spec'", "engine", "must be a subclass of flowmesh_core.Executor"),
        ("target='flowmesh_core:Executor'", "engine", "must define run, or run_group"),
        ("needs=['acme_bad']", "engine", "cannot import acme_bad:__name__: OSError: libacme.so"),
        ("needs=['acme_dies']", "engine", "its process was killed by SIGKILL"),
        ("spec='acme_gone:Spec'", "declaration", "spec acme_gone:Spec: cannot import"),
        (
            "spec='acme_engine:Tts'",
            "declaration",
            "acme_engine:Tts must be a subclass of pydantic.BaseModel, got Tts",
        ),
        (
            "spec='acme_engine:Spec', example='acme_engine:HEAD'",
            "declaration",
            "example acme_engine:HEAD: cannot import",
        ),
        (
            "spec='acme_engine:Spec', example='acme_bad_example:SPEC'",
            "declaration",
            "example: spec.voice is required",
        ),
        ("example='acme_bad_example:WORD'", "declaration", "got str"),
        (
            "name='acme', settings='acme_engine:Options'",
            "declaration",
            "FLOWMESH_ACME_THREADS must be a valid integer",
        ),
    ],
)
def test_the_doctor_finds_what_a_first_task_would_meet(
    site: Site, fields: str, check: str, told: str
) -> None:
    (site.folder / "acme_bad.py").write_text("raise OSError('libacme.so: cannot open')")
    (site.folder / "acme_dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    (site.folder / "acme_bad_example.py").write_text("SPEC = {'tempo': 2}\nWORD = 'tts'")
    site.install("acme-tts", "acme", HOOK.format(fields))
    found = failed(site.diagnose(code=1, FLOWMESH_ACME_THREADS="many"))
    assert list(found) == [check]
    assert told in found[check]


def test_an_example_may_lay_out_its_files(site: Site) -> None:
    fields = "spec='acme_engine:Spec', example='acme_engine:lay_out'"
    site.install("acme-tts", "acme", HOOK.format(fields))
    assert site.diagnose()["declaration"]["verdict"] == "ok"


def test_an_engine_imported_by_the_plugins_module_is_pointed_out(site: Site) -> None:
    source = "import acme_engine\n" + HOOK.format("needs=['acme_engine']")
    site.install("acme-tts", "acme", source)
    load = site.diagnose()["load"]
    assert load["verdict"] == "warning"
    assert "it imports acme_engine, which belongs into the executor's module" in load["told"]


def test_requirements_that_cannot_be_read_are_skipped_with_the_reason(site: Site) -> None:
    site.install("acme-tts", "acme", HOOK.format(""), requires="pluggy wrong>>1")
    found = site.diagnose()["requirements"]
    assert found["verdict"] == "skipped"
    assert found["told"].startswith("cannot be told: the metadata of acme-tts: ")
    assert "pluggy wrong>>1" in found["told"]


def test_requirements_that_are_not_met_are_told(site: Site) -> None:
    site.install("acme-tts", "acme", HOOK.format(""), requires="pluggy>=77")
    told = failed(site.diagnose(code=1))["requirements"]
    assert told.startswith("requires pluggy>=77, ")
    assert told.endswith(" is installed; run: pip install acme-tts")


def test_a_need_for_a_gpu_is_the_machines_matter(site: Site) -> None:
    site.install("acme-tts", "acme", HOOK.format("capabilities=['gpu']"))
    gpu = site.diagnose(CUDA_VISIBLE_DEVICES="")["gpu"]
    assert (gpu["verdict"], gpu["told"]) == ("warning", "none here, and it needs one")


def test_a_stranger_is_refused(site: Site) -> None:
    done = site.run("doctor", "nothing")
    assert done.returncode == 2
    assert "plugin 'nothing' is not installed" in done.stderr


# Other environments.


@pytest.fixture
def blue(site: Site) -> Site:
    """An environment beside the command's own that sees the core and has folders of its own."""
    folder = site.folder / "envs" / "blue"
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    core = Path(flowmesh_core.__file__).parents[1]
    (packages / "seen.pth").write_text(f"{core}\n{sysconfig.get_path('purelib')}\n")
    return Site(packages)


def test_a_plugin_of_an_environment_is_examined_and_described_there(site: Site, blue: Site) -> None:
    (site.folder / "acme_engine.py").unlink()
    blue.install("acme-tts", "acme", DECLARED)
    (diagnosis,) = site.json("doctor", "acme")
    assert (diagnosis["environment"], diagnosis["ok"], diagnosis["state"]) == (
        "blue",
        True,
        "loaded",
    )
    engine = next(each for each in diagnosis["findings"] if each["check"] == "engine")
    assert engine["verdict"] == "ok"
    schema = site.json("schema", "acme.tts")
    assert list(schema["properties"]) == ["taskType", "voice", "tempo", "words"]
    shown = site.json("show", "acme")
    assert shown["environment"] == "blue"
    assert shown["executors"][0]["schemas"]["result"]["required"] == ["seconds"]


def test_what_an_environment_serves_need_not_be_here(site: Site, blue: Site) -> None:
    for place in (site, blue):
        place.install("acme-tts", "acme", HOOK.format("needs=['acme_big']"))
    (blue.folder / "acme_big.py").write_text("")
    here, there = site.json("doctor", "acme")
    (needs,) = [each for each in here["findings"] if each["check"] == "needs"]
    assert (needs["verdict"], needs["told"]) == (
        "skipped",
        "lacks acme_big; an environment serves it",
    )
    assert (there["environment"], there["ok"]) == ("blue", True)


def test_an_environment_without_the_core_fails(site: Site) -> None:
    venv.create(site.folder / "envs" / "bare", symlinks=True, with_pip=False)
    diagnoses = site.json("doctor", code=1)
    (bare,) = [diagnosis for diagnosis in diagnoses if diagnosis["environment"]]
    assert bare["name"] == "bare"
    assert "No module named 'flowmesh_core'" in bare["findings"][0]["told"]
