"""Loads, uses and frees a model three times; prints what a test wants to know, as JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from flowmesh_llamacpp.engine import LlamaEngine
from flowmesh_llamacpp.spec import LlamacppOptions

_MIB = 1024 * 1024


def main(weights: Path) -> None:
    report = {"before_mib": resident_mib()}
    for _ in range(3):
        engine = LlamaEngine(weights, LlamacppOptions(n_ctx=2048, n_threads=1))
        answer = engine.complete({"prompt": "Hello", "max_tokens": 4}, stopped=lambda: False)
        report["ports"], report["loaded_mib"] = listening_ports(), resident_mib()
        engine.close()
    report["after_mib"] = resident_mib()
    sys.stdout.write(json.dumps(report | {"tokens": answer.completion_tokens if answer else 0}))


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // _MIB


def listening_ports() -> int:
    own = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "0A" and f"socket:[{row[9]}]" in own for row in sockets)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
