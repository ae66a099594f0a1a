from __future__ import annotations

import asyncio
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from flowmesh_agent.settings import AgentSettings
from flowmesh_agent.spec import ToolUse
from flowmesh_agent.tools import GROUP, ToolContext, ToolError, open_tools
from stevedore import ExtensionManager

from flowmesh_core import ContractError, InputError, PluginError, extensions

MODULE = """
from pydantic import BaseModel
from flowmesh_agent.tools import Tool, ToolError

class City(BaseModel):
    city: str

class Weather(Tool[City]):
    name = "weather"
    description = "The weather of a city."
    parameters = City

    def __init__(self, options):
        self.unit = options.pop("unit", "C")
        super().__init__(options)

    async def call(self, ctx, arguments):
        return {"city": arguments.city, "degrees": 20, "unit": self.unit}

class Sun(Weather):
    name = "sun"

def sky(options):
    yield Weather(options)
    yield Sun({})

class Tide(Sun):
    name = "tide"

    def check(self, settings):
        if not settings.http_allow:
            raise ToolError("it needs the sea")

def text(options):
    return "no tool"

def broken(options):
    yield Weather({})
    raise KeyError(options["key"])
"""
POINTS = {name: name for name in ("sky", "text", "gone", "broken")}
POINTS |= {"weather": "Weather", "ACME.far": "Sun", "tide": "Tide"}


def install(
    folder: Path, points: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Make a distribution with these entry points, as an installer would leave it."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{point} = {target}" for point, target in points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    importlib.invalidate_caches()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution of another's with tools."""
    (tmp_path / "acme_tools.py").write_text(MODULE)
    points = {name: f"acme_tools:{target}" for name, target in POINTS.items()}
    install(tmp_path, points, monkeypatch, "acme-tools")


def open_named(*names: str, tools: tuple[str, ...] = ("*",), **options: object) -> list[str]:
    """Open entries with the same options and return the names of what they gave."""
    uses = [ToolUse(name=name, **options) for name in names]
    return [tool.name for tool in open_tools(uses, AgentSettings(tools=tools))]


@pytest.mark.usefixtures("installed")
def test_another_distribution_gives_one_tool_or_several() -> None:
    assert open_named("weather") == ["weather"]
    assert open_named("sky") == ["weather", "sun"]
    assert open_named("ACME.far", "weather", tools=("ACME.far", "weather")) == ["sun", "weather"]


@pytest.mark.usefixtures("installed")
def test_options_reach_the_tool_and_wrong_ones_are_named() -> None:
    (tool,) = open_tools([ToolUse(name="weather", unit="F")], AgentSettings(tools=("weather",)))
    assert vars(tool) == {"unit": "F"}
    with pytest.raises(ContractError, match="'weather': takes no options, got speed"):
        open_named("weather", speed=1)


@pytest.mark.usefixtures("installed")
def test_a_tool_that_is_not_allowed_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(InputError, match=r"not allowed.*gone, sky; it allows files \(FLOWMESH_AG"):
        open_named("gone", "sky", tools=("files",))
    assert open_named("gone", tools=("files",), required=False) == []
    with pytest.raises(InputError, match="it allows none"):
        open_named("sky", tools=())


@pytest.mark.usefixtures("installed")
def test_what_is_missing_broken_or_no_tool_is_named() -> None:
    with pytest.raises(PluginError, match=r"flowmesh\.agent\.tools has no driver 'wether'"):
        open_named("wether")
    with pytest.raises(PluginError, match="driver 'gone' cannot be loaded"):
        open_named("gone")
    with pytest.raises(
        PluginError, match=r"^flowmesh\.agent\.tools: 'text' must make tools, got str"
    ):
        open_named("text")


@pytest.mark.usefixtures("installed")
def test_a_tool_that_breaks_while_it_is_made_is_named_and_shows_no_traceback() -> None:
    says = "'broken' cannot be made: KeyError: 's3cret'"  # which the executor masks
    with pytest.raises(PluginError, match=says) as caught:
        open_named("broken", key="s3cret")
    assert "acme_tools" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.usefixtures("installed")
def test_a_tool_that_cannot_work_here_is_refused_or_left_out() -> None:
    with pytest.raises(InputError, match="'tide' cannot work on this worker: it needs the sea"):
        open_named("tide")
    assert open_named("tide", "weather", required=False) == ["weather"]
    settings = AgentSettings(tools="*", http_allow="example.org")
    assert [tool.name for tool in open_tools([ToolUse(name="tide")], settings)] == ["tide"]
    with pytest.raises(InputError, match=r"'web_search' .* not set up .* needs SERPER_API_KEY"):
        open_named("web_search")


@pytest.mark.usefixtures("installed")
def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="'sky': the agent has a tool 'weather' already"):
        open_named("weather", "sky")


@pytest.mark.usefixtures("installed")
def test_every_entry_is_listed_and_the_broken_one_with_its_reason() -> None:
    loaded, reports = extensions(GROUP)
    assert {"http", "web_search", "web_read", "retrieve", "weather", "sky"} <= set(loaded)
    (broken,) = [report for report in reports if report.name == "gone"]
    assert "acme_tools" in broken.reason


@pytest.mark.parametrize(
    ("name", "options", "tools"),
    [
        ("http", {}, ["http"]),
        ("web_read", {"allow": ["example.org"]}, ["web_read"]),
        ("web_search", {"results": 3}, ["web_search"]),
        ("retrieve", {"store": {"type": "edge", "collection": "c"}}, ["retrieve"]),
    ],
)
def test_our_own_entries_open(name: str, options: dict[str, object], tools: list[str]) -> None:
    settings = AgentSettings(tools="*", serper_api_key="serper-key")
    opened = open_tools([ToolUse(name=name, **options)], settings)
    assert [tool.name for tool in opened] == tools
    with pytest.raises(ContractError, match=rf"spec\.agent\.tools: '{name}': .*unknown key 'odd'"):
        open_named(name, odd=1)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution in ``examples``."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    folder = Path(__file__).parents[3] / "examples" / "agent_tool"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    monkeypatch.syspath_prepend(str(folder))
    install(tmp_path, project["entry-points"][GROUP], monkeypatch, project["name"])


@pytest.mark.usefixtures("example")
def test_the_example_of_a_tool_works(make_tool_context: Callable[..., ToolContext]) -> None:
    settings = AgentSettings(tools=("calendar",))
    (tool,) = open_tools([ToolUse(name="calendar", short=True)], settings)

    def ask(**arguments: object) -> object:
        return asyncio.run(tool.call(make_tool_context(), tool.parameters(**arguments)))

    assert ask(date="2024-02-28", days_later=1) == {"date": "2024-02-29", "weekday": "Thu"}
    with pytest.raises(ToolError, match="'2023-02-29' is no date: day is out of range"):
        ask(date="2023-02-29")
    with pytest.raises(ContractError, match="'calendar': long: Extra inputs are not permitted"):
        open_named("calendar", long=True)
