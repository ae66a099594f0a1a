"""Searches collections: the queries of all tasks of a group as one batch, each its own result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import attrs

from flowmesh_core import Executor, FlowmeshError, InputError, Outcome, RunContext
from flowmesh_rag import generation
from flowmesh_rag.blocks import Rerank
from flowmesh_rag.embedder import Embedder, Reranker, open_embedder, open_reranker
from flowmesh_rag.queries import (
    Member,
    do_together,
    open_members,
    open_of,
    read_queries,
    stop_all,
)
from flowmesh_rag.results import Found, build_result, payload_fields
from flowmesh_rag.spec import RagSpec
from flowmesh_rag.stores.base import (
    CollectionFacts,
    Search,
    SearchOptions,
    VectorStore,
    open_store,
)

__all__ = ["RagExecutor"]

_SEARCHES_AT_ONCE = 256  # more are no faster, and an embedded store does not look up meanwhile


class RagExecutor(Executor):
    """``rag``.

    A cancel or the deadline ends a task between two batches of the model, or two requests.
    """

    _embedder: Embedder | None = None
    _reranker: Reranker | None = None

    def load(self, ctx: RunContext) -> None:
        """Load the models that the task needs; what is there stays."""
        self._open_models(ctx)

    def _open_models(self, ctx: RunContext) -> None:
        spec: RagSpec = ctx.spec
        if self._embedder is None and spec.search.mode != "sparse" and not spec.embedding.server:
            self._embedder = self.open_embedder(ctx)
        if self._reranker is None and spec.rerank is not None:
            self._reranker = self.open_reranker(ctx, spec.rerank)

    def open_embedder(self, ctx: RunContext) -> Embedder:
        """Open what ``embedding`` names; a test may put its own in this place."""
        model = ctx.inputs.models.get("embedding.model")
        return open_embedder(ctx.spec.embedding, model, settings=ctx.settings, devices=ctx.devices)

    def open_reranker(self, ctx: RunContext, block: Rerank) -> Reranker:
        """Open what ``rerank`` names, likewise."""
        model = ctx.inputs.models.get("rerank.model")
        return open_reranker(block, model, settings=ctx.settings, devices=ctx.devices)

    def unload(self) -> None:
        """Free the models; may come twice."""
        for opened in (self._embedder, self._reranker):
            if opened is not None:
                opened.close()
        self._embedder = self._reranker = None

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Outcome]]:
        """Search for the rows of ``data``, or ``query``, of tasks that agree on ``group_key``.

        Each text is searched for once.

        Yields:
            Each task's id with its outcome. A task that fails or is cancelled leaves the others
            alone.
        """
        self._open_models(ctxs[0])  # the first task of this engine may have searched by words alone
        yield from _Group(ctxs, self._embedder, self._reranker).answer()


class _Group:
    """Tasks that differ in nothing but their queries, on their way through one store."""

    def __init__(
        self, ctxs: Sequence[RunContext], embedder: Embedder | None, reranker: Reranker | None
    ) -> None:
        self._ctx = ctxs[0]
        self._spec: RagSpec = self._ctx.spec
        self._started_s = self._ctx.clock()
        self._members = open_members(ctxs, read_queries)
        self._embedder = None if self._spec.search.mode == "sparse" else embedder
        self._reranker = reranker
        for model in (embedder, reranker):
            if model is not None:
                model.batch_scale = min(ctx.batch_scale for ctx in ctxs)
                model.remaining_s = self._remaining_s
        self._steps = 2 + (reranker is not None) + (self._spec.generate is not None)
        self._spent: dict[str, float] = {}
        self._warned: set[Member] = set()
        self._vectors: dict[str, Any] = {}
        self._found: dict[str, Sequence[Found]] = {}

    def answer(self) -> Iterator[tuple[str, Outcome]]:
        try:
            self._find()
        except FlowmeshError as exc:  # concerns them all
            for member in open_of(self._members):
                member.error = exc
        going = open_of(self._members) if self._spec.generate else ()
        for member in self._members:
            if member not in going:
                yield member.ctx.task_id, self._outcome(member)
        for member, answers in self._generate(going):
            yield member.ctx.task_id, self._outcome(member, answers)

    def _find(self) -> None:
        stop_all(self._members)
        with open_store(
            self._spec.target,
            owner=self._ctx.owner,
            settings=self._ctx.settings,
            timeout_s=self._remaining_s(),
            stop=partial(stop_all, self._members),
        ) as store:
            options, facts = self._plan(store)
            if self._embedder is not None:
                embed = partial(self._embed, self._embedder, facts, options.vector)
                do_together(self._members, embed)
            do_together(self._members, partial(self._search, store, options))
        if self._reranker is not None:
            do_together(self._members, partial(self._rerank, self._reranker))

    def _remaining_s(self) -> float | None:
        """Return what is left to the member that has the most."""
        left = [member.ctx.remaining_s for member in open_of(self._members)]
        return None if None in left else max(filter(None, left), default=None)

    def _plan(self, store: VectorStore) -> tuple[SearchOptions, CollectionFacts]:
        """Return how to search this collection; refuse before anything is embedded."""
        spec, search = self._spec, self._spec.search
        candidates = spec.rerank.candidates if spec.rerank else 0
        options = SearchOptions.from_block(
            search,
            limit=max(search.top_k, candidates),
            with_payload=payload_fields(spec),
            server_model=spec.embedding.remote_model if spec.embedding.server else None,
        )
        store.require(options)
        facts = store.describe()
        if facts is None:
            where = spec.target.url or f"store {spec.target.type!r}"
            raise InputError(f"{where} has no collection {spec.target.collection!r}")
        if search.mode != "sparse":
            options = attrs.evolve(options, vector=facts.choose_vector(search.using))
        if search.mode != "dense":
            options = attrs.evolve(options, sparse=facts.choose_sparse(search.sparse_using))
        self._compare(facts, options.vector)
        return options, facts

    def _compare(self, facts: CollectionFacts, vector: str) -> None:
        """Refuse a model that cannot have made the collection, and tell of one that may not."""
        model = self._embedder
        if model is None:
            return
        if model.dimensions is not None:
            facts.check_size(vector, model.dimensions, model=model.model)
        if facts.model not in ("", model.model):
            for member in open_of(self._members):
                member.ctx.log(
                    f"spec.embedding.model is {model.model}, and the collection was made with"
                    f" {facts.model}: unless these are the same, scores mean nothing",
                    level="warning",
                )

    def _embed(
        self, model: Embedder, facts: CollectionFacts, vector: str, members: Sequence[Member]
    ) -> None:
        texts = _texts(members)
        with self._timed("embed_sec"):
            vectors = model.embed(
                texts,
                role="query",
                stop=partial(stop_all, members),
                normalize=self._spec.embedding.normalize,
            )
        facts.check_size(vector, vectors.shape[1], model=model.model)
        self._vectors.update(zip(texts, vectors, strict=True))
        self._progress(members, 1, f"{len(texts)} texts embedded")

    def _search(
        self, store: VectorStore, options: SearchOptions, members: Sequence[Member]
    ) -> None:
        texts = _texts(members)
        for start in range(0, len(texts), _SEARCHES_AT_ONCE):
            stop_all(members)
            part = texts[start : start + _SEARCHES_AT_ONCE]
            searches = [Search(text=text, vector=self._vectors.get(text)) for text in part]
            with self._timed("search_sec"):
                hits = store.search(searches, options)
            for text, found in zip(part, hits, strict=True):
                self._found[text] = [Found(hit=hit) for hit in found]
            done = start + len(part)
            self._progress(members, 1 + done / len(texts), f"{done} texts searched for")

    def _rerank(self, model: Reranker, members: Sequence[Member]) -> None:
        """Sort the hits of each query anew, all pairs of the members as one batch."""
        for member in members:
            self._tell_of_blanks(member)
        texts = _texts(open_of(members))
        pairs = [(text, self._read(one)) for text in texts for one in self._found[text]]
        asked = [pair for pair in pairs if pair[1]]
        with self._timed("rerank_sec"):
            scores = iter(model.score(asked, stop=partial(stop_all, members)) if asked else ())
        for text in texts:
            scored = [
                attrs.evolve(one, rerank_score=next(scores)) if self._read(one) else one
                for one in self._found[text]
            ]
            scored.sort(key=lambda one: math.inf if one.rerank_score is None else -one.rerank_score)
            self._found[text] = scored[: self._spec.search.top_k]
        self._progress(members, 3, f"{len(asked)} hits read")

    def _read(self, found: Found) -> str:
        """Return a hit's text; nothing for one that has none to be judged by."""
        field = self._spec.rerank.text_field if self._spec.rerank else ""
        text = (found.hit.payload or {}).get(field)
        return text if isinstance(text, str) and text.strip() else ""

    def _tell_of_blanks(self, member: Member) -> None:
        """Warn of hits without text, which come last; without any text, the field is wrong."""
        hits = [self._read(one) for query in member.queries for one in self._found[query.text]]
        blank = hits.count("")
        if not blank or member in self._warned:
            return
        self._warned.add(member)
        field = self._spec.rerank.text_field if self._spec.rerank else ""
        said = f"spec.rerank.text_field: {blank} of {len(hits)} hits have no text in {field!r}"
        if blank == len(hits):
            member.error = InputError(said)
        else:
            member.ctx.log(f"{said} and come last", level="warning")

    def _outcome(
        self,
        member: Member,
        answers: Sequence[generation.Answer] | FlowmeshError | None = None,
    ) -> Outcome:
        if isinstance(answers, FlowmeshError):
            return Outcome(error=answers)
        if member.is_stopped():
            return Outcome(error=member.error)
        found = [self._found[query.text] for query in member.queries]
        result = build_result(
            self._spec,
            member.queries,
            found,
            model=self._model_name(),
            answers=None if answers is None else [answer.to_dict() for answer in answers],
            usage=self._usage(answers),
        )
        member.ctx.progress(1.0)
        return Outcome(result=result)

    def _generate(
        self, members: Sequence[Member]
    ) -> Iterator[tuple[Member, list[generation.Answer] | FlowmeshError]]:
        """Have all members' answers written at once."""
        if self._spec.generate is None or not members:
            return
        asked = {
            member: generation.Asked(
                ctx=member.ctx,
                queries=[query.text for query in member.queries],
                hits=[[one.hit for one in self._found[query.text]] for query in member.queries],
            )
            for member in members
        }
        started_s = self._ctx.clock()
        for said in generation.answer_all(self._spec.generate, self._ctx.settings, asked):
            self._spent["generate_sec"] = self._ctx.clock() - started_s
            yield said

    def _model_name(self) -> str:
        if self._embedder is not None:
            return self._embedder.model
        embeds = self._spec.embedding.server and self._spec.search.mode != "sparse"
        return self._spec.embedding.remote_model or "" if embeds else ""

    def _usage(self, answers: Sequence[generation.Answer] | None) -> dict[str, Any]:
        """Return what the task waited for; a group's tasks wait for each other's queries too."""
        usage = {"latency_sec": self._ctx.clock() - self._started_s, **self._spent}
        if answers is None:
            return usage
        prompt = sum(answer.prompt_tokens for answer in answers)
        completion = sum(answer.completion_tokens for answer in answers)
        tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {**usage, **tokens, "total_tokens": prompt + completion}

    def _progress(self, members: Sequence[Member], steps: float, message: str) -> None:
        for member in open_of(members):
            member.ctx.progress(steps / self._steps, message)

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = self._ctx.clock()
        try:
            yield
        finally:
            self._spent[kind] = self._spent.get(kind, 0.0) + self._ctx.clock() - started


def _texts(members: Sequence[Member]) -> list[str]:
    """Return what the members ask, each text once."""
    return list(dict.fromkeys(query.text for member in members for query in member.queries))
