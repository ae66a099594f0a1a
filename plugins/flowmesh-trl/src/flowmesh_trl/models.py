"""Loads what is trained: tokenizer, model, adapter; and makes models with a score out of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from flowmesh_core import ExecutorUnavailableError, InputError, Inputs, ModelRef

__all__ = [
    "Loading",
    "Weights",
    "check_adapter",
    "find_weights",
    "load_model",
    "load_scorer",
    "load_tokenizer",
    "put_score_on",
    "readable",
]

_INSTALL = "pip install 'flowmesh-trl[engine]'"
_NETWORK = "We couldn't connect"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@attrs.frozen(kw_only=True)
class _Origin:
    """Where the library reads a model from: a folder or an id on the hub."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` takes beside the name."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {
            "trust_remote_code": self.trust_remote_code,
            **{key: value for key, value in given.items() if value is not None},
        }


@attrs.frozen(kw_only=True)
class Weights:
    """All that the model of a task is made of.

    Attributes:
        model: Where it is loaded from.
        tokenizer: Where its tokenizer is loaded from.
        state: File whose weights replace those of ``model``.
        adapter: Folder of an adapter that comes on top.
    """

    model: _Origin
    tokenizer: _Origin
    state: Path | None = None
    adapter: Path | None = None

    @property
    def is_plain_folder(self) -> bool:
        """Whether the weights can be loaded from ``model.name`` as they are."""
        origin = self.model
        changed = self.state or self.adapter or origin.gguf_file
        return changed is None and Path(origin.name).is_dir()


