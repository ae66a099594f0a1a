"""Both executors keep what the kit checks, with real weights."""

from __future__ import annotations

from typing import Any, ClassVar

from flowmesh_llamacpp.examples import INFERENCE

from flowmesh_core.testing import ExecutorSuite

NO_SUCH_OPTION = {"model": {"llamacpp": {"n_ctxx": 1}}}


class TestLlamacpp(ExecutorSuite):
    executor = "llamacpp"
    refused: ClassVar[Any] = [NO_SUCH_OPTION, {**INFERENCE, "data": {"type": "list"}}]
    long_spec: ClassVar[Any] = {
        **INFERENCE,
        "data": {"type": "list", "items": ["Tell a long story."] * 200},
        "inference": {"max_tokens": 400},
    }


class TestServe(ExecutorSuite):
    executor = "llamacpp.serve"
    refused: ClassVar[Any] = [NO_SUCH_OPTION]
