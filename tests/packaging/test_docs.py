"""What stands on the pages works: links lead somewhere, code runs, data is well formed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from generated import HOOKS
from pages import DOCS, FENCE, PAGES, ROOT, blocks, links, text_of

from flowmesh_core import errors
from flowmesh_core.config import load_settings
from flowmesh_core.local_run import plan
from flowmesh_core.plugins import load_plugins


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Links.


def slug(heading: str) -> str:
    plain = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", text_of(path))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(text_of(page)):
        target = link[1]
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)} links to {target}"


def test_the_index_names_every_page() -> None:
    for page in DOCS.glob("*.md"):
        if page.name not in ("index.md", "faults.md"):
            assert f"({page.name})" in text_of(DOCS / "index.md"), page.name


# Code.


def page_module(page: Path) -> str:
    """Join the python blocks that are not files of a packaged plugin."""
    return "\n\n".join(code for title, code in blocks(page, "python") if "/" not in title)


WITH_CODE = [page for page in PAGES if page_module(page)]


def run(*arguments: str, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    own = page.parent.name.replace("-", "_")
    if f"from {own}" in page_module(page) and find_spec(own) is None:
        pytest.skip(f"{own} is not installed here; the session of all plugins runs it")
    (tmp_path / "page.py").write_text(page_module(page))
    run("-W", "error", "-c", "import page", cwd=tmp_path)


def test_pages_that_teach_have_code() -> None:
    taught = {page.name for page in WITH_CODE}
    assert {"quickstart.md", "writing-an-executor.md", "hooks.md"} <= taught


@pytest.mark.parametrize("page", ["quickstart.md", "writing-an-executor.md"])
def test_the_files_of_a_page_run_as_it_says(page: str, tmp_path: Path) -> None:
    for title, code in blocks(DOCS / page, "python", "yaml"):
        if title and "/" not in title:
            (tmp_path / title).write_text(code)
    command = "run shout.yaml --plugin shout.py"
    assert f"\nflowmesh {command}\n" in text_of(DOCS / page)
    (report,) = json.loads(run("-m", "flowmesh_core", *command.split(), "--json", cwd=tmp_path))
    assert report["ok"] is True
    assert "HELLO" in json.dumps(report["result"])


def test_the_two_stages_of_the_quickstart_pass_a_value_on(tmp_path: Path) -> None:
    code = dict(blocks(DOCS / "quickstart.md", "yaml"))["two.yaml"]
    (tmp_path / "two.yaml").write_text(code)
    reports = json.loads(run("-m", "flowmesh_core", "run", "two.yaml", "--json", cwd=tmp_path))
    assert [report["ok"] for report in reports] == [True, True]
    assert reports[1]["result"]["echo"]["message"] == "it said world"


def test_the_distribution_of_the_page_is_a_plugin_that_passes_its_own_tests(tmp_path: Path) -> None:
    page = DOCS / "writing-an-executor.md"
    files = dict(blocks(page, "python", "toml", "yaml"))
    packaged = [title for title in files if "/" in title]
    assert len(packaged) == 3
    for title in [*packaged, "pyproject.toml", "shout.yaml"]:
        path = tmp_path / "project" / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[title])
    project, site = tmp_path / "project", str(tmp_path / "site")
    run("-m", "hatchling", "build", "-t", "wheel", cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    listed = json.loads(
        run("-m", "flowmesh_core", "plugins", "list", "--json", cwd=project, PYTHONPATH=site)
    )
    (row,) = [row for row in listed if row["name"] == "acme-shout"]
    assert (row["state"], row["distribution"]) == ("loaded", "acme-shout")
    (report,) = json.loads(
        run("-m", "flowmesh_core", "run", "shout.yaml", "--json", cwd=project, PYTHONPATH=site)
    )
    folder = project / report["folder"]
    assert (folder / "shouted.jsonl").read_text().splitlines()[1] == '{"said": "WORLD"}'
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=project, PYTHONPATH=site)


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    code = dict(blocks(DOCS / "writing-an-executor.md", "python"))
    for title in ("shout.py", "test_shout.py"):
        (tmp_path / title).write_text(code[title])
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shout.py", cwd=tmp_path)
    assert "1 passed" in done


def test_the_hooks_page_is_itself_a_plugin_with_every_hook(tmp_path: Path) -> None:
    path = tmp_path / "all_hooks.py"
    path.write_text(page_module(DOCS / "hooks.md"))
    plugins = load_plugins(load_settings({}), files=[path])
    (report,) = [report for report in plugins.reports if report.name == "all_hooks"]
    assert set(report.hooks) == set(HOOKS)
    plugins.observe("flowmesh_before_task", task_id="t", task_type="x", metadata={})
    assert plugins.heartbeat_fields() == {"acme_started": 1, "acme_failures": 0}
    with pytest.raises(errors.InputError, match="mount the share"):
        plugins.model_sources()["acme"]({"identifier": "../x"}, offline=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_data_on_a_page_is_well_formed(page: Path) -> None:
    for _, code in blocks(page, "json"):
        assert isinstance(json.loads(code), dict)
    for _, code in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(code), dict)
    for title, code in blocks(page, "yaml"):
        if title:
            assert plan(yaml.safe_load(code)).tasks
