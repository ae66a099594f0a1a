"""Shouts one task, or several of the same volume at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flowmesh_core import Artifact, Executor, Outcome, RunContext, build_text


class Shout(Executor):
    """Each text in capitals, with as many marks as the volume says."""

    def run(self, ctx: RunContext) -> Outcome:
        """Shout the rows of one task."""
        return self._shout(ctx, together=1)

    def run_group(self, ctxs: Sequence[RunContext]) -> Iterator[tuple[str, Outcome]]:
        """Shout several tasks."""
        for ctx in ctxs:
            if not ctx.cancelled:
                yield ctx.task_id, self._shout(ctx, together=len(ctxs))

    def _shout(self, ctx: RunContext, *, together: int) -> Outcome:
        marks = ctx.settings.mark * ctx.spec.volume
        items = []
        for row in ctx.inputs.rows or ():
            ctx.check()
            items.append({"index": row.index, "output": build_text(row, None).upper() + marks})
        lines = "".join(f"{item['output']}\n" for item in items)
        (ctx.folder / "shouts.txt").write_text(lines, encoding="utf-8")
        return Outcome(
            result={"ok": True, "items": items, "together": together},
            artifacts=[Artifact("shouts.txt", result_key="shouts")],
        )
