"""What each turn of a conversation contains, and what the chat template makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from ...rendering.checks import contains, lost_calls, stray_reasoning, without
from ...rendering.conversation import Conversation, Message, RenderingError
from ...rendering.message_format import parse
from ...rendering.prefixes import Prefixes
from ...rendering.reasoning import ParsedMessage
from ...rendering.template import ChatTemplate
from ...rendering.tokenization import HardBorders, common_length, hard_borders, tokenize
from ...rendering.turn import RenderedTurn, render_turn
from ...trees.sample import CompletionKind


class ReasoningOutcome(StrEnum):
    """What happens to a turn's reasoning."""

    NONE = "none"
    """The turn has no reasoning."""
    RENDERED = "rendered"
    """The template renders it."""
    RESTORED = "restored"
    """The template leaves it out, and it is put back between the template's tags."""
    OTHER_KEY = "other key"
    """It is stored under a key that the template ignores."""
    LOST = "lost"
    """It cannot be rendered for any other reason."""


class BranchCause(StrEnum):
    """Why the next turn's prompt does not begin with this turn."""

    REASONING_REMOVED = "reasoning removed"
    EMPTY_BLOCK = "empty reasoning block"
    OTHER_STOP = "other stop token"
    EARLIER_HISTORY = "earlier history rewritten"
    OTHERWISE = "otherwise rewritten"


class PromptMatch(StrEnum):
    """In what sense a turn's prompt is a prefix of the rendering that includes its answer."""

    TOKENS = "tokens"
    TEXT = "text"
    NONE = "not at all"


_TAG_ROOM = 256  # characters at the end of a prompt that are searched for reasoning tags
_TAIL = 4096  # characters at the end of a prompt that are searched first for its last added token


@dataclass(frozen=True, slots=True)
class TurnFacts:
    """
    What one turn contains and what the template makes of it.

    Args:
        message_index (`int`):
            Position of its assistant message.
        kind (`CompletionKind`, *optional*):
            How its completion came about; `None` if the turn is refused.
        reasoning (`ReasoningOutcome`):
            What happens to its reasoning.
        calls (`int`):
            Number of tool calls it makes.
        calls_lost (`bool`):
            Whether a call, or part of one, is missing from its rendering.
        stop_added (`bool`):
            Whether the template writes no stop token after it.
        empty_block (`bool`):
            Whether its completion begins with an empty block of reasoning.
        prompt_match (`PromptMatch`):
            Whether its prompt is a prefix of the rendering that includes its answer.
        followed (`bool`):
            Whether another turn follows.
        hidden (`bool`):
            Whether it has reasoning that the next turn's prompt does not show.
        branches (`BranchCause`, *optional*):
            Why the next turn's prompt does not begin with this turn; `None` if it does, or if no turn follows.
    """

    message_index: int
    kind: CompletionKind | None
    reasoning: ReasoningOutcome
    calls: int
    calls_lost: bool
    stop_added: bool
    empty_block: bool
    prompt_match: PromptMatch
    followed: bool
    hidden: bool
    branches: BranchCause | None


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

    Args:
        conversation ([`Conversation`]):
            The conversation.
        prefixes ([`Prefixes`]):
            Its prefixes under a chat template.
    """

    def __init__(self, conversation: Conversation, prefixes: Prefixes) -> None:
        self.prefixes = _FollowedPrefixes.from_prefixes(prefixes, self._examine_up_to)
        """The prefixes, which are examined as they are rendered."""
        self._conversation, self._prefixes = conversation, prefixes
        self._left = conversation.turns[::-1]
        self._last: tuple[int, _TurnText] | None = None
        self._facts: list[TurnFacts] = []
        self._borders = hard_borders(prefixes.template.tokenizer, prefixes.template.source)
        self._prompt_ends: list[tuple[str, str] | None] = []

    def finish(self) -> list[TurnFacts]:
        """Examine the turns that are left, and return one entry per assistant message that the template renders."""
        self._examine_up_to(len(self._conversation.messages))
        self._leave_last(None)
        matches = _match_prompts(self._prompt_ends, self._borders)
        return [replace(facts, prompt_match=match) for facts, match in zip(self._facts, matches, strict=True)]

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
            self._facts.append(_turn_facts(k, text, then, self._prefixes.template))
            self._prefixes.forget(k)
            self._last = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _FollowedPrefixes(Prefixes):
    """Prefixes that say whose prompt is asked for."""

    follow: Callable[[int], None]

    @classmethod
    def from_prefixes(cls, prefixes: Prefixes, follow: Callable[[int], None]) -> _FollowedPrefixes:
        return cls(**{field.name: getattr(prefixes, field.name) for field in fields(Prefixes)}, follow=follow)

    def prompt(self, k: int) -> str:
        self.follow(k)
        return Prefixes.prompt(self, k)


def _render_turn(prefixes: Prefixes, k: int) -> RenderedTurn | None:
    try:
        return render_turn(prefixes, k)
    except RenderingError:  # the report lists the row with its reason
        return None


def _turn_facts(k: int, text: _TurnText, then: _TurnText | None, template: ChatTemplate) -> TurnFacts:
    parsed = text.parsed
    calls = len(parsed.calls) or int("function_call" in text.message)
    lost = calls > 0 and (
        not parsed.calls or lost_calls(parsed, without(text.completion, parsed.reasoning)) is not None
    )
    return TurnFacts(
        message_index=k,
        kind=None if text.turn is None else text.turn.kind,
        reasoning=_reasoning_outcome(text),
        calls=calls,
        calls_lost=lost,
        stop_added=text.turn is not None and text.turn.stop_added,
        empty_block=text.turn is not None and text.turn.has_empty_block,
        prompt_match=PromptMatch.NONE,  # found out later, for all turns at once
        followed=then is not None,
        hidden=bool(parsed.reasoning) and then is not None and not contains(then.prompt, parsed.reasoning),
        branches=None if then is None else _branch_cause(template, text, then.prompt),
    )


def _reasoning_outcome(text: _TurnText) -> ReasoningOutcome:
    if any(not contains(text.completion, text.message[key]) for key in stray_reasoning(text.message)):
        return ReasoningOutcome.OTHER_KEY
    if not text.parsed.reasoning:
        return ReasoningOutcome.NONE
    if text.turn is not None:
        restored = text.turn.kind == CompletionKind.REASONING_RESTORED
        return ReasoningOutcome.RESTORED if restored else ReasoningOutcome.RENDERED
    rendered = contains(text.own_completion, text.parsed.reasoning)
    return ReasoningOutcome.RENDERED if rendered else ReasoningOutcome.LOST


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


def _match_prompts(pieces: list[tuple[str, str] | None], borders: HardBorders) -> list[PromptMatch]:
    """Tokens are compared only around the end of the prompt: everything before it is tokenized alike."""
    ids = iter(tokenize(borders, [piece for pair in pieces for piece in pair or ()]))
    matches = []
    for pair in pieces:
        if pair is None:
            matches.append(PromptMatch.NONE)
            continue
        prompt, rendering = next(ids), next(ids)
        matches.append(PromptMatch.TOKENS if prompt.common_length(rendering) == len(prompt) else PromptMatch.TEXT)
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
