"""Loads models, tokenizers and adapters, and says in our words why one cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from flowmesh_core import AdapterRef, ExecutorUnavailableError, InputError
from flowmesh_transformers.spec import TransformersOptions
from flowmesh_transformers.weights import Origin

__all__ = ["load_adapters", "load_model", "load_tokenizer", "readable"]

_INSTALL = "pip install 'flowmesh-transformers[engine]'"
_NETWORK = "We couldn't connect"


def load_tokenizer(origin: Origin, *, trust_remote_code: bool) -> Any:
    """Load a tokenizer.

    Raises:
        InputError: It cannot be read.
        ExecutorUnavailableError: It needs a package that is not installed.
    """
    with readable(f"the tokenizer of {origin.name}"):
        return AutoTokenizer.from_pretrained(
            origin.name, trust_remote_code=trust_remote_code, **origin.arguments()
        )


def load_model(
    origin: Origin,
    options: TransformersOptions,
    *,
    embeds: bool,
    gpus: int,
    trust_remote_code: bool,
) -> Any:
    """Load a model for inference.

    Args:
        origin: Where it is.
        options: How to load it.
        embeds: Whether its vectors are wanted, not its words.
        gpus: How many the task may use.
        trust_remote_code: Whether the repository's own code may run.

    Raises:
        InputError: It cannot be read, lacks weights or is of the wrong kind.
        ExecutorUnavailableError: It needs a package or a GPU that is not here.
    """
    kind = AutoModel if embeds else AutoModelForCausalLM
    wanted = {
        "attn_implementation": options.attention,
        "quantization_config": _quantization(options),
    }
    with readable(origin.name):
        model, report = kind.from_pretrained(
            origin.name,
            device_map=_device_map(options.device_map, gpus),
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **{key: value for key, value in wanted.items() if value is not None},
            **origin.arguments(),
        )
    lacking = sorted(name for name in report["missing_keys"] if not (embeds and "pooler" in name))
    if lacking:  # the library would go on with random numbers in their place
        raise InputError(
            f"model.source: {origin.name} has no weights for {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + f", which {type(model).__name__} needs"
        )
    if model.config.is_encoder_decoder:
        raise InputError(
            f"model.source: {type(model).__name__} has an encoder and a decoder, which is not "
            "supported; take a model with one of them"
        )
    return model


def load_adapters(model: Any, adapters: Sequence[AdapterRef]) -> Any:
    """Merge the adapters that are to be merged into a model, and put the others on top.

    Raises:
        InputError: One does not fit the model.
        ExecutorUnavailableError: ``peft`` is not installed.
    """
    for apply in ("merge", "runtime"):
        chosen = [adapter for adapter in adapters if adapter.apply == apply]
        if not chosen:
            continue
        wrapped = _wrap(model, chosen)
        model = wrapped.merge_and_unload() if apply == "merge" else wrapped.get_base_model()
    return model


def _wrap(model: Any, adapters: Sequence[AdapterRef]) -> Any:
    try:
        from peft import PeftConfig, PeftModel  # noqa: PLC0415 - few tasks have adapters
    except ImportError as exc:
        raise ExecutorUnavailableError(
            f"adapters need the package peft, not installed here; run: {_INSTALL}",
            needs=["peft"],
            install=_INSTALL,
        ) from exc
    wrapped: Any = None
    names = [f"lora_{number}" for number in range(len(adapters))]  # theirs may hold dots
    for name, adapter in zip(names, adapters, strict=True):
        with readable(f"adapter {adapter.name}"):
            config = PeftConfig.from_pretrained(str(adapter.path))
            if wrapped is None:
                wrapped = PeftModel(model, config, adapter_name=name)
            report = wrapped.load_adapter(str(adapter.path), adapter_name=name)
        strangers = [*report.unexpected_keys, *report.missing_keys]
        if strangers:
            raise InputError(
                f"adapter {adapter.name}: {strangers[0]} of {adapter.path} does not fit the model"
            )
        for module in wrapped.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(name, adapter.scale)
    wrapped.base_model.set_adapter(names, inference_mode=True)
    return wrapped


def _quantization(options: TransformersOptions) -> Any:
    if not (options.load_in_8bit or options.load_in_4bit):
        return None
    return BitsAndBytesConfig(load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit)


def _device_map(wanted: str | None, gpus: int) -> str:
    """Return the library's device map: never a GPU that the task was not given."""
    if wanted == "cuda" and not gpus:
        raise ExecutorUnavailableError(
            "model.transformers.device_map is 'cuda', but the task has no GPU; leave it out, or "
            "ask for one in resources.hardware.gpu"
        )
    if wanted == "cpu" or not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise ExecutorUnavailableError(
            "the task has a GPU that this torch does not see; install a build of torch for it, or "
            "set model.transformers.device_map to cpu"
        )
    return "cuda:0" if wanted in (None, "cuda") else wanted


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what the library raises for a bad input into errors of ours."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the input
        raise
    except ImportError as exc:
        raise ExecutorUnavailableError(f"{what}: {exc}", install=_INSTALL) from exc
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        text = " ".join(str(exc).split())
        raise InputError(
            f"transformers cannot load {what}: {text[:500]}", retriable=_NETWORK in text
        ) from exc
