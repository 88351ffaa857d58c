"""What turns contain, and what the chat template makes of them: counted turn by turn, and added up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np

from ...rendering.checks import contains, lost_calls, stray_reasoning, without
from ...rendering.conversation import Conversation, Message, RenderingError
from ...rendering.message_format import parse
from ...rendering.prefixes import Prefixes
from ...rendering.reasoning import ParsedMessage
from ...rendering.template import ChatTemplate
from ...rendering.tokenization import HardBorders, common_length, hard_borders, tokenize
from ...rendering.turn import RenderedTurn, render_turn
from ...trees.sample import CompletionKind, Sample


class BranchCause(StrEnum):
    """Why the next turn's prompt does not begin with this turn."""

    REASONING_REMOVED = "reasoning removed"
    EMPTY_BLOCK = "empty reasoning block"
    OTHER_STOP = "other stop token"
    EARLIER_HISTORY = "earlier history rewritten"
    OTHERWISE = "otherwise rewritten"


_TAG_ROOM = 256  # characters at the end of a prompt that are searched for reasoning tags
_TAIL = 4096  # characters at the end of a prompt that are searched first for its last added token


@dataclass(frozen=True, slots=True)
class TurnStats:
    """Counts over one turn, over those at one position in their conversations, or over all."""

    turn: int | None = None  # number of the turn in its conversation, from 1; None for all turns
    turns: int = 0  # that the template renders
    trainable: int = 0  # turns of conversations that can be trained; the token counts are theirs
    prompt_tokens: int = 0
    reasoning_tokens: int = 0
    answer_tokens: int = 0
    over_max_length: int = 0  # trainable turns longer than `max_length`
    reasoning_found: int = 0  # turns whose reasoning is trained: rendered by the template, or put back
    reasoning_restored: int = 0  # put back, since the template leaves it out
    reasoning_under_other_key: int = 0  # under a key that the template ignores
    reasoning_lost: int = 0  # cannot be rendered for any other reason
    reasoning_hidden: int = 0  # the next turn does not see it
    with_calls: int = 0
    calls_lost: int = 0  # turns that lose a tool call or part of one
    stop_added: int = 0  # the template writes no stop token after the turn
    empty_blocks: int = 0  # without reasoning, for which the template writes an empty block
    not_token_prefix: int = 0  # the prompt is a prefix of the rendering with the answer as text, but not as tokens
    prompt_changed: int = 0  # the prompt is rendered differently once the answer follows
    kinds: dict[str, int] = field(default_factory=dict)  # by `CompletionKind`, and those that are "refused"
    followed: int = 0  # another turn follows
    branches: dict[str, int] = field(default_factory=dict)  # by the `BranchCause` of a next prompt that differs

    @property
    def with_reasoning(self) -> int:
        """Turns with reasoning, under whatever key."""
        return self.reasoning_found + self.reasoning_under_other_key + self.reasoning_lost

    @classmethod
    def from_sample(cls, sample: Sample, max_length: int | None) -> TurnStats:
        """Count the tokens of a turn that can be trained."""
        prompt, reasoning = sample.prompt_length, sample.reasoning_length
        return cls(
            trainable=1,
            prompt_tokens=prompt,
            reasoning_tokens=reasoning,
            answer_tokens=len(sample) - prompt - reasoning,
            over_max_length=int(max_length is not None and len(sample) > max_length),
        )

    @classmethod
    def merge(cls, stats: Iterable[TurnStats], turn: int | None = None) -> TurnStats:
        """Add up counts."""
        total = cls(turn=turn)
        for item in stats:
            total = total + item
        return total

    def __add__(self, other: TurnStats) -> TurnStats:
        counts: dict[str, Any] = {}
        for name in _COUNTED:
            one, two = getattr(self, name), getattr(other, name)
            counts[name] = one + two if isinstance(one, int) else dict(Counter(one) + Counter(two))
        return TurnStats(self.turn, **counts)


