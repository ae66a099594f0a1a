"""Go on from what an earlier attempt left: the latest checkpoint that is whole and of this task.

A checkpoint may have been cut off anywhere, so every file of it that can be checked is checked.
The trainer writes weights, tokenizer, optimizer, scheduler and random states in this order, and
``trainer_state.json`` last. Source: ``Trainer._save_checkpoint`` of Transformers 5.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "adopt",
    "discard_checkpoints",
    "find_checkpoint",
    "fingerprint",
    "latest_whole",
    "mark",
    "read_batch",
]

_log = logging.getLogger(__name__)

_MARK = "flowmesh.json"
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)\Z")
_BLOCKS = (
    *("taskType", "model", "checkpoint", "adapters", "data", "training", "lora"),
    *("reward", "reward_model", "generation"),
)
# Of the transport, the same in no two attempts when signed, or of no effect on the weights.
_PASSING = re.compile(r"(download_)?headers|(download_)?timeout(Sec)?|(logging|save)_\w+")
_OBSERVING = {"disable_tqdm", "log_with", "report_to", "run_name", "tracker_project_name"}
_PLACING = {"primary_gpu", "visible_devices"}


def fingerprint(spec: Mapping[str, Any]) -> str:
    """Return a hash of what must be equal for one training to go on where another stopped.

    Model, data, training and adapter count; timeouts, resources, output, secrets in headers and
    how often to log or save do not.

    Args:
        spec: The document's ``spec`` with its secrets still by name, so that new ones change
            nothing.
    """
    chosen = {key: _lasting(spec[key]) for key in _BLOCKS if spec.get(key) is not None}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        skipped = _OBSERVING | _PLACING
        return {
            key: _lasting(item)
            for key, item in value.items()
            if key not in skipped and not _PASSING.fullmatch(str(key))
        }
    return value


def mark(folder: Path, fingerprint: str, *, batch: int) -> None:
    """Say in an attempt's ``checkpoints/`` which training they are of, before the first is there.

    Args:
        folder: The attempt's folder.
        fingerprint: What ``fingerprint`` gave.
        batch: Rows of an optimizer step, over all processes.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    _replace(checkpoints / _MARK, {"fingerprint": fingerprint, "batch": batch})


def find_checkpoint(attempts: Iterable[Path], fingerprint: str) -> Path | None:
    """Return the latest whole ``checkpoint-<step>`` of the first attempt that has one, or None.

    Says in the log why one is passed over.

    Args:
        attempts: Folders to look in, the most promising first. One without a leading dot is of a
            run that was committed: it is not gone on with.
        fingerprint: ``fingerprint`` of what is to be trained now.
    """
    for folder in attempts:
        checkpoints = folder / "checkpoints"
        if not checkpoints.is_dir():
            continue
        if not folder.name.startswith("."):
            _log.info("%s reached its end, not gone on with", folder)
        elif _read_mark(checkpoints).get("fingerprint") != fingerprint:
            _log.warning("%s is of another model, data or training, passed over", checkpoints)
        elif found := latest_whole(checkpoints):
            return found
    return None


def latest_whole(checkpoints: Path) -> Path | None:
    """Return the ``checkpoint-<step>`` with the highest step that is whole, or None."""
    for _, folder in sorted(_numbered(checkpoints), reverse=True):
        if fault := _fault(folder):
            _log.warning("%s is not whole, passed over: %s", folder, fault)
        else:
            return folder
    return None


def read_batch(checkpoint: Path) -> int:
    """Return the rows of an optimizer step with which it was trained; 0 when nobody said."""
    batch = _read_mark(checkpoint.parent).get("batch")
    return batch if isinstance(batch, int) else 0


def discard_checkpoints(folder: Path, *, after: int = -1) -> None:
    """Remove an attempt's own checkpoints of higher steps, which would be taken for the latest."""
    checkpoints = folder / "checkpoints"
    stale = [path for step, path in _numbered(checkpoints) if step > after]
    for path in stale:
        shutil.rmtree(path)


