"""A store of another distribution, found by its entry point and checked by the same suite."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flowmesh_rag.blocks import StoreBlock
from flowmesh_rag.settings import RagSettings
from flowmesh_rag.stores.base import VectorStore, open_store
from stevedore import ExtensionManager
from store_suite import StoreSuite

from flowmesh_core import InputError

BLOCK = StoreBlock(type="acme.memory", collection="docs", options={"shelf": "s"})
SOURCE = '''
"""Keeps vectors in this process, on a shelf that the document names."""

import math

from flowmesh_core import InputError
from flowmesh_rag.stores.base import BOOKKEEPING, Feature, Hit, VectorStore
from flowmesh_rag.stores.filters import matches, parse_filter

SHELVES = {}


class MemoryStore(VectorStore):
    features = frozenset({Feature.FILTER, Feature.SCORE_THRESHOLD})

    @property
    def place(self):
        return (self.context.folder, self.block.options["shelf"], self.block.collection)

    def held(self, vectors=()):
        if self.place not in SHELVES:
            raise InputError(f"no collection {self.block.collection!r}")
        facts, points = SHELVES[self.place]
        for vector in vectors:
            if len(vector) != facts.vectors["dense"]:
                raise InputError(f"a vector of {len(vector)} numbers")
        return points

    def describe(self):
        return SHELVES[self.place][0] if self.place in SHELVES else None

    def create(self, facts):
        SHELVES.setdefault(self.place, (facts, {}))

    def search(self, searches, options):
        points = self.held([one.vector for one in searches])
        rule = parse_filter(options.filter)
        kept = [one for one in points.values() if not rule or matches(rule, one.payload, one.id)]
        return [self.best(one.vector, kept, options) for one in searches]

    def best(self, query, points, options):
        def cosine(one):
            product = sum(float(a) * float(b) for a, b in zip(query, one.vector))
            return product / (math.hypot(*query) * math.hypot(*one.vector))

        hits = [Hit(id=p.id, score=cosine(p), payload=self.part(p, options)) for p in points]
        least = options.score_threshold
        hits = [hit for hit in hits if least is None or hit.score >= least]
        return sorted(hits, key=lambda hit: -hit.score)[: options.limit]

    def part(self, one, options):
        wanted = options.with_payload
        if isinstance(wanted, bool):
            return dict(one.payload) if wanted else None
        kept = {key: one.payload[key] for key in wanted if key in one.payload}
        deep = one.payload.get("deep")
        return kept | ({"deep": deep} if "deep.n" in wanted and deep else {})

    def upsert(self, points):
        held = self.held([point.vector for point in points])
        held.update({point.id: point for point in points})

    def digests(self, sources):
        found = {}
        for point in self.held().values():
            ours = point.payload.get(BOOKKEEPING)
            if ours and (sources is None or ours["source_id"] in sources):
                found.setdefault(ours["source_id"], {})[point.id] = ours["digest"]
        return found

    def delete(self, ids):
        for point_id in ids:
            self.held().pop(point_id, None)

    def count(self):
        return len(self.held())
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution with a store, as pip leaves it."""
    site = tmp_path / "site"
    info = site / "acme_memory-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_memory.py").write_text(textwrap.dedent(SOURCE))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-memory\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flowmesh.rag.stores]\n"
        "acme.memory = acme_memory:MemoryStore\n"
        "acme.broken = acme_memory:NoSuchStore\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    yield
    sys.modules.pop("acme_memory", None)


@pytest.fixture
def open_again(installed: None, settings: RagSettings) -> Callable[[], VectorStore]:
    return lambda: open_store(BLOCK, owner="alice", settings=settings)


class TestThirdParty(StoreSuite):
    """The suite on a store that is found by its name."""


def test_it_is_told_its_owner_and_options(open_again: Callable[[], VectorStore]) -> None:
    with open_again() as store:
        assert store.block.options == {"shelf": "s"}
        assert store.context.folder.parent.name == "stores"


@pytest.mark.usefixtures("installed")
def test_a_store_that_nobody_installed_is_told(settings: RagSettings) -> None:
    block = BLOCK.model_copy(update={"type": "acme.other"})
    with pytest.raises(InputError, match=r"'acme\.other'.*known are .*acme\.memory"):
        open_store(block, owner="alice", settings=settings)


@pytest.mark.usefixtures("installed")
def test_a_store_that_cannot_be_loaded_is_told(settings: RagSettings) -> None:
    block = BLOCK.model_copy(update={"type": "acme.broken"})
    with pytest.raises(InputError, match=r"'acme\.broken' cannot be loaded.*NoSuchStore"):
        open_store(block, owner="alice", settings=settings)
