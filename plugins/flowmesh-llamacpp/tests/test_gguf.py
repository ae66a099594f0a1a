from __future__ import annotations

from pathlib import Path

import pytest
from flowmesh_llamacpp.gguf import find_gguf, read_metadata

from flowmesh_core import InputError


def test_the_head_of_real_weights_is_read(weights: Path) -> None:
    head = read_metadata(weights, "model")
    assert head["general.architecture"] == "llama"
    assert head["llama.context_length"] == 8192
    assert "im_start" in str(head["tokenizer.chat_template"])
    assert head["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.tokens" not in head


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 20, b"GGUF\x09\x00\x00\x00" + bytes(40)])
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model: .*weights\.gguf must be a whole GGUF file"):
        read_metadata(path, "model")


@pytest.mark.parametrize("size", [30, 100, 400, 5000])
def test_a_head_that_breaks_off_anywhere_is_refused(
    tmp_path: Path, weights: Path, size: int
) -> None:
    path = tmp_path / "cut.gguf"
    with weights.open("rb") as whole:
        path.write_bytes(whole.read(size))
    with pytest.raises(InputError, match="must be a whole GGUF file"):
        read_metadata(path, "model")


def test_a_folder_stands_for_the_only_weights_in_it(tmp_path: Path) -> None:
    only = tmp_path / "a.gguf"
    only.touch()
    assert find_gguf(tmp_path, "checkpoint.load") == only
    assert find_gguf(only, "checkpoint.load") == only


def test_a_folder_without_one_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.load: .* exactly one, got none"):
        find_gguf(tmp_path, "checkpoint.load")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(InputError, match=r"exactly one, got a\.gguf, b\.gguf"):
        find_gguf(tmp_path, "checkpoint.load")