def adopt(checkpoint: Path, folder: Path) -> Path:
    """Make a checkpoint the latest one of this attempt, and return its new path.

    By hard links where the file system allows, so it costs no space and outlives the earlier
    attempt. The best checkpoint so far comes along, for the trainer may want to end with it.

    Args:
        checkpoint: From ``find_checkpoint``.
        folder: The new attempt's folder.

    Raises:
        OSError: It can be neither linked nor copied.
    """
    checkpoints = folder / "checkpoints"
    if checkpoint.parent == checkpoints:
        discard_checkpoints(folder, after=int(checkpoint.name.rpartition("-")[2]))
        return checkpoint
    discard_checkpoints(folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    best = checkpoint.parent / Path(state.get("best_model_checkpoint") or "none").name
    if best != checkpoint and best.is_dir():
        _link_tree(best, checkpoints / best.name)
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(checkpoints / best.name)
    adopted = checkpoints / checkpoint.name
    _link_tree(checkpoint, adopted, state=state)
    _replace(checkpoints / _MARK, _read_mark(checkpoint.parent))
    return adopted


def _read_mark(checkpoints: Path) -> dict[str, Any]:
    try:
        found = json.loads((checkpoints / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return [(int(match[1]), path) for path in paths if (match := _NAME.match(path.name))]


def _fault(folder: Path) -> str:
    """Say what is missing or cut off in a checkpoint; empty when it is whole."""
    names = {path.name for path in folder.iterdir()}
    for what, patterns in _REQUIRED.items():
        if not any(re.fullmatch(pattern, name) for pattern in patterns for name in names):
            return f"no {what}"
    for path in sorted(folder.rglob("*")):
        if check := _CHECKS.get("".join(path.suffixes[-2:])) or _CHECKS.get(path.suffix):
            try:
                check(path)
            except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
                return f"{path.name}: {exc}"
    return ""


# A sharded trainer keeps weights and optimizer in folders of their own, DeepSpeed in one.
_REQUIRED = {
    "trainer_state.json": (r"trainer_state\.json",),
    "weights": (
        r"(adapter_)?model\.safetensors(\.index\.json)?",
        r"(adapter_model|pytorch_model)\.bin(\.index\.json)?",
        r"pytorch_model_fsdp.*",
        "latest",
    ),
    "optimizer state": (r"optimizer\.(pt|bin)", r"optimizer_\d+", "latest"),
    "scheduler state": (r"scheduler\.pt", "latest"),
    "random states": (r"rng_state(_\d+)?\.pth",),
}


def _check_safetensors(path: Path) -> None:
    """Compare header and size. Source: the safetensors format, README of its repository."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{size} bytes, its header alone has {length}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != wanted:
        raise ValueError(f"{size} bytes instead of {wanted}")


def _check_zip(path: Path) -> None:
    """Read the list of members, which PyTorch writes last."""
    with zipfile.ZipFile(path):
        pass


def _check_json(path: Path) -> None:
    json.loads(path.read_bytes())


def _check_index(path: Path) -> None:
    for name in {*json.loads(path.read_bytes())["weight_map"].values()}:
        if not (path.parent / name).is_file():
            raise ValueError(f"no {name}")


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _check_safetensors,
    ".pt": _check_zip,
    ".pth": _check_zip,
    ".bin": _check_zip,
    ".json": _check_json,
    ".index.json": _check_index,
}


def _link_tree(source: Path, target: Path, *, state: Mapping[str, Any] | None = None) -> None:
    """Link every file below ``source``; ``target`` appears whole, with a state of its own."""
    if target.exists():
        return
    passing = target.with_name(f".{target.name}.adopted")
    shutil.rmtree(passing, ignore_errors=True)
    shutil.copytree(source, passing, copy_function=_link_or_copy)
    if state is not None:
        _replace(passing / _STATE, state)
    passing.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all, and never through a hard link."""
    passing = path.with_name(f".{path.name}.new")
    passing.write_text(json.dumps(content, indent=2), encoding="utf-8")
    passing.replace(path)
