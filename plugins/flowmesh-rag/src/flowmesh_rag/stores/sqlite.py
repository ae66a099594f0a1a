"""Collections in a file of SQLite's: exact search with NumPy, words by FTS5.

A collection is a file ``<owner>/<name>/points.sqlite3``. Several tasks may search it while one
writes. It is for some hundred thousand points: each search looks at every vector.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from flowmesh_core import ExecutionError, InputError
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.stores.base import (
    BOOKKEEPING,
    CollectionFacts,
    Feature,
    Hit,
    Point,
    Search,
    SearchOptions,
    StoreContext,
    VectorStore,
)
from flowmesh_rag.stores.filters import Filter, matches, parse_filter
from flowmesh_rag.stores.locks import wait_for_turn

__all__ = ["SqliteStore"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS points (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, source TEXT, digest TEXT,
    vector BLOB NOT NULL, payload TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS points_by_source ON points (source);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, tokenize = '{tokens}');
"""
_TOKENS = {"english": "porter unicode61", "none": "unicode61"}
_WORD = re.compile(r"\w+")
_QUERIES = 64  # compared with all vectors at once

Ranked = list[tuple[int, float]]
"""Rows and their scores, best first."""


class SqliteStore(VectorStore):
    """A collection that ``rag_index`` made on this machine, without an engine."""

    features = frozenset({Feature.SPARSE, Feature.HYBRID, Feature.FILTER, Feature.SCORE_THRESHOLD})

    def __init__(self, block: StoreBlock, context: StoreContext) -> None:
        super().__init__(block, context)
        self._file = context.folder / block.collection / "points.sqlite3"
        self._opened: sqlite3.Connection | None = None
        self._vectors: tuple[Any, Any, Any] | None = None

    def require(self, options: SearchOptions) -> None:
        """Refuse a filter that cannot be read, too."""
        super().require(options)
        parse_filter(options.filter)

    def describe(self) -> CollectionFacts | None:
        """Read the facts."""
        if not self._file.exists():
            return None
        with self._told() as connection:
            tables = "SELECT count(*) FROM sqlite_master WHERE name = 'facts'"
            found = (
                self._in_turn(connection, tables).fetchone()[0]
                and self._in_turn(connection, "SELECT json FROM facts").fetchone()
            )
        if not found:  # being made just now
            return None
        stored = json.loads(found[0])
        return CollectionFacts(**stored | {"sparse": tuple(stored["sparse"])})

    def create(self, facts: CollectionFacts) -> None:
        """Make file and tables; the facts of whoever was first stay."""
        if facts.language not in _TOKENS:
            known = ", ".join(_TOKENS)
            raise InputError(f"spec.language {facts.language!r}: store 'sqlite' knows {known}")
        self.context.folder.mkdir(0o700, parents=True, exist_ok=True)
        self._file.parent.mkdir(exist_ok=True)
        with self._told() as connection:
            self._in_turn(connection, "PRAGMA journal_mode = WAL")  # readers go on while one writes
        with self._writing() as connection:
            for statement in _SCHEMA.format(tokens=_TOKENS[facts.language]).split(";\n"):
                connection.execute(statement)
            stored = json.dumps(attrs.asdict(facts))
            connection.execute("INSERT OR IGNORE INTO facts VALUES (1, ?)", (stored,))

    def search(self, searches: Sequence[Search], options: SearchOptions) -> list[list[Hit]]:
        """Compare all queries with all vectors, within one view of the file."""
        rule = parse_filter(options.filter)
        facts = self._known()
        if options.mode != "sparse":
            vector = facts.choose_vector(options.vector)
            _check_sizes(facts, vector, [one.vector for one in searches])
        if options.mode != "dense":
            facts.choose_sparse(options.sparse)
        with self._reading() as connection:
            allowed = None if rule is None else _allowed(connection, rule)
            ranked = self._rank(connection, searches, options, allowed)
            return _read_hits(connection, ranked, options.with_payload)

    def upsert(self, points: Sequence[Point]) -> None:
        """Write points in one transaction."""
        facts = self._known()
        _check_sizes(facts, facts.choose_vector(None), [point.vector for point in points])
        with self._writing() as connection:
            for point in points:
                _write_point(connection, point, words=bool(facts.sparse))

    def digests(self, sources: Sequence[str] | None) -> Mapping[str, Mapping[str, str]]:
        """Read two columns."""
        asked = "SELECT source, id, digest FROM points WHERE source IS NOT NULL"
        with self._reading() as connection:
            if sources is None:
                rows = connection.execute(asked).fetchall()
            else:
                asked += " AND source IN (SELECT value FROM json_each(?))"
                rows = connection.execute(asked, (json.dumps(list(sources)),)).fetchall()
        found: dict[str, dict[str, str]] = {}
        for source, point_id, digest in rows:
            found.setdefault(source, {})[point_id] = digest
        return found

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points in one transaction."""
        with self._writing() as connection:
            for point_id in ids:
                _remove(connection, point_id)

    def count(self) -> int:
        """Count exactly."""
        with self._reading() as connection:
            return int(connection.execute("SELECT count(*) FROM points").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _known(self) -> CollectionFacts:
        facts = self.describe()
        if facts is None:
            raise InputError(
                f"store 'sqlite' has no collection {self.block.collection!r}; make it with"
                " rag_index"
            )
        return facts

    @contextlib.contextmanager
    def _told(self) -> Iterator[sqlite3.Connection]:
        """Hand out the connection and turn SQLite's errors into the project's."""
        name = self.block.collection
        try:
            if self._opened is None:
                # SQLite's own waiting hears no cancel.
                self._opened = sqlite3.connect(self._file, timeout=0, isolation_level=None)
            yield self._opened
        except sqlite3.OperationalError as exc:  # such as no room
            raise ExecutionError(f"store 'sqlite', {name!r}: {exc}", retriable=True) from exc
        except sqlite3.DatabaseError as exc:
            raise InputError(f"store 'sqlite', {name!r}: {exc}; delete it, and index anew") from exc

    def _in_turn(self, connection: sqlite3.Connection, statement: str) -> sqlite3.Cursor:
        """Execute what may find the file locked."""

        def attempt() -> sqlite3.Cursor | None:
            try:
                return connection.execute(statement)
            except sqlite3.OperationalError as exc:
                if "locked" not in str(exc):
                    raise
                return None

        return wait_for_turn(attempt, self.block.collection, self.context)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """See the file as it is now, whoever writes meanwhile."""
        self._known()
        with self._told() as connection:
            connection.execute("BEGIN")
            try:
                self._in_turn(connection, "SELECT 1 FROM facts")  # the view begins here
                yield connection
            finally:
                _end(connection)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Write all or nothing."""
        self._vectors = None
        with self._told() as connection:
            self._in_turn(connection, "BEGIN IMMEDIATE")
            try:
                yield connection
                self._in_turn(connection, "COMMIT")
            except BaseException:
                _end(connection)
                raise

    def _rank(
        self,
        connection: sqlite3.Connection,
        searches: Sequence[Search],
        options: SearchOptions,
        allowed: set[int] | None,
    ) -> list[Ranked]:
        limit = options.limit
        if options.mode == "hybrid":
            limit = max(options.candidates, limit)
        dense: list[Ranked] = [[] for _ in searches]
        words: list[Ranked] = [[] for _ in searches]
        if options.mode != "sparse":
            dense = self._by_vector(connection, searches, limit, allowed)
        if options.mode != "dense":
            words = [_by_words(connection, one.text, limit, allowed) for one in searches]
        if options.mode == "hybrid":
            ranked = [_fuse(pair, options.rrf_k) for pair in zip(dense, words, strict=True)]
        else:
            ranked = dense if options.mode == "dense" else words
        least = options.score_threshold
        return [
            [(row, score) for row, score in hits if least is None or score >= least][
                : options.limit
            ]
            for hits in ranked
        ]

    def _by_vector(
        self,
        connection: sqlite3.Connection,
        searches: Sequence[Search],
        limit: int,
        allowed: set[int] | None,
    ) -> list[Ranked]:
        rows, vectors = self._load(connection)
        if allowed is not None and rows.size:
            kept = np.isin(rows, np.fromiter(allowed, dtype=np.int64, count=len(allowed)))
            rows, vectors = rows[kept], vectors[kept]
        if not rows.size:
            return [[] for _ in searches]
        ranked: list[Ranked] = []
        for start in range(0, len(searches), _QUERIES):
            batch = [one.vector for one in searches[start : start + _QUERIES]]
            queries = _unit(np.asarray(batch, dtype=np.float32))
            ranked += [_best(rows, scores, limit) for scores in queries @ vectors.T]
        return ranked

    def _load(self, connection: sqlite3.Connection) -> tuple[Any, Any]:
        """Return all rows and vectors, read again only when somebody wrote."""
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        if self._vectors is None or self._vectors[0] != version:
            stored = connection.execute("SELECT row, vector FROM points ORDER BY row").fetchall()
            rows = np.array([row for row, _ in stored], dtype=np.int64)
            data = np.frombuffer(b"".join(blob for _, blob in stored), dtype="<f4")
            self._vectors = (version, rows, data.reshape(len(rows), -1) if rows.size else data)
        return self._vectors[1:]


