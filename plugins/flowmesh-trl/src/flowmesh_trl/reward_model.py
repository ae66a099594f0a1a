"""The reward that a trained classifier of texts gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from flowmesh_core import InputError, ModelRef
from flowmesh_trl.models import readable
from flowmesh_trl.rewards import Reward

__all__ = ["load_reward_model"]

_BATCH = 16


def load_reward_model(
    ref: ModelRef,
    *,
    kind: Literal["classification", "sentiment"] = "classification",
    scale: float = 1.0,
    max_length: int = 512,
    positive_label: str | None = None,
    negative_label: str | None = None,
    device: str | torch.device = "cpu",
) -> Reward:
    """Load a sequence classifier that scores the prompt together with the answer.

    Args:
        ref: ``reward_model`` of the document.
        kind: ``classification`` gives the positive label's logit, less that of the negative one if
            it is named; ``sentiment`` the same with probabilities, -1 to 1. A classifier with one
            output gives this output in either case.
        scale: Factor on every score.
        max_length: Most tokens of prompt and answer; longer ones lose their beginning.
        positive_label: Needed with several labels, unless one is called ``positive``.
        negative_label: Without it the one called ``negative``, if there is one.
        device: Where the classifier runs.

    Raises:
        InputError: It cannot be loaded, is no classifier, or has no such labels.
    """
    model, tokenizer = _load(ref)
    labels = _Labels.choose(ref, model.config.id2label, positive_label, negative_label)
    scorer = _Scorer(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        labels=labels,
        probabilities=kind == "sentiment",
        scale=scale,
        max_length=max_length,
    )
    return Reward(name="reward_model", function=scorer)


def _load(ref: ModelRef) -> tuple[Any, Any]:
    if ref.format == "gguf" or (ref.path and (ref.path / "adapter_config.json").is_file()):
        what = "a GGUF file" if ref.format == "gguf" else "an adapter"
        raise InputError(f"reward_model {ref.identifier} is {what}; give the whole model")
    place = str(ref.path or ref.hub_id)
    known: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    with readable(f"reward_model {ref.identifier}"):
        tokenizer = AutoTokenizer.from_pretrained(place, **known)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            place, output_loading_info=True, dtype="auto", **known
        )
    lacking = sorted(report["missing_keys"])
    if lacking:  # the library would score with random numbers
        raise InputError(
            f"reward_model {ref.identifier} is no trained classifier: it has no weights for"
            f" {', '.join(lacking[:3])}"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of reward_model {ref.identifier} has no token to pad with")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # the answer stands at the end
    tokenizer.padding_side = "right"
    return model, tokenizer


@attrs.frozen(kw_only=True)
class _Labels:
    positive: int
    negative: int | None

    @classmethod
    def choose(
        cls,
        ref: ModelRef,
        names: Mapping[int, str],
        positive: str | None,
        negative: str | None,
    ) -> _Labels:
        """Find the outputs that count.

        Raises:
            InputError: A label is not known, or needed and not given.
        """
        indexes = {name.casefold(): index for index, name in names.items()}

        def find(label: str | None, usual: str, field: str) -> int | None:
            if label is not None and label.casefold() not in indexes:
                raise InputError(
                    f"reward_model.{field} must be a label of {ref.identifier}"
                    f" ({', '.join(names.values())}), got {label!r}"
                )
            return indexes.get((label or usual).casefold())

        found = find(positive, "positive", "positive_label")
        if found is None and len(names) > 1:
            raise InputError(
                f"reward_model.positive_label is required, {ref.identifier} has the labels"
                f" {', '.join(names.values())}"
            )
        return cls(positive=found or 0, negative=find(negative, "negative", "negative_label"))


@attrs.frozen(kw_only=True)
class _Scorer:
    model: Any
    tokenizer: Any
    labels: _Labels
    probabilities: bool
    scale: float
    max_length: int

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], **_columns: Any
    ) -> list[float]:
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        chat = bool(prompts) and not isinstance(prompts[0], str) and self.tokenizer.chat_template
        scores: list[float] = []
        for start in range(0, len(texts), _BATCH):
            scores += self._scores(texts[start : start + _BATCH], special=not chat)
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return self._ended(prompt + completion)
        turns = [*prompt, *completion]
        if self.tokenizer.chat_template:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        return self._ended("\n".join(str(turn.get("content") or "") for turn in turns))

    def _ended(self, text: str) -> str:
        """End a text as the training of a decoder's score did; other tokenizers end it themselves.

        Source: TRL's RewardTrainer adds the end token to texts.
        """
        end: str | None = self.tokenizer.eos_token
        if not end or self.tokenizer.sep_token or text.endswith(end):
            return text
        return text + end

    def _scores(self, texts: list[str], *, special: bool) -> list[float]:
        batch = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=special,
        ).to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**batch).logits.float()
        if self.probabilities and logits.shape[1] > 1:
            logits = logits.softmax(dim=1)
        score = logits[:, self.labels.positive]
        if self.labels.negative is not None:
            score = score - logits[:, self.labels.negative]
        return [self.scale * value for value in score.tolist()]
