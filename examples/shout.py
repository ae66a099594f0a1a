"""A whole executor in one file: ``flowmesh run examples/shout.yaml --plugin examples/shout.py``."""

from flowmesh_core import Executor, ExecutorInfo, RunContext, hookimpl


@hookimpl
def flowmesh_register_executors() -> list[ExecutorInfo]:
    """Say what there is, without loading anything."""
    return [
        ExecutorInfo(
            name="example.shout",
            task_types=["example.shout"],
            target=f"{__name__}:Shout",
            inputs=["rows"],
        )
    ]


class Shout(Executor):
    """Answers every prompt in capitals."""

    def run(self, ctx: RunContext) -> dict[str, object]:
        """Return one item per row."""
        rows = ctx.inputs.rows or ()
        items = [{"index": row.index, "output": str(row.prompt).upper()} for row in rows]
        return {"ok": True, "items": items}
