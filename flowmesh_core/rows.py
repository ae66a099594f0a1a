"""The rows of a task: a description that crosses to a child process, and their lazy reading there.

A source may hold more rows than memory; nothing here keeps more than one of them, except for a
list, which the document itself carried.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice, starmap
from operator import itemgetter
from pathlib import Path
from typing import Any

import attrs

from flowmesh_core.errors import ExecutorUnavailableError, InputError

__all__ = ["Prompt", "Row", "RowSource"]

Prompt = str | list[dict[str, Any]]

_PROMPT_COLUMNS = ("prompt", "text", "question", "input", "messages")
# The contract's default column of a dataset is `text`.
_DATASET_COLUMNS = ("text", "prompt", "question", "input", "messages")
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_BOM = b"\xef\xbb\xbf"


@attrs.frozen(kw_only=True)
class Row:
    """One prompt.

    Attributes:
        index: Position in the whole source, whatever the shard.
        prompt: Text, or chat messages with ``role`` and ``content``.
        metadata: The row's own fields, for the result.
        add_system_prompt: False when the prompt must be given to the model as it is.
    """

    index: int
    prompt: Prompt
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    add_system_prompt: bool = True


@attrs.frozen(kw_only=True)
class RowSource:
    """Where rows come from and which of them are meant; JSON data, so that it can travel.

    Iterating opens the source anew each time.

    Attributes:
        kind: ``list`` (of prompts), ``records``, ``jsonl`` or ``dataset``.
        params: What the kind needs: ``items``, ``path``, ``url``, ``column`` and so on.
        limit: Only the first rows of the source, before it is shared out among shards.
        shard_index: Which part is read, below ``shard_total``.
        shard_total: How many parts there are; together they cover the source, none twice.
        contiguous: A part is a run of neighbours, else every ``shard_total``-th row.
    """

    kind: str
    params: Mapping[str, Any] = attrs.field(factory=dict)
    limit: int | None = None
    shard_index: int = 0
    shard_total: int = 1
    contiguous: bool = True

    @classmethod
    def from_prompts(
        cls,
        prompts: Iterable[Prompt],
        *,
        metadata: Sequence[Mapping[str, Any]] = (),
        add_system_prompt: bool = True,
    ) -> RowSource:
        """Describe prompts that are at hand; ``metadata`` is empty or has one entry per prompt."""
        params = {
            "items": list(prompts),
            "metadata": list(metadata),
            "add_system_prompt": add_system_prompt,
        }
        return cls(kind="list", params=params)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], **columns: Any) -> RowSource:
        """Describe records that are at hand.

        Args:
            records: JSON objects, one per row.
            columns: ``column`` of the prompt and ``metadata_columns``, as ``data`` has them.
        """
        return cls(kind="records", params={"items": list(records), **columns})

    @property
    def path(self) -> Path | None:
        """The local file or folder that is read, if any."""
        if self.kind == "jsonl":
            return Path(self.params["path"])
        if self.kind == "dataset" and (path := Path(self.params["url"])).exists():
            return path
        return None

    def moved(self, places: Mapping[Path, Path]) -> RowSource:
        """Return the same rows, read from where ``places`` says that the file lies now."""
        if self.path is None:
            return self
        key = "path" if self.kind == "jsonl" else "url"
        return attrs.evolve(self, params={**self.params, key: str(places[self.path])})

    def to_dict(self) -> dict[str, Any]:
        """Return the description as JSON data."""
        return attrs.asdict(self, recurse=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowSource:
        """Build a source from ``to_dict``."""
        return cls(**data)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows of this shard in order of the source.

        Raises:
            InputError: A row cannot be read; the message says where it stands.
            ExecutorUnavailableError: The source is a dataset and ``datasets`` is missing.
        """
        if self.kind == "list":
            yield from (self._list_row(index, prompt) for index, prompt in self._picked())
            return
        for index, where, record in self._located():
            column = self._prompt_column(record, where)
            yield Row(
                index=index,
                prompt=check_prompt(record[column], where=f"{where}: column {column!r}"),
                metadata=self._metadata(record, column),
            )

    def records(self) -> Iterator[dict[str, Any]]:
        """Return the raw rows of this shard, every column as the source has it; see ``__iter__``.

        An item of a list comes as ``prompt``, or ``messages``, beside its metadata. After a row
        that cannot be read, whoever asks for the next one gets it.
        """
        # A generator would end with its first error.
        if self.kind != "list":
            return map(dict, map(itemgetter(2), self._located()))
        return map(_item_record, self)

    def count(self) -> int:
        """Count the rows of this shard; a file is read through for it, but not parsed."""
        source = self._open()
        return len(range(_count(source))[self._span(source)])

    def _open(self) -> Iterable[Any]:
        if self.kind == "jsonl":
            return _Lines(Path(self.params["path"]))
        if self.kind == "dataset":
            return _open_dataset(self.params)
        items: list[Any] = self.params["items"]
        return items

    def _picked(self) -> Iterator[tuple[int, Any]]:
        """Yield this shard's rows as the source has them, each with its index."""
        source = self._open()
        span = self._span(source)
        if isinstance(source, Sized):  # reaches a late shard without reading what precedes it
            rows: Any = source
            return ((index, rows[index]) for index in range(len(rows))[span])
        return islice(enumerate(source), span.start, span.stop, span.step)

    def _span(self, source: Iterable[Any]) -> slice:
        if self.shard_total == 1:
            return slice(0, self.limit, 1)
        if not self.contiguous:
            return slice(self.shard_index, self.limit, self.shard_total)
        size = _count(source) if self.limit is None else min(_count(source), self.limit)
        share, longer = divmod(size, self.shard_total)
        start = self.shard_index * share + min(self.shard_index, longer)
        return slice(start, start + share + (self.shard_index < longer), 1)

    def _list_row(self, index: int, prompt: Prompt) -> Row:
        metadata = self.params.get("metadata")
        return Row(
            index=index,
            prompt=prompt,
            metadata=metadata[index] if metadata else {},
            add_system_prompt=self.params.get("add_system_prompt", True),
        )

    def _located(self) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """Return index, place for messages, and columns of each row."""
        return starmap(self._locate, self._picked())

    def _locate(self, index: int, raw: Any) -> tuple[int, str, Mapping[str, Any]]:
        if self.kind == "jsonl":
            where = f"{self.params['path']}, line {raw[0]}"
            return index, where, _parse_line(raw[1], where)
        if self.kind == "records":
            return index, f"row {index}", raw
        return index, f"dataset {self.params['url']}, row {index}", raw

    def _prompt_column(self, record: Mapping[str, Any], where: str) -> str:
        wanted = self.params.get("column")
        usual = _DATASET_COLUMNS if self.kind == "dataset" else _PROMPT_COLUMNS
        for column in (wanted,) if wanted else usual:
            if record.get(column) is not None:
                return str(column)
        expected = f"the column {wanted!r}" if wanted else f"one of {', '.join(usual)}"
        raise InputError(
            f"{where}: a row needs {expected} for its prompt, got {', '.join(record) or 'none'};"
            " name it in data.column"
        )

    def _metadata(self, record: Mapping[str, Any], prompt_column: str) -> dict[str, Any]:
        columns = self.params.get("metadata_columns")
        everything = self.params.get("metadata_include_all", columns is None)
        found = {key: value for key, value in record.items() if key != prompt_column}
        aliases = (
            columns if isinstance(columns, Mapping) else {name: name for name in columns or ()}
        )
        if everything:
            return {aliases.get(key, key): value for key, value in found.items()}
        return {alias: record[key] for key, alias in aliases.items() if key in record}