_COUNTED = tuple(one.name for one in fields(TurnStats) if one.name != "turn")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a number of tokens: some quantiles, and a histogram with one edge more than there are bins."""

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


@dataclass(frozen=True, slots=True)
class _TurnText:
    """Text of one turn: its prompt, the template's rendering with the answer, and the rendered turn if not refused."""

    message: Message
    parsed: ParsedMessage
    prompt: str
    own: str
    turn: RenderedTurn | None

    @property
    def own_completion(self) -> str:
        return self.own[common_length(self.prompt, self.own) :]

    @property
    def completion(self) -> str:
        return self.own_completion if self.turn is None else self.turn.completion

    @property
    def complete(self) -> str:
        return self.own if self.turn is None else self.prompt + self.turn.completion


class TurnExaminer:
    """
    Examines every turn of a conversation, whether or not it can be trained.

    The renderings of all turns together outgrow the conversation, so each turn is examined when its prompt is first
    asked for, and its renderings are forgotten when the next one is there.
    """

    def __init__(self, conversation: Conversation, prefixes: Prefixes) -> None:
        self.prefixes = _FollowedPrefixes.from_prefixes(prefixes, self._examine_up_to)
        """The prefixes, which are examined as they are rendered."""
        self._conversation, self._prefixes = conversation, prefixes
        self._left = conversation.turns[::-1]
        self._last: tuple[int, _TurnText] | None = None
        self._stats: list[TurnStats] = []
        self._borders = hard_borders(prefixes.template.tokenizer, prefixes.template.source)
        self._prompt_ends: list[tuple[str, str] | None] = []

    def finish(self) -> list[TurnStats]:
        """Examine the turns that are left, and return one entry per assistant message that the template renders."""
        self._examine_up_to(len(self._conversation.messages))
        self._leave_last(None)
        matches = _match_prompts(self._prompt_ends, self._borders)
        return [stats + match for stats, match in zip(self._stats, matches, strict=True)]

    def _examine_up_to(self, k: int) -> None:
        while self._left and self._left[-1] <= k:
            self._examine(self._left.pop())

    def _examine(self, k: int) -> None:
        prefixes = self._prefixes
        try:
            prompt, own = prefixes.prompt(k), prefixes.through(k)
        except RenderingError:  # the report lists the row with its reason
            return
        parsed = parse(prefixes.trained.get(k, prefixes.messages[k]), prefixes.template)
        text = _TurnText(self._conversation.messages[k], parsed, prompt, own, _render_turn(prefixes, k))
        self._prompt_ends.append(_pieces_at_prompt_end(text, self._borders))
        self._leave_last(text)
        self._last = k, text

    def _leave_last(self, then: _TurnText | None) -> None:
        if self._last is not None:
            k, text = self._last
            self._stats.append(_examine(text, then, self._prefixes.template))
            self._prefixes.forget(k)
            self._last = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _FollowedPrefixes(Prefixes):
    """Prefixes that say whose prompt is asked for."""

    follow: Callable[[int], None]

    @classmethod
    def from_prefixes(cls, prefixes: Prefixes, follow: Callable[[int], None]) -> _FollowedPrefixes:
        return cls(**{one.name: getattr(prefixes, one.name) for one in fields(Prefixes)}, follow=follow)

    def prompt(self, k: int) -> str:
        self.follow(k)
        return Prefixes.prompt(self, k)


def _render_turn(prefixes: Prefixes, k: int) -> RenderedTurn | None:
    try:
        return render_turn(prefixes, k)
    except RenderingError:  # the report lists the row with its reason
        return None


