"""Loads a model on the CPU in its own dtype, merges adapters into it and writes it once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from flowmesh_core import AdapterRef, ExecutionError, ExecutorUnavailableError, InputError

__all__ = ["merge"]

_NAME = "lora_0"  # theirs may hold dots
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NETWORK = "We couldn't connect"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")
# What an adapter may hold beside weights that a factor could be put before.
_UNSCALABLE = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")


def merge(
    model: str,
    *,
    revision: str | None,
    adapters: Sequence[AdapterRef],
    target: Path,
    trust_remote_code: bool,
) -> None:
    """Write a model with adapters merged into it, one after the other, to a folder.

    Weights are written; all else in the model's folder is linked, so that whoever loads the result
    finds the tokenizer and every setting as it was.

    Args:
        model: A folder or an id on the hub.
        revision: Of the id.
        adapters: PEFT folders; each is applied to what those before it made.
        target: A folder that is empty.
        trust_remote_code: Whether the repository's own code may run.

    Raises:
        InputError: The model or an adapter cannot be read, or they do not fit.
        ExecutorUnavailableError: A package is not installed.
        ExecutionError: The disk is full.
    """
    with _readable(model):
        folder = Path(model).absolute()
        if not folder.is_dir():
            rest = [*_WEIGHTS, "*.index.json"]
            folder = Path(snapshot_download(model, revision=revision, ignore_patterns=rest))
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        merged = _load(model, options)
        tied = _shares_embeddings(merged)
    for adapter in adapters:
        with _readable(f"adapter {adapter.name}"):
            merged = _apply(merged, adapter)
    _save(merged, target)
    _complete(target, folder, parted=tied and not _shares_embeddings(merged))


def _load(model: str, options: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(model, **options)
    named = config.architectures or ()
    _check_config(model, config)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype="auto", output_loading_info=True, **options
    )
    if named and type(loaded).__name__ not in named:
        raise InputError(_not_of_text(model, ", ".join(named)))
    if lacking := sorted(report["missing_keys"]):
        raise InputError(f"{model} has no weights for {lacking[0]}, so nothing is merged into it")
    return loaded


def _check_config(model: str, config: Any) -> None:
    """Refuse, before any weights are read, what would be written with less than it had."""
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{model} is quantized, and adapters are merged into full weights only; name the model"
            " that it was made from, or give the adapters apply: runtime"
        )
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise InputError(_not_of_text(model, config.model_type))


def _not_of_text(model: str, kind: str) -> str:
    return (
        f"{model} ({kind}) is no model that only writes text, and adapters are merged into those"
        " alone; give the adapters apply: runtime"
    )


def _apply(model: Any, adapter: AdapterRef) -> Any:
    config = PeftConfig.from_pretrained(str(adapter.path))
    _check_adapter(adapter, config)
    wrapped = PeftModel(model, config, adapter_name=_NAME)
    report = wrapped.load_adapter(str(adapter.path), adapter_name=_NAME, torch_device="cpu")
    if strangers := [*report.unexpected_keys, *_unread(wrapped, report.missing_keys)]:
        raise InputError(
            f"adapter {adapter.name}: {strangers[0]} of {adapter.path} does not fit the model"
        )
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(adapter.scale)
    _untie(model)
    return wrapped.merge_and_unload(safe_merge=True)


def _unread(model: Any, missing: Sequence[str]) -> list[str]:
    """Return what the adapter's file lacks; a head that shares what was read lacks nothing."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name in missing if id(parameters.get(name)) not in read]


def _check_adapter(adapter: AdapterRef, config: Any) -> None:
    if config.layer_replication:
        raise InputError(f"adapter {adapter.name}: layer_replication cannot be merged")
    whole = [name for name in _UNSCALABLE if getattr(config, name)]
    whole += ["bias"] * (config.bias != "none")
    if whole and adapter.scale != 1:
        raise InputError(
            f"adapter {adapter.name}: scale must be 1 for an adapter with {', '.join(whole)}, got"
            f" {adapter.scale:g}"
        )


def _ends(model: Any) -> list[Any]:
    """Return embeddings and head, without what peft puts around them."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [end.get_base_layer() if isinstance(end, LoraLayer) else end for end in found]


def _shares_embeddings(model: Any) -> bool:
    first, last = _ends(model)
    return last is not None and first.weight is last.weight


def _untie(model: Any) -> None:
    """Give a head its own weights, where merging would add to the embeddings what is for one."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if _shares_embeddings(model) and any(isinstance(end, LoraLayer) for end in ends):
        last = _ends(model)[1]
        last.weight = torch.nn.Parameter(last.weight.detach().clone(), requires_grad=False)


def _save(model: Any, target: Path) -> None:
    model.generation_config = GenerationConfig()  # some that can be read are refused when written
    try:
        model.save_pretrained(target)
    except (OSError, SafetensorError) as exc:
        codes = [code for code in _NO_ROOM if f"os error {code})" in str(exc)]
        if not codes and getattr(exc, "errno", None) not in _NO_ROOM:
            raise
        size = sum(each.numel() * each.element_size() for each in model.parameters())
        raise ExecutionError(
            f"no room in {target} for the merged model, which takes {size / 1e9:.1f} GB: {exc}",
            retriable=True,
        ) from exc


def _complete(target: Path, source: Path, *, parted: bool) -> None:
    """Put everything but weights beside them as it is in the model's own folder."""
    for path in target.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            path.unlink()
    ignored = shutil.ignore_patterns(*_WEIGHTS, "*.index.json", "adapter_config.json", ".*")
    shutil.copytree(source, target, ignore=ignored, copy_function=os.symlink, dirs_exist_ok=True)
    if parted:
        config = json.loads((source / "config.json").read_bytes())
        (target / "config.json").unlink()  # the link, not what it points at
        text = json.dumps({**config, "tie_word_embeddings": False}, indent=2)
        (target / "config.json").write_text(text, encoding="utf-8")


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what the libraries raise for a bad input into errors of ours."""
    try:
        yield
    except ImportError as exc:
        raise ExecutorUnavailableError(f"{what}: {exc}") from exc
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as exc:
        text = " ".join(str(exc).split())
        raise InputError(
            f"{what} cannot be loaded to merge adapters: {text[:500]}", retriable=_NETWORK in text
        ) from exc