def check_prompt(value: Any, *, where: str) -> Prompt:
    """Return a value that is text or a list of chat messages.

    Raises:
        InputError: It is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    got = "a list that is no chat" if isinstance(value, list) else type(value).__name__
    raise InputError(f"{where} must be text or a list of messages with role and content, got {got}")


def _item_record(row: Row) -> dict[str, Any]:
    key = "prompt" if isinstance(row.prompt, str) else "messages"
    return {**row.metadata, key: row.prompt}


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _count(source: Iterable[Any]) -> int:
    return len(source) if isinstance(source, Sized) else sum(1 for _ in source)


@attrs.frozen
class _Lines:
    """The lines of a file that are not blank, as bytes, each with its number from 1."""

    path: Path

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    text = line.strip()
                    if text:
                        yield number, text.removeprefix(_BOM) if number == 1 else text
        except OSError as exc:
            raise InputError(f"{self.path} cannot be read: {exc.strerror}") from exc


def _parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{where} must be a JSON object in UTF-8: {exc}") from exc
    if not isinstance(record, dict):
        raise InputError(f"{where} must be a JSON object, got {type(record).__name__}")
    return record


def _open_dataset(params: Mapping[str, Any]) -> Iterable[Any]:
    """Open with the ``datasets`` library; with ``buffer_size`` as a stream, shuffled within it."""
    try:
        from datasets import load_dataset  # noqa: PLC0415 - an optional and slow import
    except ImportError as exc:
        raise ExecutorUnavailableError(
            f"data.type 'dataset' ({params['url']}) needs the package datasets, not installed"
            " here; run: pip install datasets",
            needs=["datasets"],
            install="pip install datasets",
        ) from exc
    try:
        rows = load_dataset(**_dataset_arguments(params))
    except (OSError, ValueError) as exc:
        raise InputError(f"dataset {params['url']} cannot be opened: {exc}") from exc
    if params.get("shuffle"):
        buffer = {"buffer_size": params["buffer_size"]} if params.get("buffer_size") else {}
        rows = rows.shuffle(seed=params.get("seed", 42), **buffer)
    opened: Iterable[Any] = rows
    return opened


def _dataset_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    file = Path(params["url"])
    arguments: dict[str, Any] = {"path": params["url"], "split": params.get("split", "train")}
    if file.is_file():
        arguments["path"] = _BUILDERS.get(file.suffix, "text")
        arguments["data_files"] = str(file)
    for key in ("name", "revision"):
        if params.get(key):
            arguments[key] = params[key]
    if params.get("trust_remote_code"):  # later versions of the library know it no more
        arguments["trust_remote_code"] = True
    if params.get("buffer_size"):
        arguments["streaming"] = True
    return arguments
