"""Builds the graph of an embedded collection: ``python -m flowmesh_rag.stores.optimize SHARD``.

It runs as a process of its own, which can be ended at any time: the engine holds the
interpreter's lock until the graph is built, and no cancel would be heard meanwhile.
"""

from __future__ import annotations

import sys

import qdrant_edge as edge

__all__ = ["main"]


def main(shard_path: str) -> None:
    """Optimize one shard, which nobody else has open."""
    shard = edge.EdgeShard.load(shard_path)
    try:
        shard.optimize()
    finally:
        shard.close()


if __name__ == "__main__":
    main(sys.argv[1])
