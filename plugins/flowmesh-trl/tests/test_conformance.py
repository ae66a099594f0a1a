"""Every task type that trains keeps what the kit checks, with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flowmesh_trl import examples

from flowmesh_core.testing import ExecutorSuite

MISSPELT = {"training": {"learning_rat": 1e-3}}
NO_COLUMN = {"examples": [{"nothing": "to learn"}] * 4}
ENDLESS = {"max_steps": 100_000, "save_steps": 100_000}


def without_columns(example: Callable[[Path], dict[str, Any]]) -> Any:
    return lambda folder: {**example(folder), "data": NO_COLUMN}


def without_end(example: Callable[[Path], dict[str, Any]], **limits: Any) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        spec = example(folder)
        return {**spec, "training": {**spec["training"], **(limits or ENDLESS)}}

    return staticmethod(make)


class Training(ExecutorSuite):
    @staticmethod
    def answer(result: Mapping[str, Any]) -> Any:
        """What halves of a batch add up to, but for what is drawn by chance."""
        return [result[name] for name in ("steps", "dataset_size", "train_loss")]


class Trying(ExecutorSuite):
    @staticmethod
    def answer(result: Mapping[str, Any]) -> Any:
        """The order in which answers are drawn is another one for halves."""
        return [result[name] for name in ("steps", "dataset_size")]


class TestSft(Training):
    executor = "trl.sft"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.sft)]
    long_spec = without_end(examples.sft)


@pytest.mark.slow
class TestLoraSft(Training):
    executor = "trl.lora_sft"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.lora_sft)]
    long_spec = without_end(examples.lora_sft)


@pytest.mark.slow
class TestDpo(Training):
    executor = "trl.dpo"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.dpo)]
    long_spec = without_end(examples.dpo)


@pytest.mark.slow
class TestReward(Training):
    executor = "trl.reward"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.reward)]
    long_spec = without_end(examples.reward)


@pytest.mark.slow
class TestKto(Training):
    executor = "trl.kto"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.kto)]
    long_spec = without_end(examples.kto)


@pytest.mark.slow
class TestGrpo(Trying):
    executor = "trl.grpo"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.grpo)]
    long_spec = without_end(examples.grpo)


@pytest.mark.slow
class TestPpo(Trying):
    executor = "trl.ppo"
    refused: ClassVar[Any] = [MISSPELT, without_columns(examples.ppo)]
    long_spec = without_end(examples.ppo, steps=100_000)
