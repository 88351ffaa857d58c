"""Counts over the turns and samples of a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...trees.sample import Sample
from .turns import PromptMatch, ReasoningOutcome, TurnFacts


@dataclass(frozen=True, slots=True)
class SampleSize:
    """
    Token counts of one sample.

    Args:
        prompt (`int`):
            Tokens of the prompt.
        reasoning (`int`):
            Tokens of the completion that are reasoning.
        answer (`int`):
            Other tokens of the completion.
    """

    prompt: int
    reasoning: int
    answer: int

    @classmethod
    def from_sample(cls, sample: Sample) -> SampleSize:
        """Count the tokens of a sample."""
        prompt, reasoning = sample.prompt_length, sample.reasoning_length
        return cls(prompt, reasoning, len(sample) - prompt - reasoning)

    @property
    def length(self) -> int:
        """Tokens of the whole sample."""
        return self.prompt + self.reasoning + self.answer


@dataclass(frozen=True, slots=True)
class TurnStats:
    """
    Counts over all turns, or over the turns at one position in their conversations.

    Args:
        turn (`int`, *optional*):
            Number of the turn in its conversation, from 1; `None` for all turns.
        turns (`int`):
            Turns that the template renders.
        trainable (`int`):
            Turns of conversations that can be trained; the token counts are theirs.
        prompt_tokens (`int`):
            Tokens of their prompts.
        reasoning_tokens (`int`):
            Tokens of reasoning in their completions.
        answer_tokens (`int`):
            Other tokens of their completions.
        over_max_length (`int`):
            Trainable turns longer than `max_length`.
        reasoning_found (`int`):
            Turns whose reasoning is trained: rendered by the template, or put back.
        reasoning_restored (`int`):
            Turns whose reasoning the template leaves out, so that it is put back.
        reasoning_under_other_key (`int`):
            Turns with reasoning under a key that the template ignores.
        reasoning_lost (`int`):
            Turns whose reasoning cannot be rendered for any other reason.
        reasoning_hidden (`int`):
            Turns whose reasoning the next turn does not see.
        with_calls (`int`):
            Turns with tool calls.
        calls_lost (`int`):
            Turns that lose a tool call or part of one.
        stop_added (`int`):
            Turns after which the template writes no stop token.
        empty_blocks (`int`):
            Turns without reasoning for which the template writes an empty block.
        not_token_prefix (`int`):
            Turns whose prompt is a prefix of the rendering with the answer as text, but not as tokens.
        prompt_changed (`int`):
            Turns whose prompt is rendered differently once the answer follows.
        kinds (`dict[str, int]`):
            Turns by how their completions came about ([`CompletionKind`]), and those that are `"refused"`.
        followed (`int`):
            Turns that another turn follows.
        branches (`dict[str, int]`):
            Turns with which the next turn's prompt does not begin, by cause ([`BranchCause`]).
    """

    turn: int | None
    turns: int
    trainable: int
    prompt_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    over_max_length: int
    reasoning_found: int
    reasoning_restored: int
    reasoning_under_other_key: int
    reasoning_lost: int
    reasoning_hidden: int
    with_calls: int
    calls_lost: int
    stop_added: int
    empty_blocks: int
    not_token_prefix: int
    prompt_changed: int
    kinds: dict[str, int]
    followed: int
    branches: dict[str, int]

    @property
    def with_reasoning(self) -> int:
        """Turns with reasoning, under whatever key."""
        return self.reasoning_found + self.reasoning_under_other_key + self.reasoning_lost

    @classmethod
    def from_turns(
        cls, turn: int | None, facts: Sequence[TurnFacts], samples: Sequence[SampleSize], max_length: int | None
    ) -> TurnStats:
        """Sum up turns, and the sizes of those that can be trained."""
        outcomes = Counter(fact.reasoning for fact in facts)
        matches = Counter(fact.prompt_match for fact in facts)
        restored = outcomes[ReasoningOutcome.RESTORED]
        return cls(
            turn=turn,
            turns=len(facts),
            trainable=len(samples),
            prompt_tokens=sum(sample.prompt for sample in samples),
            reasoning_tokens=sum(sample.reasoning for sample in samples),
            answer_tokens=sum(sample.answer for sample in samples),
            over_max_length=sum(max_length is not None and sample.length > max_length for sample in samples),
            reasoning_found=outcomes[ReasoningOutcome.RENDERED] + restored,
            reasoning_restored=restored,
            reasoning_under_other_key=outcomes[ReasoningOutcome.OTHER_KEY],
            reasoning_lost=outcomes[ReasoningOutcome.LOST],
            reasoning_hidden=sum(fact.hidden for fact in facts),
            with_calls=sum(fact.calls > 0 for fact in facts),
            calls_lost=sum(fact.calls_lost for fact in facts),
            stop_added=sum(fact.stop_added for fact in facts),
            empty_blocks=sum(fact.empty_block for fact in facts),
            not_token_prefix=matches[PromptMatch.TEXT],
            prompt_changed=matches[PromptMatch.NONE],
            kinds=dict(Counter("refused" if fact.kind is None else str(fact.kind) for fact in facts)),
            followed=sum(fact.followed for fact in facts),
            branches=dict(Counter(str(fact.branches) for fact in facts if fact.branches is not None)),
        )

    @classmethod
    def merge(cls, stats: Sequence[TurnStats]) -> TurnStats:
        """Add up counts of different turns."""
        counts: dict[str, object] = {"turn": None}
        for name in (field.name for field in fields(cls) if field.name != "turn"):
            values = [getattr(item, name) for item in stats]
            is_int = isinstance(values[0], int)
            counts[name] = sum(values) if is_int else dict(sum(map(Counter, values), Counter()))
        return cls(**counts)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Lengths:
    """
    Distribution of a number of tokens.

    Args:
        smallest (`int`):
            The smallest number.
        median (`int`):
            The median.
        percentile_99 (`int`):
            The 99th percentile.
        largest (`int`):
            The largest number.
        edges (`tuple[int, ...]`):
            Edges of the histogram's bins, one more than there are bins.
        counts (`tuple[int, ...]`):
            Numbers in each bin.
    """

    smallest: int
    median: int
    percentile_99: int
    largest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def from_values(cls, values: Iterable[int], bins: int = 24) -> Lengths:
        """Summarise at least one number."""
        array = np.fromiter(values, np.int64)
        edges = np.unique(np.linspace(array.min(), array.max() + 1, bins + 1).round().astype(np.int64))
        counts, _ = np.histogram(array, edges)
        median, high = (int(np.quantile(array, q, method="inverted_cdf")) for q in (0.5, 0.99))
        return cls(int(array.min()), median, high, int(array.max()), tuple(edges.tolist()), tuple(counts.tolist()))
