"""What turns contain, and what the chat template makes of them and of a small chat: numbers, without their wording."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum

import numpy as np

from ...rendering.checks import contains, lost_calls, stray_reasoning, template_name, without
from ...rendering.conversation import Conversation, Message, RenderingError
from ...rendering.message_format import as_read, parse
from ...rendering.prefixes import Prefixes
from ...rendering.reasoning import ParsedMessage
from ...rendering.template import ChatTemplate
from ...rendering.template_behaviour import get_behaviour
from ...rendering.tokenization import HardBorders, common_length, tokenize
from ...rendering.turn import RenderedTurn, render_turn
from ...trees.sample import CompletionKind, Sample


_TAG_ROOM = 256  # characters at the end of a prompt that are searched for reasoning tags
_TAIL = 4096  # characters at the end of a prompt that are searched first for its last added token
# Words that no template writes itself.
_QUESTIONS, _ANSWER, _LAST_QUESTION = ("Juniper", "Linden", "Maple", "Cedar"), "Aspen", "Oak"
_REASONINGS = ("Rowan", "Hazel", "Birch", "Alder")


class BranchCause(StrEnum):
    """Why the next turn's prompt does not begin with this turn."""

    REASONING_REMOVED = "reasoning removed"
    EMPTY_BLOCK = "empty reasoning block"
    OTHER_STOP = "other stop token"
    EARLIER_HISTORY = "earlier history rewritten"
    OTHERWISE = "otherwise rewritten"


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
    def from_sample(cls, sample: Sample, turn: int, max_length: int | None) -> TurnStats:
        """Count the tokens of a turn that can be trained."""
        prompt, reasoning = sample.prompt_length, sample.reasoning_length
        return cls(
            turn=turn,
            trainable=1,
            prompt_tokens=prompt,
            reasoning_tokens=reasoning,
            answer_tokens=len(sample) - prompt - reasoning,
            over_max_length=int(max_length is not None and len(sample) > max_length),
        )

    @classmethod
    def merge(cls, stats: Iterable[TurnStats], turn: int | None = None) -> TurnStats:
        """Add up counts."""
        totals, kinds, branches = Counter[str](), Counter[str](), Counter[str]()
        for one in stats:
            totals.update({name: getattr(one, name) for name in _COUNTS})
            kinds.update(one.kinds)
            branches.update(one.branches)
        return cls(turn, **totals, kinds=dict(kinds), branches=dict(branches))


_COUNTS = tuple(one.name for one in fields(TurnStats) if one.name not in ("turn", "kinds", "branches"))


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

    The renderings of all turns outgrow the conversation: a turn is examined when its prompt is first asked for, and
    forgotten after the next one.
    """

    def __init__(self, conversation: Conversation, prefixes: Prefixes) -> None:
        own = {one.name: getattr(prefixes, one.name) for one in fields(Prefixes)}
        self.prefixes = _WatchedPrefixes(**own, before_prompt=self._examine_up_to)
        """The prefixes, which are examined as they are rendered."""
        self._conversation, self._prefixes = conversation, prefixes
        self._left = conversation.turns[::-1]
        self._last: tuple[int, _TurnText] | None = None
        self._stats: list[TurnStats] = []
        self._borders = prefixes.template.borders
        self._prompt_ends: list[tuple[str, str] | None] = []

    def finish(self) -> list[TurnStats]:
        """Examine the turns that are left, and return one entry per assistant message that the template renders."""
        self._examine_up_to(len(self._conversation.messages))
        self._count_last(None)
        matches = _match_prompts(self._prompt_ends, self._borders)
        return [
            replace(stats, turn=turn, not_token_prefix=int(match is False), prompt_changed=int(match is None))
            for turn, (stats, match) in enumerate(zip(self._stats, matches, strict=True), start=1)
        ]

    def _examine_up_to(self, k: int) -> None:
        while self._left and self._left[-1] <= k:
            self._examine(self._left.pop())

    def _examine(self, k: int) -> None:
        prefixes = self._prefixes
        try:
            prompt, own = prefixes.prompt(k), prefixes.through(k)
        except RenderingError:  # the report lists the row with its reason
            return
        try:
            turn = render_turn(prefixes, k)
        except RenderingError:
            turn = None
        parsed = parse(prefixes.trained.get(k, prefixes.messages[k]), prefixes.template)
        text = _TurnText(self._conversation.messages[k], parsed, prompt, own, turn)
        self._prompt_ends.append(_pieces_at_prompt_end(text, self._borders))
        self._count_last(text)
        self._last = k, text

    def _count_last(self, then: _TurnText | None) -> None:
        if self._last is not None:
            k, text = self._last
            self._stats.append(_count(text, then, self._prefixes.template))
            self._prefixes.forget(k)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WatchedPrefixes(Prefixes):
    """Prefixes that say whose prompt is asked for, before they render it."""

    before_prompt: Callable[[int], None]

    def prompt(self, k: int) -> str:
        self.before_prompt(k)
        return Prefixes.prompt(self, k)


def _count(text: _TurnText, then: _TurnText | None, template: ChatTemplate) -> TurnStats:
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
    ends_in_other_token = any(token.endswith(rest) for token in template.borders.added_tokens)
    return BranchCause.OTHER_STOP if ends_in_other_token else BranchCause.OTHERWISE


def _match_prompts(pieces: list[tuple[str, str] | None], borders: HardBorders) -> list[bool | None]:
    """Return for each turn whether its prompt's tokens begin those with the answer; `None` if its text does not."""
    ids = iter(tokenize(borders, [piece for pair in pieces for piece in pair or ()]))
    matches: list[bool | None] = []
    for pair in pieces:
        if pair is None:
            matches.append(None)
            continue
        prompt, rendering = next(ids), next(ids)
        matches.append(prompt.common_length(rendering) == len(prompt))
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


