"""Which keys TRL's own configuration has, and of what type, read from the installed sources.

Nothing is imported: a document can be checked in milliseconds, and where TRL cannot be loaded.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

__all__ = ["CONFIGS", "OWNED", "config_options", "read_config", "unknown_option"]

# Task type: the module and the class that a program would import.
CONFIGS: Mapping[str, tuple[str, str]] = {
    "sft": ("trl", "SFTConfig"),
    "lora_sft": ("trl", "SFTConfig"),
    "dpo": ("trl", "DPOConfig"),
    "ppo": ("trl.experimental.ppo", "PPOConfig"),
    "grpo": ("trl", "GRPOConfig"),
    "reward": ("trl", "RewardConfig"),
    "kto": ("trl", "KTOConfig"),
}

_LOADED = "the model is that of model.source; attn_implementation says how it is loaded"
_SHIPPED = "results go to output.destination; leave it out"
_COUNTED = "it is worked out from batch_size, gradient_accumulation_steps and the processes"
_LAUNCHED = "the launcher sets it; nproc_per_node asks for processes"
_PHASES = "training is all that a task does; data.eval and eval_strategy evaluate meanwhile"
# Keys of TRL that are not a document's to set, and what to do instead.
OWNED: Mapping[str, str] = {
    "output_dir": "files go to the task's own folder; leave it out",
    "resume_from_checkpoint": "use resume_from_path; a task that runs again resumes by itself",
    "use_cpu": "the task's devices decide; spec.enforce_cpu: true keeps it off the GPU",
    "auto_find_batch_size": "when memory runs out the micro batch is halved anyway",
    "trust_remote_code": "it stands in model.source",
    "dataset_text_field": "use data.text_field",
    "reward_weights": "each function in spec.reward has a weight of its own",
    **dict.fromkeys(("model_init_kwargs", "sft_model_path"), _LOADED),
    "reward_model_path": "use spec.reward_model",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _PHASES),
    **dict.fromkeys(("local_rank", "world_size"), _LAUNCHED),
    **dict.fromkeys(("num_total_batches", "micro_batch_size", "local_batch_size"), _COUNTED),
    "local_mini_batch_size": _COUNTED,
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"), _SHIPPED),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _SHIPPED),
    "log_completions_hub_repo": _SHIPPED,
}

# Unknown where only generation has a length.
_LENGTHS = ("max_length", "max_seq_length", "max_new_tokens")
# What earlier versions of the libraries called it, and what stands elsewhere.
_RENAMED: Mapping[str, str] = {
    "evaluation_strategy": "use eval_strategy",
    "group_by_length": "use train_sampling_strategy: group_by_length",
    "no_cuda": OWNED["use_cpu"],
    "overwrite_output_dir": OWNED["output_dir"],
    "logging_dir": OWNED["output_dir"],
    "torch_dtype": "use bf16 or fp16",
    **dict.fromkeys(_LENGTHS, "use generation.max_new_tokens"),
    "warmup_ratio": "use warmup_steps, which below 1 is a share of all steps",
}

_PLAIN: Mapping[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str, dict, list)}

Finder = Callable[[str], Path | None]


@cache
def config_options(task_type: str) -> Mapping[str, Any] | None:
    """Return the keys of the configuration of a task type, each with its type.

    Returns:
        None when TRL or Transformers is not installed here, lacks this trainer, or has a form
        that cannot be read; then only constructing the configuration can tell.
    """
    try:
        return read_config(*CONFIGS[task_type])
    except LookupError:
        return None


def read_config(module: str, name: str, *, find: Finder | None = None) -> dict[str, Any]:
    """Read the fields of a dataclass and its bases, following imports from module to module.

    Args:
        module: As in an import statement.
        name: Of the class.
        find: Returns the ``__init__.py`` of a top package; the installed one without it.

    Returns:
        Name to type, in order of definition; ``Any`` where the type is no plain one.

    Raises:
        LookupError: A module or class is not there.
    """
    home, node = _find_class(module, name, find or _installed)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if len(bases) < len(node.bases):
        raise LookupError(f"{home}: not all bases of {name} can be followed")
    fields: dict[str, Any] = {}
    for base in reversed(bases):
        fields |= read_config(home, base, find=find)
    return fields | dict(_own_fields(node))


def unknown_option(key: str, known: Iterable[str]) -> str:
    """Say that a key is none of the known ones, and which is meant."""
    if key in _RENAMED:
        return f"unknown key {key!r}: {_RENAMED[key]}"
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "this version of TRL has no such option"
    return f"unknown key {key!r}, {hint}"


def _installed(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    # A bare folder of that name on the path has no origin.
    return Path(spec.origin) if spec and spec.origin else None


def _find_class(module: str, name: str, find: Finder) -> tuple[str, ast.ClassDef]:
    tree, package = _parse(module, find)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for origin, original in _imports(tree, name, package):
        try:
            return _find_class(origin, original, find)
        except LookupError:
            continue
    raise LookupError(f"{module} has no class {name}")


def _parse(module: str, find: Finder) -> tuple[ast.Module, str]:
    """Return a module's syntax tree and the package from which its relative imports start."""
    top, *below = module.split(".")
    init = find(top)
    if init is None:
        raise LookupError(f"{top} is not installed")
    place = init.parent.joinpath(*below)
    parent = module.rpartition(".")[0]
    for path, package in ((place / "__init__.py", module), (place.with_suffix(".py"), parent)):
        if path.is_file():
            return ast.parse(path.read_bytes()), package
    raise LookupError(f"{module} is not there")


def _imports(tree: ast.Module, name: str, package: str) -> Iterator[tuple[str, str]]:
    # Anywhere in it: lazy packages import under TYPE_CHECKING.
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                source = "." * node.level + (node.module or "")
                yield importlib.util.resolve_name(source, package), alias.name


def _own_fields(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        text = ast.unparse(item.annotation)
        if not item.target.id.startswith("_") and "ClassVar" not in text:
            yield item.target.id, _type_of(item.annotation)


def _type_of(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return _of_constant(node.value)
    if isinstance(node, ast.Name):
        return _PLAIN.get(node.id, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _either(_type_of(node.left), _type_of(node.right))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return _of_subscript(node.value.id, node.slice)
    return Any


def _of_constant(value: object) -> Any:
    if isinstance(value, str):  # an annotation in quotes
        return _type_of(ast.parse(value, mode="eval").body)
    return None if value is None else Any


def _of_subscript(name: str, inner: ast.expr) -> Any:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(part) for part in parts)]
    if name in ("Optional", "Union"):
        return _either(*map(_type_of, parts), *([None] if name == "Optional" else []))
    if name == "list":
        return list[_type_of(inner)]  # type: ignore[misc]  # a type made at run time
    return _PLAIN.get(name, Any)


def _either(*types: Any) -> Any:
    return Any if Any in types else Union[types]  # noqa: UP007 - a type made at run time
