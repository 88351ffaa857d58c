"""What other recipes train of the same conversations: which reasoning they skip, and in which contexts they train."""

from __future__ import annotations

from collections.abc import Sequence
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

    ASSISTANT_ONLY = "TRL assistant_only_loss"
    LAST_TURN = "last turn only"


@dataclass(frozen=True, slots=True)
class RecipeCounts:
    """Tokens that a recipe trains."""

    completion_tokens: int  # of all turns, each in its own context: what there is to train
    reasoning_tokens: int  # completion tokens that are reasoning
    trained_tokens: int
    unlike_inference: int  # trained tokens that the model would not write itself, or not in this context
    reasoning_not_trained: int  # reasoning tokens that are trained in no context


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReport(RecipeCounts):
    """Tokens that a recipe trains of all trainable conversations it can be applied to."""

    name: Recipe
    conversations: int  # that it can be applied to
    refusal: str | None  # why it cannot be applied to the others, or to any

    @classmethod
    def from_counts(cls, name: Recipe, counts: Sequence[RecipeCounts], refusal: str | None) -> RecipeReport:
        """Sum up the counts of single conversations."""
        totals = {field.name: sum(getattr(c, field.name) for c in counts) for field in fields(RecipeCounts)}
        return cls(name=name, conversations=len(counts), refusal=refusal, **totals)


def count_last_turn(samples: Sequence[Sample]) -> RecipeCounts:
    """Count what training only the last turn of a conversation trains."""
    last = samples[-1]
    return RecipeCounts(
        **_count_available(samples),
        trained_tokens=len(last) - last.prompt_length,
        unlike_inference=0,
        reasoning_not_trained=sum(sample.reasoning_length for sample in samples[:-1]),
    )


class AssistantOnlyLoss:
    """TRL's `assistant_only_loss=True`: the conversation as one sequence, rendered with TRL's training template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from trl.chat_template_utils import get_training_chat_template

        self.tokenizer = tokenizer
        self.refusal: str | None = None
        self.chat_template: str | None = None
        try:
            if "{% generation %}" not in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
                self.chat_template = get_training_chat_template(tokenizer)
        except ValueError:
            self.refusal = "TRL has no training template for this chat template"

    def count(self, conversation: Conversation, samples: Sequence[Sample]) -> RecipeCounts:
        """Count what the recipe trains of a conversation; the training template may raise any exception."""
        token_ids, trained = self._tokenize(conversation)
        exact = _trained_as_served(token_ids, samples)
        if conversation.first_trained:  # TRL masks the prompt of a prompt-completion example
            prompt, _ = self._tokenize(conversation, conversation.first_trained)
            trained[: common_length(token_ids, prompt)] = False
        parsed = [self._parse(conversation, sample) for sample in samples]
        return RecipeCounts(
            **_count_available(samples),
            trained_tokens=int(trained.sum()),
            unlike_inference=int((trained & ~exact).sum()),
            reasoning_not_trained=_missing_reasoning(self._decode(token_ids, trained), parsed, samples),
        )

    def _tokenize(
        self, conversation: Conversation, num_messages: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        encoded = self.tokenizer.apply_chat_template(
            conversation.messages[:num_messages],
            tools=conversation.tools,
            chat_template=self.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **conversation.template_kwargs,
        )
        return np.asarray(encoded["input_ids"], np.int64), np.asarray(encoded["assistant_masks"], bool)

    def _parse(self, conversation: Conversation, sample: Sample) -> ParsedMessage:
        assert sample.message_index is not None
        message = conversation.messages[sample.message_index]
        return ParsedMessage.from_message(message, reasoning_tags(self.tokenizer.chat_template))

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


def _count_available(samples: Sequence[Sample]) -> dict[str, int]:
    return {
        "completion_tokens": sum(len(sample) - sample.prompt_length for sample in samples),
        "reasoning_tokens": sum(sample.reasoning_length for sample in samples),
    }


def _missing_reasoning(text: str, parsed: Sequence[ParsedMessage], samples: Sequence[Sample]) -> int:
    missing, position = 0, 0
    for turn, sample in zip(parsed, samples, strict=True):
        found = text.find(turn.reasoning.strip(), position)
        if found < 0:
            missing += sample.reasoning_length
        else:
            position = found + len(turn.reasoning.strip())
    return missing
