from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

import pytest
from flowmesh_trl.options import CONFIGS, OWNED, config_options, read_config, unknown_option

Finder = Callable[[str], Path | None]

SOURCES = {
    "acme/__init__.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from .trainer import TunedConfig as TunedConfig\n"
        "raise RuntimeError('imported')\n"
    ),
    "acme/trainer/__init__.py": "from .tuned_config import Tuned as TunedConfig\n",
    "acme/trainer/tuned_config.py": (
        "from base import Arguments\n"
        "from ..shared import Common\n"
        "class Tuned(Common, Arguments):\n"
        "    beta: float = 0.1\n"
        "    seed: str = 'overridden'\n"
        "    kinds: ClassVar[list[str]] = []\n"
        "    _hidden: int = 0\n"
        "    constant = 3\n"
        "    def __post_init__(self): pass\n"
    ),
    "acme/shared.py": "class Common:\n    warm: bool = True\n    both: int = 1\n",
    "base/__init__.py": "from .arguments import Arguments\n",
    "base/arguments.py": (
        "class Arguments:\n"
        "    seed: int = 42\n"
        "    both: str = ''\n"
        "    steps: int | None = None\n"
        "    schedule: 'Schedule | str' = 'linear'\n"
        "    names: Optional[list[str]] = None\n"
        "    mixed: Union[dict, str] = ''\n"
        "    kind: Literal['k1', 'k3'] = 'k1'\n"
        "    table: dict[str, Any] | str | None = None\n"
        "    late: 'float | None' = None\n"
    ),
}


@pytest.fixture
def find(tmp_path: Path) -> Finder:
    """Finds the packages of ``SOURCES``."""
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return lambda package: path if (path := tmp_path / package / "__init__.py").exists() else None


def test_fields_are_followed_through_packages_and_bases(find: Finder) -> None:
    assert read_config("acme", "TunedConfig", find=find) == {
        "seed": str,  # what the class says itself wins over its bases
        "both": int,  # and the first base over the second
        "steps": Union[int, None],  # noqa: UP007 - equal to what was read
        "schedule": Any,
        "names": Union[list[str], None],  # noqa: UP007
        "mixed": Union[dict, str],  # noqa: UP007
        "kind": Literal["k1", "k3"],
        "table": Union[dict, str, None],  # noqa: UP007
        "late": Union[float, None],  # noqa: UP007
        "warm": bool,
        "beta": float,
    }


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("absent", "Config", "absent is not installed"),
        ("acme.absent", "Config", "acme.absent is not there"),
        ("acme", "Absent", "acme has no class Absent"),
    ],
)
def test_what_is_not_there_is_named(find: Finder, module: str, name: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        read_config(module, name, find=find)


def test_a_base_that_cannot_be_followed_makes_the_class_unreadable(
    find: Finder, tmp_path: Path
) -> None:
    for bases in ("base.Arguments", "Unknown"):
        (tmp_path / "acme/shared.py").write_text(f"class Common({bases}): pass\n", encoding="utf-8")
        with pytest.raises(LookupError, match=r"not all bases of Common|has no class Unknown"):
            read_config("acme", "TunedConfig", find=find)


def test_a_bare_folder_of_that_name_is_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_bare").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LookupError, match="acme_bare is not installed"):
        read_config("acme_bare", "Config")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("weigth_decay", "did you mean 'weight_decay'"),
        ("zzz", "this version of TRL has no such option"),
        ("evaluation_strategy", "use eval_strategy"),
        ("max_length", "use generation.max_new_tokens"),
    ],
)
def test_an_unknown_key_gets_a_hint(key: str, hint: str) -> None:
    text = unknown_option(key, ["weight_decay", "warmup_steps"])
    assert text.startswith(f"unknown key {key!r}")
    assert hint in text


def test_nothing_is_imported_to_read_the_installed_sources() -> None:
    code = (
        "import sys\n"
        "from flowmesh_trl.options import CONFIGS, config_options\n"
        "found = {name: config_options(name) for name in CONFIGS}\n"
        "assert not {'trl', 'transformers', 'torch', 'accelerate', 'peft'} & set(sys.modules)\n"
        "print(sum(len(options or ()) for options in found.values()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(run.stdout) == sum(len(config_options(name) or ()) for name in CONFIGS)


def test_every_option_of_the_installed_trl_is_found() -> None:
    pytest.importorskip("torch")
    import dataclasses
    import importlib

    pytest.importorskip("trl")
    for task_type, (module, name) in CONFIGS.items():
        config = getattr(importlib.import_module(module), name)
        fields = [field.name for field in dataclasses.fields(config) if field.init]
        assert list(config_options(task_type) or ()) == fields


def test_what_documents_may_not_set_is_known_to_trl() -> None:
    pytest.importorskip("trl")
    known = {key for name in CONFIGS for key in config_options(name) or ()}
    assert known >= OWNED.keys()