@attrs.frozen(kw_only=True)
class Loading:
    """How weights are loaded.

    Attributes:
        dtype: Of the weights in memory.
        attention: The library's name of an attention implementation; None leaves it to the model.
    """

    dtype: torch.dtype = torch.float32
    attention: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` takes."""
        wanted = {"dtype": self.dtype, "attn_implementation": self.attention}
        return {key: value for key, value in wanted.items() if value is not None}


def find_weights(inputs: Inputs) -> Weights:
    """Return what to load: the checkpoint in place of the model, or on top of it.

    Raises:
        InputError: Something is missing or of a kind that cannot be loaded.
    """
    checkpoint = inputs.checkpoint
    if checkpoint is None:
        base = _base(inputs.model)
        return Weights(model=base, tokenizer=base)
    if (checkpoint / "adapter_config.json").is_file():
        base = _base(inputs.model)
        return Weights(model=base, tokenizer=base, adapter=checkpoint)
    if checkpoint.is_file() and checkpoint.suffix != ".gguf":
        base = _base(inputs.model)
        return Weights(model=base, tokenizer=base, state=checkpoint)
    trusted = inputs.model is not None and inputs.model.trust_remote_code
    found = _local(checkpoint, "checkpoint.load", trusted=trusted)
    own = found.gguf_file or any((checkpoint / name).is_file() for name in _TOKENIZER_FILES)
    return Weights(model=found, tokenizer=found if own else _base(inputs.model))


def load_tokenizer(weights: Weights) -> Any:
    """Load the tokenizer; one without a padding token pads with its end token.

    Raises:
        InputError: It cannot be read, or has neither.
        ExecutorUnavailableError: It needs a package that is not installed.
    """
    origin = weights.tokenizer
    with readable(f"the tokenizer of {origin.name}"):
        tokenizer = AutoTokenizer.from_pretrained(origin.name, **origin.arguments())
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {origin.name} has no end token (eos_token), which training appends "
            "to each text; set one in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(weights: Weights, loading: Loading, *, train_adapter: bool) -> Any:
    """Load a language model to be trained.

    Args:
        weights: What to load.
        loading: How.
        train_adapter: Whether the adapter of ``weights`` is to be trained further; it is merged
            into the model otherwise.

    Returns:
        The model, or a ``PeftModel`` whose adapter can be trained.

    Raises:
        InputError: Something cannot be read, lacks weights or does not fit.
        ExecutorUnavailableError: It needs a package that is not installed.
    """
    model = _load_language_model(weights.model, loading)
    if weights.state is not None:
        _put_state(model, weights.state)
    if weights.adapter is None:
        return model
    return _put_adapter(model, weights.adapter, train=train_adapter)


def load_scorer(weights: Weights, loading: Loading, *, train_adapter: bool) -> Any:
    """Load a model that gives texts one score: as it was saved, or with a fresh head on top.

    Raises:
        InputError: It cannot be read, or gives several scores.
        ExecutorUnavailableError: It needs a package that is not installed.
    """
    if weights.adapter is not None and _scores(weights.adapter):
        base = load_scorer(attrs.evolve(weights, adapter=None), loading, train_adapter=False)
        return _put_adapter(base, weights.adapter, train=train_adapter)
    origin = weights.model
    if origin.gguf_file is None and weights.state is None and weights.adapter is None:
        with readable(origin.name):
            config = AutoConfig.from_pretrained(origin.name, **origin.arguments())
        if any("SequenceClassification" in name for name in config.architectures or ()):
            if config.num_labels != 1:
                raise InputError(
                    f"model.source: {origin.name} tells {config.num_labels} classes; a reward "
                    "model gives one score (num_labels 1)"
                )
            return _load(AutoModelForSequenceClassification, origin, loading)
    return put_score_on(load_model(weights, loading, train_adapter=False))


def put_score_on(model: Any) -> Any:
    """Make a model with one score out of a language model, whose layers it takes over.

    The new head is drawn at random; seed before.

    Raises:
        InputError: The library has no such form of this model.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels = 1
    with readable(f"a reward model made from {type(model).__name__}"), torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
    head = getattr(scorer, "score", None)
    if not isinstance(head, torch.nn.Linear) or scorer.base_model_prefix != model.base_model_prefix:
        raise InputError(f"{type(model).__name__} has no form with a score that can be trained")
    scorer.score = torch.nn.Linear(head.in_features, 1, bias=head.bias is not None)
    torch.nn.init.normal_(scorer.score.weight, std=(head.in_features + 1) ** -0.5)
    scorer.score.to(model.dtype)
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    return scorer


def _base(model: ModelRef | None) -> _Origin:
    if model is None:
        raise InputError("model.source must name a model")
    if model.path is not None:
        return _local(model.path, "model.source", trusted=model.trust_remote_code)
    if model.hub_id is None:
        raise InputError(f"model.source: {model.identifier} is not on this machine")
    return _Origin(
        name=model.hub_id, revision=model.revision, trust_remote_code=model.trust_remote_code
    )


def _local(path: Path, what: str, *, trusted: bool) -> _Origin:
    if path.suffix == ".gguf":
        return _Origin(name=str(path.parent), gguf_file=path.name)
    if (path / "config.json").is_file():
        return _Origin(name=str(path), trust_remote_code=trusted)
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return _Origin(name=str(path), gguf_file=files[0].name)
    raise InputError(
        f"{what}: {path} must be a folder with config.json and weights as save_pretrained writes "
        "them, a folder with adapter_config.json, or a .gguf file"
    )


def _load_language_model(origin: _Origin, loading: Loading) -> Any:
    model = _load(AutoModelForCausalLM, origin, loading)
    if origin.gguf_file is None:
        return model
    # A model read from GGUF counts as quantized and refuses to be saved, though its weights are
    # plain by now: move them into one that never was.
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, **loading.arguments())
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _load(kind: Any, origin: _Origin, loading: Loading) -> Any:
    with readable(origin.name):
        model, report = kind.from_pretrained(
            origin.name, output_loading_info=True, **loading.arguments(), **origin.arguments()
        )
    lacking = sorted(report["missing_keys"])
    if lacking:  # the library would go on with random numbers in their place
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise InputError(
            f"{origin.name} has no weights for {lacking[0]}{more}, which {type(model).__name__} "
            "needs"
        )
    return model


def _put_adapter(model: Any, folder: Path, *, train: bool) -> Any:
    with readable(f"adapter {folder}"):
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=train)
        return tuned if train else tuned.merge_and_unload()


def _scores(adapter: Path) -> bool:
    """Return whether an adapter is of a model with a score."""
    with readable(f"adapter {adapter}"):
        return bool(PeftConfig.from_pretrained(str(adapter)).task_type == TaskType.SEQ_CLS)


def _put_state(model: Any, file: Path) -> None:
    with readable(f"checkpoint.load: {file}"):
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        result = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    strangers = [*result.unexpected_keys, *(set(result.missing_keys) - tied)]
    if strangers:
        raise InputError(
            f"checkpoint.load: {file} does not fit {type(model).__name__}: {min(strangers)}"
        )


def check_adapter(model: PeftModel, wanted: LoraConfig, fields: set[str]) -> None:
    """Refuse a document that asks for another form than the adapter that it continues has.

    Args:
        model: With the adapter to be continued.
        wanted: The form that the document describes.
        fields: Names in ``wanted`` that the document gives itself.

    Raises:
        InputError: They differ.
    """
    present = model.peft_config[model.active_adapter]
    for name in sorted(fields & {"r", "lora_alpha", "target_modules", "use_rslora"}):
        has, asks = getattr(present, name), getattr(wanted, name)
        if has != asks:
            raise InputError(
                f"checkpoint.load: the adapter to be continued has {name} {has!r}, spec.lora asks "
                f"for {asks!r}; leave it out there, or start without checkpoint.load"
            )


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what the libraries raise for a bad input into errors of ours."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the input
        raise
    except ImportError as exc:
        raise ExecutorUnavailableError(f"{what}: {exc}", install=_INSTALL) from exc
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        text = " ".join(str(exc).split())
        raise InputError(f"cannot load {what}: {text[:500]}", retriable=_NETWORK in text) from exc