def _end(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # some errors have ended it already
        connection.execute("ROLLBACK")


def _check_sizes(facts: CollectionFacts, name: str, vectors: Sequence[Any]) -> None:
    size = facts.vectors[name]
    for vector in vectors:
        if len(vector) != size:
            raise InputError(
                f"store 'sqlite': a vector of {len(vector)} numbers, the collection holds {size}"
            )


def _unit(vectors: Any) -> Any:
    """Give each row the length 1, so that products are cosines; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def _best(rows: Any, scores: Any, limit: int) -> Ranked:
    """Return the rows of the highest scores; the older one goes first where they are equal."""
    if limit < len(scores):
        near = np.sort(np.argpartition(-scores, limit)[:limit])
        rows, scores = rows[near], scores[near]
    order = np.argsort(-scores, kind="stable")
    return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))


def _by_words(
    connection: sqlite3.Connection, text: str, limit: int, allowed: set[int] | None
) -> Ranked:
    """Rank by BM25 what has any of the words. Source: https://sqlite.org/fts5.html#the_bm25_function."""
    words = dict.fromkeys(_WORD.findall(text.lower()))
    found: Ranked = []
    if not words:
        return found
    asked = "SELECT rowid, -bm25(words) AS score FROM words WHERE words MATCH ? ORDER BY score DESC"
    for row, score in connection.execute(asked, (" OR ".join(f'"{word}"' for word in words),)):
        if allowed is None or row in allowed:
            found.append((row, score))
        if len(found) == limit:
            break
    return found


def _fuse(rankings: Sequence[Ranked], rrf_k: int) -> Ranked:
    """Add up ``1 / (k + place)``, places counted from 0 as Qdrant does."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for place, (row, _) in enumerate(ranking):
            scores[row] = scores.get(row, 0.0) + 1 / (rrf_k + place)
    return sorted(scores.items(), key=lambda item: -item[1])


def _allowed(connection: sqlite3.Connection, rule: Filter) -> set[int]:
    rows = connection.execute("SELECT row, id, payload FROM points")
    return {row for row, point_id, text in rows if matches(rule, json.loads(text), point_id)}


def _read_hits(
    connection: sqlite3.Connection, ranked: Sequence[Ranked], wanted: bool | Sequence[str]
) -> list[list[Hit]]:
    rows = sorted({row for hits in ranked for row, _ in hits})
    asked = "SELECT row, id, payload FROM points WHERE row IN (SELECT value FROM json_each(?))"
    found = {
        row: (point_id, _select(json.loads(text), wanted))
        for row, point_id, text in connection.execute(asked, (json.dumps(rows),))
    }
    return [
        [Hit(id=found[row][0], score=score, payload=found[row][1]) for row, score in hits]
        for hits in ranked
    ]


def _select(payload: dict[str, Any], wanted: bool | Sequence[str]) -> dict[str, Any] | None:
    """Keep the fields that are asked for; ``a.b`` keeps a part of ``a``."""
    if isinstance(wanted, bool):
        return payload if wanted else None
    kept: dict[str, Any] = {}
    for key in wanted:
        name, dot, rest = key.partition(".")
        value = payload.get(name)
        if not dot and name in payload:
            kept[name] = value
        elif isinstance(value, dict):
            part = kept.setdefault(name, {})
            if part is not value:
                part.update(_select(value, [rest]) or {})
    return kept


def _write_point(connection: sqlite3.Connection, point: Point, *, words: bool) -> None:
    _remove(connection, point.id)
    ours = point.payload.get(BOOKKEEPING) or {}
    vector = _unit(np.asarray(point.vector, dtype=np.float32)).astype("<f4")
    values = (
        *(point.id, ours.get("source_id"), ours.get("digest")),
        *(vector.tobytes(), json.dumps(dict(point.payload))),
    )
    row = connection.execute(
        "INSERT INTO points (id, source, digest, vector, payload) VALUES (?, ?, ?, ?, ?)", values
    ).lastrowid
    if words:
        connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (row, point.text))


def _remove(connection: sqlite3.Connection, point_id: str) -> None:
    found = connection.execute("SELECT row FROM points WHERE id = ?", (point_id,)).fetchone()
    if found:
        connection.execute("DELETE FROM points WHERE row = ?", found)
        connection.execute("DELETE FROM words WHERE rowid = ?", found)