def _examine(text: _TurnText, then: _TurnText | None, template: ChatTemplate) -> TurnStats:
    """Count what one turn contains and what the template makes of it; `then` is the turn that follows."""
    parsed, turn = text.parsed, text.turn
    calls = len(parsed.calls) or int("function_call" in text.message)
    lost = calls > 0 and (
        not parsed.calls or lost_calls(parsed, without(text.completion, parsed.reasoning)) is not None
    )
    cause = None if then is None else _branch_cause(template, text, then.prompt)
    hidden = bool(parsed.reasoning) and then is not None and not contains(then.prompt, parsed.reasoning)
    return TurnStats(
        turns=1,
        **_reasoning_outcome(text),
        reasoning_hidden=int(hidden),
        with_calls=int(calls > 0),
        calls_lost=int(lost),
        stop_added=int(turn is not None and turn.stop_added),
        empty_blocks=int(turn is not None and turn.has_empty_block),
        kinds={"refused" if turn is None else str(turn.kind): 1},
        followed=int(then is not None),
        branches={} if cause is None else {str(cause): 1},
    )


def _reasoning_outcome(text: _TurnText) -> dict[str, int]:
    """Return which counts of reasoning a turn belongs to."""
    if any(not contains(text.completion, text.message[key]) for key in stray_reasoning(text.message)):
        return {"reasoning_under_other_key": 1}
    if not text.parsed.reasoning:
        return {}
    if text.turn is not None:
        return {"reasoning_found": 1, "reasoning_restored": int(text.turn.kind == CompletionKind.REASONING_RESTORED)}
    rendered = contains(text.own_completion, text.parsed.reasoning)
    return {"reasoning_found": 1} if rendered else {"reasoning_lost": 1}


def _branch_cause(template: ChatTemplate, text: _TurnText, next_prompt: str) -> BranchCause | None:
    shared = common_length(text.complete, next_prompt)
    if shared == len(text.complete):
        return None
    head = len(text.prompt)
    if template.tags:
        opening, closing = re.escape(template.tags.opening), re.escape(template.tags.closing)
        # Some prompts end with the opening tag or a closed block; both count as part of the answer.
        end = text.prompt[-_TAG_ROOM:]
        head -= len(end) - len(re.sub(rf"(?:{opening}\s*)?(?:{closing}\s*)?\Z", "", end))
        block = rf"(?:{opening}\s*)?{closing}\s*"
        without_block = text.complete[:head] + re.sub(block, "", text.complete[head:], count=1)
        if not text.parsed.reasoning and common_length(without_block, next_prompt) > max(shared, head):
            return BranchCause.EMPTY_BLOCK
    if shared < head:
        return BranchCause.EARLIER_HISTORY
    if text.parsed.reasoning and not contains(next_prompt[head:], text.parsed.reasoning):
        return BranchCause.REASONING_REMOVED
    rest = text.complete[shared:].strip()
    ends_in_other_token = any(token.endswith(rest) for token in template.tokenizer.get_added_vocab())
    return BranchCause.OTHER_STOP if ends_in_other_token else BranchCause.OTHERWISE


def _match_prompts(pieces: list[tuple[str, str] | None], borders: HardBorders) -> list[TurnStats]:
    """
    Count, for each turn, in what sense its prompt is a prefix of the rendering with the answer.

    Tokens are compared only around the end of the prompt: everything before it is tokenized alike.
    """
    ids = iter(tokenize(borders, [piece for pair in pieces for piece in pair or ()]))
    matches = []
    for pair in pieces:
        if pair is None:
            matches.append(TurnStats(prompt_changed=1))
            continue
        prompt, rendering = next(ids), next(ids)
        matches.append(TurnStats(not_token_prefix=int(prompt.common_length(rendering) < len(prompt))))
    return matches


def _pieces_at_prompt_end(text: _TurnText, borders: HardBorders) -> tuple[str, str] | None:
    """The text between added tokens around the prompt's end, in prompt and rendering; `None` if they differ before."""
    if not text.own.startswith(text.prompt):
        return None
    tail = borders.split(text.prompt[-_TAIL:])
    pieces = tail if len(tail) > 1 else borders.split(text.prompt)
    start = len(text.prompt) - len(pieces[-1])
    continued = borders.split(text.complete[start:])
    return pieces[-1], continued[0] if len(continued[0]) >= len(pieces[-1]) else text.complete[start:]
