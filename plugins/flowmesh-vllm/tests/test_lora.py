from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flowmesh_vllm import lora
from flowmesh_vllm.lora import AdapterIds, check_adapter, prepare

from flowmesh_core import AdapterRef, InputError

Make = Callable[..., AdapterRef]
PLAIN = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(
        name: str = "mine", *, scale: float = 1, weights: bytes = b"weights", **config: Any
    ) -> AdapterRef:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return AdapterRef(name=name, path=folder, scale=scale)

    return make


def config_of(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


# What can be applied.


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 64},
        {"lora_alpha": 1.5, "alpha_pattern": {"v_proj": 2.5}, "rank_pattern": {"v_proj": 64}},
        {"init_lora_weights": "gaussian", "bias": None, "modules_to_save": []},
    ],
)
def test_what_vllm_can_apply_passes(make: Make, config: Any) -> None:
    check_adapter(make(**config), max_rank=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "vLLM cannot apply use_dora at run time; give it apply: merge"),
        ({"modules_to_save": ["lm_head"]}, "cannot apply modules_to_save"),
        ({"trainable_token_indices": [1]}, "cannot apply trainable_token_indices"),
        ({"lora_bias": True}, "cannot apply lora_bias"),
        ({"bias": "all"}, "cannot apply bias 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": True}, "r must be a whole number above 0, got True"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"alpha_pattern": {"v": "x"}}, r"alpha_pattern\['v'\] must be a finite number, got 'x'"),
        ({"rank_pattern": {"v": 1.5}}, r"rank_pattern\['v'\] must be a whole number"),
        ({"rank_pattern": [4]}, r"rank_pattern must be a whole number above 0, got \[4\]"),
    ],
)
def test_what_vllm_cannot_apply_is_refused_by_name_and_field(
    make: Make, config: Any, message: str
) -> None:
    with pytest.raises(InputError, match=f"adapter mine: .*{message}|adapter mine: {message}"):
        check_adapter(make(**config), max_rank=64)


def test_every_fault_is_said_at_once(make: Make) -> None:
    adapter = make(use_dora=True, bias="all", r=128)
    with pytest.raises(InputError, match=r"r is 128, .*; vLLM cannot apply use_dora, bias 'all'"):
        check_adapter(adapter, max_rank=64)


@pytest.mark.parametrize(
    ("config", "enough"),
    [({"r": 17}, 32), ({"r": 2, "rank_pattern": {"v": 300}}, 320), ({"r": 512}, 512)],
)
def test_a_rank_above_the_engines_says_which_would_do(make: Make, config: Any, enough: int) -> None:
    with pytest.raises(
        InputError, match=rf"at most; raise model\.vllm\.max_lora_rank to {enough}$"
    ):
        check_adapter(make(**config), max_rank=16)


def test_a_rank_above_all_that_vllm_has_is_for_merging(make: Make) -> None:
    with pytest.raises(InputError, match="r is 513, and the engine takes 64 at most; give it appl"):
        check_adapter(make(r=513), max_rank=64)


def test_a_missing_field_or_file_is_named(make: Make) -> None:
    adapter = make()
    (adapter.path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"lora_alpha .*; r must .*; target_modules is required"):
        check_adapter(adapter, max_rank=64)
    (adapter.path / "adapter_model.safetensors").unlink()
    for call in (
        lambda: check_adapter(adapter, max_rank=64),
        lambda: AdapterIds().identify(adapter),
    ):
        with pytest.raises(InputError, match=r"adapter mine: .* must hold adapter_model\.safeten"):
            call()


# The scale.


def test_an_adapter_of_scale_one_is_handed_on_as_it_lies(make: Make, tmp_path: Path) -> None:
    adapter = make()
    assert prepare(adapter, tmp_path / "attempt") == adapter.path
    assert not (tmp_path / "attempt").exists()


@pytest.mark.parametrize("scale", [0.5, -2, 0])
def test_a_scale_becomes_part_of_every_alpha_and_nothing_else(
    make: Make, tmp_path: Path, scale: float
) -> None:
    adapter = make(scale=scale, use_rslora=True, alpha_pattern={"v_proj": 10, "k_proj": 3})
    for _ in range(2):  # a second time is fine
        folder = prepare(adapter, tmp_path / "attempt")
    assert folder == tmp_path / "attempt/.adapters/mine"
    expected = {
        **config_of(adapter.path),
        "lora_alpha": 16 * scale,
        "alpha_pattern": {"v_proj": 10 * scale, "k_proj": 3 * scale},
    }
    assert config_of(folder) == expected
    assert config_of(adapter.path)["lora_alpha"] == 16
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (folder / "adapter_model.safetensors").is_symlink()


def test_what_is_prepared_has_the_scale_in_vllms_own_eyes(make: Make, tmp_path: Path) -> None:
    helper = pytest.importorskip("vllm.lora.peft_helper", exc_type=ImportError).PEFTHelper
    adapter = make(scale=0.25, use_rslora=True, r=4, alpha_pattern={"v_proj": 10})
    found = helper.from_local_dir(str(prepare(adapter, tmp_path)), None)
    assert found.get_rank_and_scaling("layers.0.q_proj") == (4, 16 * 0.25 / 2)
    assert found.get_rank_and_scaling("layers.0.v_proj") == (4, 10 * 0.25 / 2)


# The ids.


def test_equal_content_has_one_id_wherever_it_lies(make: Make, tmp_path: Path) -> None:
    ids, first = AdapterIds(), make("first")
    copy = AdapterRef(name="other", path=Path(shutil.copytree(first.path, tmp_path / "copy")))
    assert ids.identify(first) == ids.identify(copy)
    assert ids.identify(first).number == 1
    assert AdapterIds().identify(make("new", r=4)).number == 1


def test_other_weights_config_or_scale_have_another_id_and_name(make: Make) -> None:
    ids = AdapterIds()
    adapters = [make("a"), make("b", weights=b"others!"), make("c", r=4), make("d", scale=0.5)]
    found = [ids.identify(adapter) for adapter in adapters]
    assert [each.number for each in found] == [1, 2, 3, 4]
    assert len({each.name for each in found}) == 4


def test_a_file_that_changed_in_place_has_another_id(make: Make) -> None:
    ids, adapter = AdapterIds(), make()
    before = ids.identify(adapter)
    file = adapter.path / "adapter_model.safetensors"
    stat = file.stat()
    file.write_bytes(b"WEIGHTS")  # as long as before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = ids.identify(adapter)
    file.write_bytes(b"weights")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 2))
    assert (before.number, after.number) == (1, 2)
    assert ids.identify(adapter) == before


def test_a_file_is_read_once_while_it_stays_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, adapter = AdapterIds(), make()
    opened: list[str] = []
    real = Path.open

    def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    for _ in range(3):
        ids.identify(adapter)
    assert sorted(opened) == ["adapter_config.json", "adapter_model.safetensors"]


def test_threads_that_ask_at_once_agree(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, adapters = AdapterIds(), [make(f"a{n}") for n in range(8)]
    together = threading.Barrier(8, timeout=10)

    def digest(adapter: AdapterRef) -> str:
        together.wait()
        return adapter.name[1:]

    monkeypatch.setattr(lora, "_digest", digest)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ids.identify, adapters))
    assert sorted(each.number for each in found) == list(range(1, 9))
