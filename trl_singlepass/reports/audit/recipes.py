"""What other recipes would train of the same conversations: numbers, without their wording."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...rendering.conversation import Conversation
from ...rendering.reasoning import ParsedMessage, reasoning_tags
from ...rendering.tokenization import common_length
from ...trees.sample import Sample


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Recipe(StrEnum):
    """A common way to train multi-turn conversations."""

    DEFAULT = "TRL's SFTTrainer"
    ASSISTANT_ONLY = "TRL assistant_only_loss"
    LAST_TURN = "last turn only"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReport:
    """Tokens that a recipe trains of the trainable conversations it can be applied to."""

    completion_tokens: int = 0  # of all turns, each in its own context: what there is to train
    reasoning_tokens: int = 0  # completion tokens that are reasoning
    trained_tokens: int = 0
    unlike_inference: int = 0  # trained tokens that the model would not write itself, or not in this context
    reasoning_not_trained: int = 0  # reasoning tokens that are trained in no context
    name: Recipe
    conversations: int = 0  # that it can be applied to
    refusal: str | None = None  # why it cannot be applied to the others, or to any

    @classmethod
    def from_samples(
        cls, name: Recipe, samples: Sequence[Sample], *, trained: int, unlike_inference: int, not_trained: int
    ) -> RecipeReport:
        """Report on one conversation, given the numbers of tokens that the recipe trains of it, and does not."""
        return cls(
            completion_tokens=sum(len(sample) - sample.prompt_length for sample in samples),
            reasoning_tokens=sum(sample.reasoning_length for sample in samples),
            trained_tokens=trained,
            unlike_inference=unlike_inference,
            reasoning_not_trained=not_trained,
            name=name,
            conversations=1,
        )

    @classmethod
    def merge(cls, name: Recipe, reports: Iterable[RecipeReport], refusal: str | None = None) -> RecipeReport:
        """Add up the reports on a recipe, with a refusal of all conversations or the first of a single one."""
        own = [report for report in reports if report.name == name]
        counts = {key: sum(getattr(report, key) for report in own) for key in _COUNTS}
        return cls(name=name, refusal=refusal or next((one.refusal for one in own if one.refusal), None), **counts)


_COUNTS = tuple(one.name for one in fields(RecipeReport) if one.name not in ("name", "refusal"))


def count_last_turn(samples: Sequence[Sample]) -> RecipeReport:
    """Count what training only the last turn of a conversation trains."""
    *others, last = samples
    return RecipeReport.from_samples(
        Recipe.LAST_TURN,
        samples,
        trained=len(last) - last.prompt_length,
        unlike_inference=0,
        not_trained=sum(sample.reasoning_length for sample in others),
    )


class OneSequence:
    """
    The conversation as one sequence: TRL's default, which trains all of its tokens, or `assistant_only_loss=True`,
    rendered with TRL's training template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: Recipe) -> None:
        from trl.chat_template_utils import get_training_chat_template

        self.tokenizer, self.name = tokenizer, name
        self.refusal: str | None = None
        self.chat_template: str | None = None
        if name == Recipe.DEFAULT:
            return
        try:
            if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
                self.chat_template = get_training_chat_template(tokenizer)
        except ValueError:
            self.refusal = "TRL has no training template for this chat template"

    def count(self, conversation: Conversation, samples: Sequence[Sample]) -> RecipeReport:
        """Count what the recipe trains of a conversation."""
        refusal = self.refusal if conversation.images is None else "it is not counted for conversations with images"
        if refusal is None:
            try:
                return self._count(conversation, samples)
            except Exception as error:  # TRL's training templates refuse some rows that the stock ones render
                refusal = str(error) or type(error).__name__
        return RecipeReport(name=self.name, refusal=refusal)

    def _count(self, conversation: Conversation, samples: Sequence[Sample]) -> RecipeReport:
        token_ids, trained = self._tokenize(conversation)
        exact = _trained_as_served(token_ids, samples)
        if conversation.first_trained:  # TRL masks the prompt of a prompt-completion example
            prompt, _ = self._tokenize(conversation, conversation.first_trained)
            trained[: common_length(token_ids, prompt)] = False
        tags = reasoning_tags(self.tokenizer.chat_template)
        indices = [sample.message_index for sample in samples if sample.message_index is not None]
        parsed = [ParsedMessage.from_message(conversation.messages[index], tags) for index in indices]
        return RecipeReport.from_samples(
            self.name,
            samples,
            trained=int(trained.sum()),
            unlike_inference=int((trained & ~exact).sum()),
            not_trained=_missing_reasoning(self._decode(token_ids, trained), parsed, samples),
        )

    def _tokenize(
        self, conversation: Conversation, num_messages: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        encoded = self.tokenizer.apply_chat_template(
            conversation.messages[:num_messages],
            tools=conversation.tools,
            chat_template=self.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=self.name == Recipe.ASSISTANT_ONLY,
            **conversation.template_kwargs,
        )
        token_ids = np.asarray(encoded["input_ids"], np.int64)
        # The first token has nothing to be predicted from.
        return token_ids, np.asarray(encoded.get("assistant_masks", np.arange(len(token_ids)) > 0), bool)

    def _decode(self, token_ids: NDArray[np.int64], trained: NDArray[np.bool_]) -> str:
        """Text of all contiguous trained ranges, one per line."""
        borders = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        return "\n".join(self.tokenizer.decode(token_ids[start:end].tolist()) for start, end in borders)


def _trained_as_served(token_ids: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Return which tokens of a sequence some sample trains after the same tokens."""
    trained = np.zeros(len(token_ids), bool)
    previous: Sample | None = None
    shared = 0
    for sample in samples:
        known = 0 if previous is None else sample.tokens.shared_length(previous.tokens)
        if shared >= known:  # what this sample shares with the one before is in the sequence, too
            shared = known + common_length(token_ids[known:], sample.tokens.tail(known))
        kept = sample.weights.kept
        trained[kept:shared] |= sample.weights.own[: max(shared - kept, 0)] > 0
        previous = sample
    return trained


def _missing_reasoning(text: str, parsed: Sequence[ParsedMessage], samples: Sequence[Sample]) -> int:
    missing, position = 0, 0
    for turn, sample in zip(parsed, samples, strict=True):
        found = text.find(turn.reasoning.strip(), position)
        if found < 0:
            missing += sample.reasoning_length
        else:
            position = found + len(turn.reasoning.strip())
    return missing
