"""What a document rewards: rules, functions of installed packages, a reward model.

Each becomes a ``Reward``, which TRL's GRPO calls as it is and ``queries.py`` makes a model of for
its PPO. Whatever a reward returns is checked, since a NaN or a missing value trains rubbish.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from flowmesh_core import ContractError, ExecutionError, InputError, PluginError, load_driver
from flowmesh_trl.rules import RULES, Answer, Rule

__all__ = ["GROUP", "Reward", "RewardFunction", "answer_text", "load_rewards"]

GROUP = "flowmesh.trl.rewards"

RewardFunction = Callable[..., Sequence[float | None]]
"""Called by keyword with ``prompts``, ``completions``, ``completion_ids`` and every other column of
the rows, all lists of one length; returns as many numbers, None where it has nothing to say."""


@attrs.frozen(kw_only=True)
class Reward:
    """A reward as TRL calls it.

    Attributes:
        name: For metrics and messages; no two of one training are alike.
        weight: What its values count; GRPO takes it as ``reward_weights``.
        function: What gives the values.
    """

    name: str
    weight: float = 1.0
    function: RewardFunction

    @property
    def __name__(self) -> str:  # what TRL calls it in its metrics
        return self.name

    def __call__(self, **columns: Any) -> list[float | None]:
        """Return one value for each completion.

        Raises:
            ExecutionError: The function gave too few values, too many, or what is no number.
        """
        values = self.function(**columns)
        wanted = len(columns["completions"])
        if not isinstance(values, Iterable):
            raise ExecutionError(
                f"reward {self.name!r} must return a list of {wanted} numbers, got"
                f" {type(values).__name__}"
            )
        checked = [self._checked(index, value) for index, value in enumerate(values)]
        if len(checked) != wanted:
            raise ExecutionError(
                f"reward {self.name!r} must return a value for each of {wanted} completions, got"
                f" {len(checked)}"
            )
        return checked

    def _checked(self, index: int, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ExecutionError(
                f"reward {self.name!r} must return finite numbers or None, got {value!r:.40} for"
                f" completion {index}"
            )
        return number


def load_rewards(entries: Sequence[Mapping[str, Any]]) -> list[Reward]:
    """Load what ``spec.reward`` lists: ``name``, and perhaps ``weight`` and ``options``.

    A name is a rule of ``RULES`` or an entry point of the group ``flowmesh.trl.rewards``. The entry
    point is a ``RewardFunction``, which gets its options as further keywords, or a class of which
    an instance with these options is one. The options of rules were validated with the spec.

    Raises:
        ContractError: Naming everything that is wrong with any of the entry points.
        ExecutorUnavailableError: A rule needs a package that is not installed.
    """
    problems: list[str] = []
    found: list[Reward] = []
    for index, entry in enumerate(entries):
        try:
            found.append(_load(**entry))
        except ContractError as exc:
            problems += [f"spec.reward[{index}]: {problem}" for problem in exc.problems]
    if problems:
        raise ContractError(problems)
    return _renamed(found)


def _load(*, name: str, weight: float = 1.0, options: Mapping[str, Any] | None = None) -> Reward:
    if name in RULES:
        rule = RULES[name].model_validate(options or {})
        rule.prepare()
        return Reward(name=name, weight=weight, function=_each(name, rule))
    try:
        loaded = load_driver(GROUP, name)
    except PluginError as exc:
        raise ContractError(
            f"{name!r} is none of the rules ({', '.join(RULES)}), and {exc}"
        ) from exc
    return Reward(name=name, weight=weight, function=_with_options(name, loaded, options or {}))


def _each(name: str, rule: Rule) -> RewardFunction:
    """Let a rule that scores one answer score a batch."""

    def function(
        *, prompts: Any, completions: Sequence[Any], completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        lists = {key: values for key, values in columns.items() if isinstance(values, list)}
        answers = (
            Answer(
                text=answer_text(completion),
                tokens=len(completion_ids[index]),
                columns={key: values[index] for key, values in lists.items()},
            )
            for index, completion in enumerate(completions)
        )
        try:
            return [rule.score(answer) for answer in answers]
        except InputError as exc:
            raise InputError(f"reward {name!r}: {exc}") from exc

    return function


def answer_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion as text; of a chat, what the assistant said, a line for each turn."""
    if isinstance(completion, str):
        return completion
    said = [turn.get("content") for turn in completion if turn.get("role") == "assistant"]
    return "\n".join(content for content in said if isinstance(content, str))


def _with_options(name: str, loaded: Any, options: Mapping[str, Any]) -> RewardFunction:
    if isinstance(loaded, type):
        try:
            loaded = loaded(**options)
        except (TypeError, ValueError) as exc:
            raise ContractError(f"options of {name!r} do not fit: {exc}") from exc
        options = {}
    if not callable(loaded) or inspect.iscoroutinefunction(loaded):
        raise ContractError(
            f"{name!r} of {GROUP} must be a function that is not async, or a class of such, got"
            f" {type(loaded).__name__}"
        )
    call: RewardFunction = loaded
    return lambda **columns: call(**{**columns, **options})


def _renamed(rewards: Sequence[Reward]) -> list[Reward]:
    """Number the rewards that share a name: ``regex``, ``regex_2``."""
    seen: Counter[str] = Counter()
    found: list[Reward] = []
    for reward in rewards:
        seen[reward.name] += 1
        count = seen[reward.name]
        found.append(attrs.evolve(reward, name=f"{reward.name}_{count}") if count > 1 else reward)
    return found