class ReasoningPolicy(StrEnum):
    """Which turns keep their reasoning under a chat template."""

    STRIPPED = "stripped"
    """The last turn alone: the reasoning of earlier turns is removed."""
    KEPT = "kept"
    """All turns."""
    STRIPPED_EVERYWHERE = "stripped from every turn"
    """No turn, not even the last one."""
    MIXED = "mixed"
    """Some earlier turns but not others."""
    REFUSED = "refuses a plain chat"
    """Unknown: the template does not render the small chat."""


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a chat template does, given the arguments with which a dataset calls it."""

    name: str
    kind: ReasoningPolicy
    last_ending: str  # what the template writes after the last answer of a conversation
    history_ending: str  # what it writes after the same answer once another message follows
    added_stop: str  # stop token added to a last answer because the template writes none


def survey_template(template: ChatTemplate) -> TemplateFacts:
    """Return what a template does with small chats."""
    name = template_name(template.tokenizer, template.source)
    try:
        ending = get_behaviour(template).answers.ending
        added_stop = (ending.trained or "").removeprefix(ending.written).strip()
        last = ending.written.strip()
        history = _history_ending(template, added_stop or last)
        return TemplateFacts(name, _reasoning_policy(template), last, history, added_stop)
    except RenderingError:  # some do not render a plain chat
        return TemplateFacts(name, ReasoningPolicy.REFUSED, "", "", "")


def _reasoning_policy(template: ChatTemplate) -> ReasoningPolicy:
    """Find the policy in two chats, with reasoning under its key and between tags: templates may read only one."""
    under_key, inline = (
        _policy_in_chat(template, [{"role": "assistant", **answer_with(reasoning)} for reasoning in _REASONINGS])
        for answer_with in (
            lambda reasoning: {"reasoning_content": reasoning, "content": _ANSWER},
            lambda reasoning: {"content": f"<think>\n{reasoning}\n</think>\n\n{_ANSWER}"},
        )
    )
    return inline if under_key == ReasoningPolicy.STRIPPED_EVERYWHERE else under_key


def _policy_in_chat(template: ChatTemplate, answers: list[Message]) -> ReasoningPolicy:
    forms = [as_read(answer, template) for answer in answers]
    chat: list[Message] = []
    own = []
    for question, form, word in zip(_QUESTIONS, forms, _REASONINGS, strict=True):
        chat.append(as_read(_user(question), template).context)
        own.append(word in template.render([*chat, form.trained]))
        chat.append(form.context)
    history = template.render([*chat, _user(_LAST_QUESTION)], add_generation_prompt=True)
    remembered = [word in history for word in _REASONINGS]
    if not any(own):
        return ReasoningPolicy.STRIPPED_EVERYWHERE
    if all(own) and all(remembered):
        return ReasoningPolicy.KEPT
    return ReasoningPolicy.MIXED if any(remembered) or not all(own) else ReasoningPolicy.STRIPPED


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _history_ending(template: ChatTemplate, stop: str) -> str:
    """Return what ends an answer in history: `stop`, which ends a last one, or another token that was added."""
    messages = [_user(_QUESTIONS[0]), {"role": "assistant", "content": _ANSWER}, _user(_LAST_QUESTION)]
    text = template.render([as_read(message, template).context for message in messages])
    history = text.rpartition(_ANSWER)[2].partition(_LAST_QUESTION)[0].lstrip()
    # Of the text after the answer, only what ends the answer: the rest begins the next message.
    return next((token for token in (stop, *template.borders.added_tokens) if history.startswith(token)), "")
